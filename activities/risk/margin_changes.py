"""Changes of leverage and of a position's margin, decided before money moves."""

from datetime import datetime
from decimal import Decimal

from msgspec.structs import replace

from activities.market.prices import latest_marks
from activities.matching.instruments import Rules
from activities.matching.steps import append_commands
from activities.risk.collateral import free_collateral
from activities.risk.exposures import (
    create_missing,
    lock_exposures,
    position_margin,
    positions_in_liquidation,
    read_unfrozen,
)
from activities.risk.limits import read_limits
from activities.risk.rows import ExposureRow, Key
from activities.risk.terms import tell_terms
from activities.risk.unfinished import Unfinished, read_unfinished
from domain.clock import to_ms
from domain.exposure import Exposure
from domain.instruments import Instrument
from domain.margin import margin_to_keep, releveraged_margin, tier_of
from domain.margin_changes import MarginChange
from domain.matching import AnyCommand, MoveMargin, margin_units
from domain.money import ZERO
from domain.sagas import EventRange
from domain.steps import MarginPlan
from storage.db import Connection
from storage.once import first_result, store_result


async def plan_change(
    conn: Connection, change: MarginChange, rules: Rules, earlier: list[EventRange] | None
) -> tuple[MarginPlan | None, Unfinished]:
    """What `change` does to the margins; a new leverage is in force for risk from here on. None: busy."""
    first_look = f"adjust:{change.change_id}:first"
    stored = await first_result(conn, "risk", first_look, list[EventRange])
    unfinished = await read_unfinished(conn, [change.user_id], earlier if stored is None else stored)
    # Margin is taken from the position as its user was told of it: from an older one it would be refused later.
    takes = change.kind == "MARGIN" and Decimal(change.value) < ZERO
    plan = None if takes and await unfinished.has(conn, change.user_id) else await _judge(conn, change, rules)
    if plan is not None and plan.refusal is not None and await unfinished.has(conn, change.user_id):
        plan = None
    if plan is None and stored is None:
        await store_result(conn, "risk", first_look, unfinished.ranges)
    return plan, unfinished


async def _judge(conn: Connection, change: MarginChange, rules: Rules) -> MarginPlan | None:
    key = (change.user_id, change.instrument_id)
    instrument = rules.instruments[change.instrument_id]
    await create_missing(conn, [key], rules.instruments)
    exposures = await lock_exposures(conn, [key])
    if await positions_in_liquidation(conn, [key]):
        return MarginPlan(refusal="POSITION_IN_LIQUIDATION")
    if await read_unfrozen(conn, exposures) or await _unbooked(conn, key):
        return None
    row, state = exposures[key], exposures[key].state
    held, version = await position_margin(conn, *key)
    mark = await _fresh_mark(conn, change.instrument_id)
    if mark is None and state.signed_quantity:
        return MarginPlan(refusal="MARK_PRICE_UNAVAILABLE")
    if change.kind == "MARGIN":
        if row.margin_mode == "CROSS":
            return MarginPlan(refusal="POSITION_IS_CROSS")
        plan = _plan_margin(state, held, Decimal(change.value), mark, instrument)
        if plan.position_delta > max(ZERO, (await free_collateral(conn, [key[0]])).get((key[0], plan.asset), ZERO)):
            plan = MarginPlan(refusal="INSUFFICIENT_FUNDS")
    else:
        plan = await _plan_leverage(conn, key, row, held, int(change.value), mark, rules)
        if plan.refusal is None:
            # Until the ledger has moved the margin, no other order is netted against it (see `read_unfrozen`).
            await conn.execute(
                "UPDATE risk.exposures SET pending_step = $3 WHERE user_id = $1 AND instrument_id = $2",
                *key,
                change.change_id,
            )
    if plan.refusal is None:
        plan = replace(plan, command_seq=await _tell_less(conn, key, plan, rules))
    return replace(plan, margin_version=version)


async def _tell_less(conn: Connection, key: Key, plan: MarginPlan, rules: Rules) -> int:
    """Tell the engine of less margin, or of a higher leverage, before money moves; the seq of the last command, 0
    without one. More margin, and a lower leverage, it hears of afterwards: it never knows of more than there is."""
    row = (await lock_exposures(conn, [key]))[key]
    if row.told_leverage is None:
        return 0
    commands: list[AnyCommand] = []
    now: datetime = await conn.fetchval("SELECT now()")
    if row.leverage > row.told_leverage:
        await tell_terms(conn, {key: row.state}, {key: row}, rules)
    if plan.position_delta < ZERO:
        instrument = rules.instruments[key[1]]
        amount = margin_units(plan.position_delta, instrument.tick_size * instrument.lot_size)
        commands.append(MoveMargin(at=to_ms(now), user_id=key[0], amount=amount, after_seq=0))
    elif row.leverage <= row.told_leverage:
        return 0
    seqs = await append_commands(conn, {key[1]: commands})
    return seqs[key[1]]


def _plan_margin(
    state: Exposure, held: Decimal, amount: Decimal, mark: Decimal | None, instrument: Instrument
) -> MarginPlan:
    if mark is None or not state.signed_quantity:
        return MarginPlan(refusal="POSITION_NOT_FOUND")
    kept = margin_to_keep(state.signed_quantity, state.entry_notional, mark, state.leverage)
    if amount < 0 and held + amount < kept:
        return MarginPlan(refusal="INSUFFICIENT_MARGIN")
    return MarginPlan(amount, ZERO, instrument.quote_asset)


async def _plan_leverage(
    conn: Connection,
    key: Key,
    row: ExposureRow,
    held: Decimal,
    leverage: int,
    mark: Decimal | None,
    rules: Rules,
) -> MarginPlan:
    before, instrument = row.state, rules.instruments[key[1]]
    after = replace(before, leverage=leverage)
    allowed = min((await read_limits(conn, [key]))[key].max_leverage, instrument.max_leverage)
    if leverage > min(allowed, tier_of(after.worst_notional, rules.tiers[key[1]]).max_leverage):
        return MarginPlan(refusal="RISK_LIMIT_EXCEEDED")
    margin = held
    if mark is not None and before.signed_quantity:
        margin = releveraged_margin(
            before.signed_quantity, before.entry_notional, held, mark, before.leverage, leverage
        )
    order_margin = after.order_margin(instrument.taker_fee_rate)
    plan = MarginPlan(margin - held, order_margin - row.order_margin, instrument.quote_asset)
    budget = (await free_collateral(conn, {key[0]})).get((key[0], instrument.quote_asset), ZERO)
    if plan.position_delta + plan.order_delta > max(budget, ZERO):
        return MarginPlan(refusal="INSUFFICIENT_MARGIN")
    await conn.execute(
        "UPDATE risk.exposures SET leverage = $3, order_margin = $4, updated_at = now()"
        " WHERE user_id = $1 AND instrument_id = $2",
        *key,
        leverage,
        order_margin,
    )
    return plan


async def _fresh_mark(conn: Connection, instrument_id: str) -> Decimal | None:
    """The mark price, None while it is not live: nobody may be sure of a margin then."""
    mark = (await latest_marks(conn, [instrument_id])).get(instrument_id)
    return mark.price if mark is not None and mark.is_live else None


async def _unbooked(conn: Connection, key: Key) -> bool:
    """Whether fills of this user and instrument are not in the ledger yet: exposure and margin do not fit together."""
    return bool(
        await conn.fetchval(
            "SELECT EXISTS (SELECT FROM positions.v_fills f JOIN ledger.v_cursors c USING (instrument_id)"
            " WHERE f.user_id = $1 AND f.instrument_id = $2 AND f.seq > c.applied_seq)",
            *key,
        )
    )

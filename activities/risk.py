"""The risk service: exposures, the margin that open orders need, limits.

`exposures.order_margin` is what the orders of one user in one instrument require. Every change of it reaches the
ledger exactly once: through `freeze_funds` for a check, through `settle` for engine events, through
`unfreeze_funds` for a release.
"""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal

import asyncpg
from msgspec.structs import replace
from temporalio import activity

from activities.collateral import free_collateral
from activities.cover import Cover, read_covers, tell_covers
from activities.engine_log import EngineLog, SequencedEvent
from activities.instruments import RuleBook, Rules, read_instruments, read_tiers
from activities.market import latest_marks
from activities.matching import append_commands
from activities.unfinished import Unfinished, once_applied, read_unfinished
from domain.clock import to_ms
from domain.events import BusinessEvent, MarginPreCheckFailed, MarginPreCheckPassed
from domain.exposure import Exposure, Side
from domain.instruments import Instrument
from domain.liquidation_saga import liquidation_workflow_id
from domain.margin import Tier, margin_to_keep, releveraged_margin, tier_of
from domain.margin_changes import PLAN_MARGIN_CHANGE, MarginChange, MarginVerdict
from domain.matching import (
    Amended,
    AmendRejected,
    AnyCommand,
    Cancelled,
    Deleveraged,
    Ended,
    Expired,
    Filled,
    MoveMargin,
    Rejected,
    SetTerms,
    StateChanged,
    Trade,
    margin_units,
)
from domain.money import ZERO, plain
from domain.order_entry import NewOrder
from domain.problems import Problem
from domain.sagas import (
    APPLY_RISK_EVENTS,
    CHECK_ORDERS,
    RELEASE_ORDERS,
    Backing,
    EventRange,
    Outcome,
    Refusal,
    StepRequest,
)
from domain.steps import CheckResult, MarginMove, MarginMoves, MarginPlan, OrderMargin, settle_step
from storage import outbox
from storage.db import Connection, Pool, columns
from storage.once import advance_cursor, first_result, store_result

Key = tuple[int, str]
WAITING_MAX = 200
# How long a check, or the plan of a change, waits for settlement: less than a try of its step may take.
PATIENCE_SECONDS = 1.0
# The engine has rates in millionths.
RATE_UNITS = 1_000_000
OPPOSITE: dict[Side, Side] = {"BUY": "SELL", "SELL": "BUY"}


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of one user in one instrument (quantity in base, notional in quote)."""

    max_order_quantity: Decimal
    max_position_notional: Decimal
    max_open_orders: int
    max_leverage: int


def refusal_reason(
    after: Exposure,
    reduces: Side | None,
    quantity: Decimal,
    added_margin: Decimal,
    added_loss: Decimal,
    budget: Decimal,
    limits: Limits,
    tiers: Sequence[Tier],
) -> str | None:
    """Why an order that would lead to `after` may not go on, or None.

    `reduces` is the side of a reduce-only order, `added_margin` what the order needs of `budget`, the money its user
    has left, and `added_loss` how much of that is open loss (all quote).
    """
    if reduces is not None and not after.can_reduce(reduces):
        return "REDUCE_ONLY_REJECTED"
    if quantity > limits.max_order_quantity or after.open_orders > limits.max_open_orders:
        return "RISK_LIMIT_EXCEEDED"
    worst = after.worst_notional
    if added_margin > 0 and (
        worst > limits.max_position_notional or after.leverage > tier_of(worst, tiers).max_leverage
    ):
        return "RISK_LIMIT_EXCEEDED"
    if added_margin > max(budget, ZERO):
        return "OPEN_LOSS_NOT_COVERED" if added_margin - added_loss <= max(budget, ZERO) else "INSUFFICIENT_MARGIN"
    return None


class RiskActivities:
    """Activities on the risk service's own tables."""

    def __init__(self, pool: Pool, log: EngineLog, patience_seconds: float = PATIENCE_SECONDS) -> None:
        self._pool = pool
        self._log = log
        self._patience_seconds = patience_seconds
        self._rules = RuleBook()

    @activity.defn(name=CHECK_ORDERS)
    async def check_orders(self, request: StepRequest) -> Outcome:
        """Admit the orders that limits and money allow, one after the other, and add them to the exposures.

        Some would be refused although their users were told what settlement has not applied yet: that is waited for,
        for `PATIENCE_SECONDS`, since a timer of the workflow may go off a second late; then they are busy.
        """
        step_id = f"check:{request.step_id}"

        async def check(conn: Connection, earlier: list[EventRange] | None) -> tuple[CheckResult, Unfinished]:
            done = await first_result(conn, "risk", step_id, CheckResult)
            if done is not None:
                return done, Unfinished([])
            unfinished = await _unfinished(conn, request, earlier)
            done = await _check(conn, request, await self._rules.rules(conn), unfinished)
            await store_result(conn, "risk", step_id, done)
            return done, unfinished

        done = await once_applied(self._pool, check, self._patience_seconds)
        return Outcome([margin.order_id for margin in done.passed], done.refused, done.busy, done.backed)

    @activity.defn(name=RELEASE_ORDERS)
    async def release_orders(self, request: StepRequest) -> None:
        """Compensation of `check_orders`: take the orders out of the exposures again."""
        step_id = f"release:{request.release_id}"
        async with self._pool.acquire() as conn, conn.transaction():
            if await first_result(conn, "risk", step_id, MarginMoves) is None:
                await store_result(conn, "risk", step_id, await _release(conn, request, await self._rules.rules(conn)))

    @activity.defn(name=PLAN_MARGIN_CHANGE)
    async def plan_margin_change(self, change: MarginChange) -> MarginVerdict:
        """Decide on a change of leverage or position margin; a new leverage holds for everything checked later."""
        step_id = f"adjust:{change.change_id}"

        async def plan(conn: Connection, earlier: list[EventRange] | None) -> tuple[MarginPlan | None, Unfinished]:
            done = await first_result(conn, "risk", step_id, MarginPlan)
            if done is not None:
                return done, Unfinished([])
            done, unfinished = await _plan(conn, change, await self._rules.rules(conn), earlier)
            if done is not None:
                await store_result(conn, "risk", step_id, done)
            return done, unfinished

        done = await once_applied(self._pool, plan, self._patience_seconds)
        return MarginVerdict(is_busy=True) if done is None else MarginVerdict(done.refusal)

    @activity.defn(name=APPLY_RISK_EVENTS)
    async def apply_events(self, events: EventRange) -> list[str]:
        """Fold a range of engine events into the exposures; the margin moves are stored for the ledger.

        Answers the workflow ids of liquidations that these events are of interest to (a repeat: of any), WAITING_MAX at
        most; the others look for themselves.
        """
        async with self._pool.acquire() as conn, conn.transaction():
            if not await advance_cursor(conn, "risk", events):
                return await _waiting_liquidations(conn, None)
            log = await self._log.read(conn, events)
            moves = await _apply(conn, events, log, await self._rules.rules(conn))
            await store_result(conn, "risk", settle_step(events), moves)
            return await _waiting_liquidations(conn, users_of(log))


async def pre_check(conn: Connection, order: NewOrder) -> tuple[Decimal, str | None]:
    """The margin that `order` would need (quote) and why it would be refused, or None; as `check_orders` decides."""
    request = order.request
    key = (order.user_id, request.instrument_id)
    instrument = (await read_instruments(conn))[request.instrument_id]
    row = await conn.fetchrow("SELECT * FROM risk.exposures WHERE user_id = $1 AND instrument_id = $2", *key)
    state = Exposure(instrument.default_leverage) if row is None else _exposure(row)
    price = order.margin_price or order.bound_price
    after = state.with_order(
        request.side, request.quantity, price, loss=order.open_loss, reduce_only=request.reduce_only
    )
    added = after.order_margin(instrument.taker_fee_rate) - state.order_margin(instrument.taker_fee_rate)
    loss = after.open_loss(request.side) - state.open_loss(request.side)
    limits = (await _read_limits(conn, [key]))[key]
    tiers = (await read_tiers(conn))[request.instrument_id]
    budget = (await free_collateral(conn, {order.user_id})).get((order.user_id, instrument.quote_asset), ZERO)
    reduces = request.side if request.reduce_only else None
    if await positions_in_liquidation(conn, [key]):
        return added, "POSITION_IN_LIQUIDATION"
    mark = (await latest_marks(conn, [request.instrument_id])).get(request.instrument_id)
    if reduces is None and after.opens(request.side) and not (mark and mark.is_live):
        return added, "MARK_PRICE_UNAVAILABLE"
    return added, refusal_reason(after, reduces, request.quantity, added, loss, budget, limits, tiers)


async def lock_exposures(conn: Connection, keys: Sequence[Key]) -> None:
    """Wait for every check of these (user, instrument) and keep new ones out until the caller's transaction ends."""
    await _lock(conn, keys)


async def take_in_liquidation_order(
    conn: Connection, user_id: int, instrument_id: str, side: Side, quantity: Decimal, bound_price: Decimal
) -> None:
    """Count a liquidation order among the open ones, in the caller's transaction; it needs no margin and no leave."""
    key = (user_id, instrument_id)
    row = (await _lock(conn, [key]))[key]
    after = _exposure(row).with_order(side, quantity, bound_price, reduce_only=True)
    await _save(conn, {key: (after, row["order_margin"])})


async def _waiting_liquidations(conn: Connection, users: set[int] | None) -> list[str]:
    rows = await conn.fetch(
        "SELECT position_id, liquidation_id FROM risk.liquidation_queue"
        " WHERE status IN ('PENDING', 'PROCESSING') AND ($1::bigint[] IS NULL OR user_id = ANY($1))"
        " ORDER BY liquidation_id LIMIT $2",
        None if users is None else list(users),
        WAITING_MAX,
    )
    return [liquidation_workflow_id(*row) for row in rows]


async def positions_in_liquidation(conn: Connection, keys: Sequence[Key]) -> set[Key]:
    """Those of `keys` (user, instrument) that are the liquidation's: of a cross account, all that is cross."""
    rows = await conn.fetch(
        "SELECT k.user_id, k.instrument_id FROM unnest($1::bigint[], $2::text[]) AS k (user_id, instrument_id)"
        " WHERE EXISTS (SELECT FROM risk.liquidation_queue q WHERE q.user_id = k.user_id"
        "  AND q.status IN ('PENDING', 'PROCESSING') AND (q.instrument_id = k.instrument_id"
        "   OR q.margin_mode = 'CROSS' AND EXISTS (SELECT FROM risk.exposures e WHERE e.user_id = k.user_id"
        "      AND e.instrument_id = k.instrument_id AND e.margin_mode = 'CROSS')))",
        *columns(keys, 2),
    )
    return {(row["user_id"], row["instrument_id"]) for row in rows}


async def set_margin_mode(conn: Connection, user_id: int, instrument: Instrument, mode: str) -> None:
    """ISOLATED or CROSS for a user's future positions, in the caller's transaction.

    Raises Problem MARGIN_MODE_NOT_CHANGEABLE while there is a position or an open order.
    """
    await _create_missing(conn, [(user_id, instrument.instrument_id)], {instrument.instrument_id: instrument})
    changed = await conn.fetchval(
        "UPDATE risk.exposures SET margin_mode = $3, updated_at = now() WHERE user_id = $1 AND instrument_id = $2"
        " AND (margin_mode = $3 OR (signed_quantity = 0 AND open_orders = 0 AND bid_quantity = 0 AND ask_quantity = 0"
        "   AND bid_notional = 0 AND ask_notional = 0)) RETURNING TRUE",
        user_id,
        instrument.instrument_id,
        mode,
    )
    if not changed:
        raise Problem("MARGIN_MODE_NOT_CHANGEABLE", "Close the position and cancel the open orders first")


async def _plan(
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
    await _create_missing(conn, [key], rules.instruments)
    exposures = await _lock(conn, [key])
    if await positions_in_liquidation(conn, [key]):
        return MarginPlan(refusal="POSITION_IN_LIQUIDATION")
    if await _unfrozen(conn, exposures) or await _unbooked(conn, key):
        return None
    row, state = exposures[key], _exposure(exposures[key])
    held, version = await _position_margin(conn, *key)
    mark = await _fresh_mark(conn, change.instrument_id)
    if mark is None and state.signed_quantity:
        return MarginPlan(refusal="MARK_PRICE_UNAVAILABLE")
    if change.kind == "MARGIN":
        if row["margin_mode"] == "CROSS":
            return MarginPlan(refusal="POSITION_IS_CROSS")
        plan = _plan_margin(state, held, Decimal(change.value), mark, instrument)
        if plan.position_delta > max(ZERO, (await free_collateral(conn, [key[0]])).get((key[0], plan.asset), ZERO)):
            plan = MarginPlan(refusal="INSUFFICIENT_FUNDS")
    else:
        plan = await _plan_leverage(conn, key, row, held, int(change.value), mark, rules)
        if plan.refusal is None:
            # Until the ledger has moved the margin, no other order is netted against it (see `_unfrozen`).
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
    row = (await _lock(conn, [key]))[key]
    if row["told_leverage"] is None:
        return 0
    commands: list[AnyCommand] = []
    now: datetime = await conn.fetchval("SELECT now()")
    if row["leverage"] > row["told_leverage"]:
        await _tell_terms(conn, {key: _exposure(row)}, {key: row}, rules)
    if plan.position_delta < ZERO:
        instrument = rules.instruments[key[1]]
        amount = margin_units(plan.position_delta, instrument.tick_size * instrument.lot_size)
        commands.append(MoveMargin(at=to_ms(now), user_id=key[0], amount=amount, after_seq=0))
    elif row["leverage"] <= row["told_leverage"]:
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
    row: asyncpg.Record,
    held: Decimal,
    leverage: int,
    mark: Decimal | None,
    rules: Rules,
) -> MarginPlan:
    before, instrument = _exposure(row), rules.instruments[key[1]]
    after = replace(before, leverage=leverage)
    allowed = min((await _read_limits(conn, [key]))[key].max_leverage, instrument.max_leverage)
    if leverage > min(allowed, tier_of(after.worst_notional, rules.tiers[key[1]]).max_leverage):
        return MarginPlan(refusal="RISK_LIMIT_EXCEEDED")
    margin = held
    if mark is not None and before.signed_quantity:
        margin = releveraged_margin(
            before.signed_quantity, before.entry_notional, held, mark, before.leverage, leverage
        )
    order_margin = after.order_margin(instrument.taker_fee_rate)
    plan = MarginPlan(margin - held, order_margin - row["order_margin"], instrument.quote_asset)
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


async def _position_margin(conn: Connection, user_id: int, instrument_id: str) -> tuple[Decimal, int]:
    """What the ledger holds behind a position, and which version of it this is."""
    held = await conn.fetchrow(
        "SELECT position_margin, margin_version FROM ledger.v_margin_holds WHERE user_id = $1 AND instrument_id = $2",
        user_id,
        instrument_id,
    )
    return (held[0], held[1]) if held else (ZERO, 0)


async def _unbooked(conn: Connection, key: Key) -> bool:
    """Whether fills of this user and instrument are not in the ledger yet: exposure and margin do not fit together."""
    return bool(
        await conn.fetchval(
            "SELECT EXISTS (SELECT FROM positions.v_fills f JOIN ledger.v_cursors c USING (instrument_id)"
            " WHERE f.user_id = $1 AND f.instrument_id = $2 AND f.seq > c.applied_seq)",
            *key,
        )
    )


async def _check(conn: Connection, request: StepRequest, rules: Rules, unfinished: Unfinished) -> CheckResult:
    orders = await _read_claims(conn, request.order_ids)
    instruments, tiers = rules.instruments, rules.tiers
    keys = sorted({(row["user_id"], row["instrument_id"]) for row in orders})
    unfinished.user_ids = frozenset(key[0] for key in keys)
    await _create_missing(conn, keys, instruments)
    exposures = await _lock(conn, keys)
    # After the locks: a liquidation that came first is seen, one that comes later sees these orders.
    taken_over = await positions_in_liquidation(conn, keys)
    waiting = await _unfrozen(conn, exposures)
    limits = await _read_limits(conn, keys)
    budgets = await free_collateral(conn, {key[0] for key in keys})
    spent, losses = defaultdict[Key, Decimal](Decimal), defaultdict[Key, Decimal](Decimal)
    marks = await latest_marks(conn, sorted({key[1] for key in keys}))

    states, margins = _current(exposures)
    done = CheckResult([], [], [], unfinished.ranges, [])
    for order in orders:
        key = (order["user_id"], order["instrument_id"])
        if key in taken_over:
            done.refused.append(Refusal(order["order_id"], "POSITION_IN_LIQUIDATION"))
            continue
        if key in waiting:
            done.busy.append(order["order_id"])
            continue
        instrument = instruments[key[1]]
        purse = (key[0], instrument.quote_asset)
        side = order["side"]
        after = states[key].with_claim(side, order["quantity"], order["notional"], order["orders"], order["loss"])
        margin = after.order_margin(instrument.taker_fee_rate)
        added, loss = margin - margins[key], after.open_loss(side) - states[key].open_loss(side)
        budget = budgets.get(purse, ZERO)
        reduces = side if order["reduce_only"] else None
        reason = refusal_reason(after, reduces, order["open_quantity"], added, loss, budget, limits[key], tiers[key[1]])
        if reduces is None and after.opens(side) and not (key[1] in marks and marks[key[1]].is_live):
            reason = "MARK_PRICE_UNAVAILABLE"
        if reason:
            if await unfinished.has(conn, key[0]):
                # What it is judged by may lack what its user was told. Their later orders wait behind it.
                done.busy.append(order["order_id"])
                waiting.update(other for other in keys if other[0] == key[0])
            else:
                done.refused.append(Refusal(order["order_id"], reason))
            continue
        opening = after.opening(side) - states[key].opening(side)
        if opening < order["quantity"]:
            done.backed.append(Backing(order["order_id"], instrument.quantity_to_lots(opening) if opening else 0))
        states[key], margins[key], budgets[purse] = after, margin, budget - added
        spent[key], losses[key] = spent[key] + added, losses[key] + loss
        done.passed.append(OrderMargin(order["order_id"], *key, instrument.quote_asset, added))

    touched = {(margin.user_id, margin.instrument_id) for margin in done.passed}
    await _tell_terms(conn, {key: states[key] for key in touched}, exposures, rules)
    await _tell_covers(conn, {key for key in touched if states[key].cross}, spent, losses)
    await _save(conn, {key: (states[key], margins[key]) for key in touched}, pending_step=request.step_id)
    await outbox.emit(conn, _verdicts(done.passed, done.refused))
    return done


def _verdicts(passed: Sequence[OrderMargin], refused: Sequence[Refusal]) -> list[BusinessEvent]:
    taken = [MarginPreCheckPassed(m.order_id, plain(m.amount)) for m in passed]
    return [*taken, *(MarginPreCheckFailed(r.order_id, r.reason) for r in refused)]


async def _unfinished(conn: Connection, request: StepRequest, earlier: list[EventRange] | None) -> Unfinished:
    """What users may have been told before they sent these orders: nothing after the first look of the first round."""
    if earlier is None and request.round > 1:
        first = StepRequest(request.saga_id, 1, [])
        checked = await first_result(conn, "risk", f"check:{first.step_id}", CheckResult)
        earlier = checked.unfinished if checked else None
    return await read_unfinished(conn, [], earlier)


async def _tell_terms(
    conn: Connection, states: Mapping[Key, Exposure], rows: Mapping[Key, asyncpg.Record], rules: Rules
) -> None:
    """Tell the engine on which terms it has to guard the fills of these users, where it knows others.

    They are in its log before the orders that are checked now, as these come later; and whoever changes terms holds
    the exposure's lock, so that the log has them in the order in which they were decided.
    """
    commands: defaultdict[str, list[AnyCommand]] = defaultdict(list)
    told = []
    lower = [key for key, state in states.items() if state.leverage < (rows[key]["told_leverage"] or 0)]
    uncovered = await _uncovered(conn, lower)
    for key, state in sorted(states.items()):
        row = rows[key]
        leverage = row["told_leverage"] if key in uncovered else state.leverage
        rate = tier_of(state.worst_notional, rules.tiers[key[1]]).maintenance_margin_rate
        maintenance = -int(-rate * RATE_UNITS // 1)
        if (row["told_leverage"], row["told_maintenance"], row["told_mode"]) == (
            leverage,
            maintenance,
            row["margin_mode"],
        ):
            continue
        bankruptcy = 0
        if row["told_leverage"] is None and state.signed_quantity:
            bankruptcy = await _bankruptcy(conn, key, state, rules.instruments[key[1]])
        commands[key[1]].append(
            SetTerms(
                at=to_ms(await conn.fetchval("SELECT now()")),
                user_id=key[0],
                leverage=leverage,
                maintenance=maintenance,
                cross=state.cross,
                bankruptcy=bankruptcy,
            )
        )
        told.append((*key, leverage, maintenance, row["margin_mode"]))
    if not told:
        return
    await conn.execute(
        "UPDATE risk.exposures e SET told_leverage = n.leverage, told_maintenance = n.maintenance, told_mode = n.mode"
        " FROM unnest($1::bigint[], $2::text[], $3::int[], $4::int[], $5::text[])"
        " AS n (user_id, instrument_id, leverage, maintenance, mode)"
        " WHERE e.user_id = n.user_id AND e.instrument_id = n.instrument_id",
        *columns(told, 5),
    )
    await append_commands(conn, commands)


async def _uncovered(conn: Connection, keys: Collection[Key]) -> set[Key]:
    """Those of `keys` whose orders lack margin and are about to be cancelled: a lower leverage, with more margin, is
    not told for these."""
    if not keys:
        return set()
    rows = await conn.fetch(
        "SELECT user_id, instrument_id FROM ledger.v_margin_holds JOIN unnest($1::bigint[], $2::text[])"
        " AS k (user_id, instrument_id) USING (user_id, instrument_id) WHERE order_short > 0",
        *columns(sorted(keys), 2),
    )
    return {(row["user_id"], row["instrument_id"]) for row in rows}


async def _tell_covers(
    conn: Connection, keys: Collection[Key], spent: Mapping[Key, Decimal], losses: Mapping[Key, Decimal]
) -> None:
    """Tell the engine what covers these cross positions, once the checked orders hold their money: what is `spent` for
    other instruments goes, and for their own the open loss (quote)."""
    if not keys:
        return
    covers = await read_covers(conn, {user_id for user_id, _ in keys})
    told = {}
    for key in keys:
        elsewhere = sum((amount for other, amount in spent.items() if other[0] == key[0] and other != key), ZERO)
        told[key] = covers[key].less(elsewhere + losses.get(key, ZERO))
    await _tell(conn, told)


async def tell_lower_covers(conn: Connection) -> int:
    """Tell the engine of all cross accounts that have less than it knows and open orders; how many positions."""
    rows = await conn.fetch(
        "SELECT user_id, instrument_id FROM risk.exposures WHERE told_cover IS NOT NULL AND open_orders > 0"
    )
    if not rows:
        return 0
    keys = [(row["user_id"], row["instrument_id"]) for row in rows]
    async with conn.transaction():
        await _lock(conn, keys)
        known = await read_covers(conn, {user_id for user_id, _ in keys})
        covers = {key: known[key] for key in keys if key in known}
        lower = {key: cover for key, cover in covers.items() if cover.told is not None and cover.amount < cover.told}
        await _tell(conn, lower)
    return len(lower)


async def _tell(conn: Connection, covers: Mapping[Key, Cover]) -> None:
    await tell_covers(conn, covers)
    await conn.execute(
        "UPDATE risk.exposures e SET told_cover = n.amount FROM unnest($1::bigint[], $2::text[], $3::numeric[])"
        " AS n (user_id, instrument_id, amount) WHERE e.user_id = n.user_id AND e.instrument_id = n.instrument_id",
        *columns([(*key, cover.amount) for key, cover in covers.items()], 3),
    )


async def _bankruptcy(conn: Connection, key: Key, state: Exposure, instrument: Instrument) -> int:
    """The bankruptcy price (millionths of a tick, rounded against the user) of a position that was opened before the
    engine knew terms of its user."""
    margin, _ = await _position_margin(conn, *key)
    is_long = state.signed_quantity > 0
    backing = state.entry_notional - margin if is_long else state.entry_notional + margin
    price = backing / abs(state.signed_quantity) / instrument.tick_size * RATE_UNITS
    return max(0, int(price.to_integral_value(ROUND_CEILING if is_long else ROUND_FLOOR)))


async def _release(conn: Connection, request: StepRequest, rules: Rules) -> MarginMoves:
    orders = await _read_claims(conn, request.order_ids)
    instruments = rules.instruments
    checked = await first_result(conn, "risk", f"check:{request.step_id}", CheckResult)
    assert checked is not None, f"Expected the check of {request.step_id}, was none"
    # All that the check touched, in the one order of locking: the neighbours of what is released wait for this, too.
    step_keys = sorted({(margin.user_id, margin.instrument_id) for margin in checked.passed})
    exposures = await _lock(conn, step_keys)
    released = {(row["user_id"], row["instrument_id"]) for row in orders}
    states = {key: _exposure(exposures[key]) for key in sorted(released)}
    margins = {key: row["order_margin"] for key, row in exposures.items()}
    ended = []
    for order in orders:
        key = (order["user_id"], order["instrument_id"])
        instrument = instruments[key[1]]
        states[key] = _without_claim(states[key], order)
        margin = states[key].order_margin(instrument.taker_fee_rate)
        ended.append(OrderMargin(order["order_id"], *key, instrument.quote_asset, margins[key] - margin))
        margins[key] = margin
    await _save(conn, {key: (states[key], margins[key]) for key in states}, pending_step=None)
    await conn.execute(
        "UPDATE risk.exposures SET pending_step = NULL WHERE pending_step = $1"
        " AND (user_id, instrument_id) IN (SELECT * FROM unnest($2::bigint[], $3::text[]))",
        request.step_id,
        *columns(step_keys, 2),
    )
    return MarginMoves(_moves(exposures, margins, instruments), ended)


def _current(rows: Mapping[Key, asyncpg.Record]) -> tuple[dict[Key, Exposure], dict[Key, Decimal]]:
    """Exposures, and the margin that their orders need, by user and instrument."""
    return {key: _exposure(row) for key, row in rows.items()}, {key: row["order_margin"] for key, row in rows.items()}


async def _apply(conn: Connection, events: EventRange, log: list[SequencedEvent], rules: Rules) -> MarginMoves:
    instrument_id = events.instrument_id
    instruments = rules.instruments
    instrument = instruments[instrument_id]
    fills = {
        (row["seq"], row["role"]): row
        for row in await conn.fetch(
            "SELECT seq, role, user_id, signed_quantity_after, entry_notional_after FROM positions.v_fills"
            " WHERE instrument_id = $1 AND seq > $2 AND seq <= $3",
            instrument_id,
            events.after_seq,
            events.to_seq,
        )
    }
    amendments = [event.amendment_id for _, event in log if isinstance(event, Amended | AmendRejected)]
    claims = {row["order_id"]: row for row in await _read_claims(conn, [id_ for id_ in amendments if id_])}
    exposures = await _lock(conn, [(user_id, instrument_id) for user_id in sorted(users_of(log))])
    states = {key: _exposure(row) for key, row in exposures.items()}
    margins = {key: row["order_margin"] for key, row in exposures.items()}
    ended: list[OrderMargin] = []
    for seq, event in log:
        match event:
            case Trade() | Deleveraged():
                if isinstance(event, Trade):
                    states.update(_with_fills(states, event, instrument))
                for fill in (fills[seq, "MAKER"], fills[seq, "TAKER"]):
                    key = (fill["user_id"], instrument_id)
                    states[key] = states[key].with_position(fill["signed_quantity_after"], fill["entry_notional_after"])
            case Filled():
                key = (event.user_id, instrument_id)
                states[key] = states[key].with_order_closed()
            case Cancelled() | Expired() | Rejected():
                key = (event.user_id, instrument_id)
                before = states[key].order_margin(instrument.taker_fee_rate)
                states[key] = _without(states[key], event, instrument)
                freed = before - states[key].order_margin(instrument.taker_fee_rate)
                ended.append(OrderMargin(event.order_id, *key, instrument.quote_asset, freed))
            case Amended() | AmendRejected():
                key = (event.user_id, instrument_id)
                before = states[key].order_margin(instrument.taker_fee_rate)
                if isinstance(event, Amended) and not event.reduce_only:
                    states[key] = _amended(states[key], event, instrument)
                if event.amendment_id:
                    states[key] = _without_claim(states[key], claims[event.amendment_id])
                    # Nothing more is needed than both together needed before.
                    freed = before - states[key].order_margin(instrument.taker_fee_rate)
                    ended.append(OrderMargin(event.amendment_id, *key, instrument.quote_asset, freed))
            case _:
                pass
    for key, state in states.items():
        margins[key] = state.order_margin(instrument.taker_fee_rate)
    await _save(conn, {key: (states[key], margins[key]) for key in states})
    return MarginMoves(_moves(exposures, margins, instruments), ended)


def _with_fills(states: dict[Key, Exposure], trade: Trade, instrument: Instrument) -> dict[Key, Exposure]:
    """The exposures of maker and taker when less of their orders is open; reduce-only orders count for nothing."""
    quantity, changed = instrument.lots_to_quantity(trade.quantity), {}
    price, loss = instrument.ticks_to_price, instrument.ticks_to_price
    if not trade.maker_reduce_only:
        key = (trade.maker_user_id, instrument.instrument_id)
        basis = price(trade.maker_basis or trade.price)
        changed[key] = states[key].with_fill(OPPOSITE[trade.taker_side], quantity, basis, loss(trade.maker_loss))
    if not trade.taker_reduce_only:
        key = (trade.taker_user_id, instrument.instrument_id)
        basis = price(trade.taker_basis or trade.taker_price)
        changed[key] = states[key].with_fill(trade.taker_side, quantity, basis, loss(trade.taker_loss))
    return changed


def _without_claim(state: Exposure, claim: asyncpg.Record) -> Exposure:
    return state.with_claim(claim["side"], -claim["quantity"], -claim["notional"], -claim["orders"], -claim["loss"])


def _amended(state: Exposure, event: Amended, instrument: Instrument) -> Exposure:
    price, quantity = instrument.ticks_to_price, instrument.lots_to_quantity
    without = state.without_order(
        event.side,
        quantity(event.old_quantity),
        price(event.old_basis or event.old_price),
        loss=price(event.old_loss),
    )
    return without.with_order(
        event.side, quantity(event.quantity), price(event.basis or event.price), loss=price(event.loss)
    )


def _without(state: Exposure, event: Ended, instrument: Instrument) -> Exposure:
    return state.without_order(
        event.side,
        instrument.lots_to_quantity(event.quantity),
        instrument.ticks_to_price(event.basis or event.price),
        loss=instrument.ticks_to_price(event.loss),
        reduce_only=event.reduce_only,
    )


def users_of(log: list[SequencedEvent]) -> set[int]:
    """Everybody whose orders or position a range of engine events touches."""
    users = set()
    for _, event in log:
        if isinstance(event, Trade):
            users.add(event.maker_user_id)
            users.add(event.taker_user_id)
        elif not isinstance(event, StateChanged):
            users.add(event.user_id)
            if isinstance(event, Deleveraged):
                users.add(event.counterparty_user_id)
    return users


def _moves(
    before: dict[Key, asyncpg.Record], margins: dict[Key, Decimal], instruments: dict[str, Instrument]
) -> list[MarginMove]:
    return [
        MarginMove(*key, instruments[key[1]].quote_asset, margins[key] - row["order_margin"])
        for key, row in before.items()
        if margins[key] != row["order_margin"]
    ]


async def _read_claims(conn: Connection, ids: Sequence[int]) -> list[asyncpg.Record]:
    """What orders and amendments claim, in order of their ids."""
    if not ids:
        return []
    rows: list[asyncpg.Record] = await conn.fetch(
        "SELECT order_id, user_id, instrument_id, side, open_quantity, quantity, notional, orders, loss, reduce_only"
        " FROM orders.v_claims WHERE order_id = ANY($1) ORDER BY order_id",
        ids,
    )
    return rows


async def _create_missing(conn: Connection, keys: Sequence[Key], instruments: dict[str, Instrument]) -> None:
    rows = [(user_id, name, instruments[name].default_leverage) for user_id, name in keys]
    await conn.execute(
        "INSERT INTO risk.exposures (user_id, instrument_id, leverage)"
        " SELECT * FROM unnest($1::bigint[], $2::text[], $3::int[]) ON CONFLICT DO NOTHING",
        *columns(rows, 3),
    )


async def _lock(conn: Connection, keys: Sequence[Key]) -> dict[Key, asyncpg.Record]:
    """The exposures of `keys`, locked in (user, instrument) order so that no two transactions wait for each other."""
    rows = await conn.fetch(
        "SELECT e.* FROM risk.exposures e JOIN unnest($1::bigint[], $2::text[]) AS k (user_id, instrument_id)"
        " USING (user_id, instrument_id) ORDER BY e.user_id, e.instrument_id FOR UPDATE OF e",
        *columns(keys, 2),
    )
    return {(row["user_id"], row["instrument_id"]): row for row in rows}


async def _unfrozen(conn: Connection, exposures: dict[Key, asyncpg.Record]) -> set[Key]:
    """Keys whose last check the ledger does not hold in full yet; a new order must not be netted against it."""
    pending = {key: row["pending_step"] for key, row in exposures.items() if row["pending_step"]}
    if not pending:
        return set()
    frozen = await conn.fetch(
        "SELECT step_id FROM ledger.v_steps WHERE step_id = ANY($1) AND (result -> 'refused')::text = '[]'",
        [f"freeze:{step}" for step in set(pending.values())],
    )
    held = {row["step_id"].removeprefix("freeze:") for row in frozen}
    return {key for key, step in pending.items() if step not in held}


async def _read_limits(conn: Connection, keys: Sequence[Key]) -> dict[Key, Limits]:
    rows = await conn.fetch(
        "SELECT user_id, instrument_id, max_order_quantity, max_position_notional, max_open_orders, max_leverage"
        " FROM risk.risk_limits WHERE instrument_id = ANY($1) AND (user_id IS NULL OR user_id = ANY($2))",
        list({key[1] for key in keys}),
        list({key[0] for key in keys}),
    )
    found = {(row["user_id"], row["instrument_id"]): Limits(*row[2:]) for row in rows}
    return {key: found.get(key) or found[None, key[1]] for key in keys}


def _exposure(row: asyncpg.Record) -> Exposure:
    return Exposure(
        row["leverage"],
        row["signed_quantity"],
        row["entry_notional"],
        row["bid_quantity"],
        row["bid_notional"],
        row["ask_quantity"],
        row["ask_notional"],
        row["open_orders"],
        row["bid_loss"],
        row["ask_loss"],
        row["margin_mode"] == "CROSS",
    )


async def _save(
    conn: Connection, changed: dict[Key, tuple[Exposure, Decimal]], pending_step: str | None = None
) -> None:
    rows = [
        (
            *key,
            e.signed_quantity,
            e.entry_notional,
            e.bid_quantity,
            e.bid_notional,
            e.ask_quantity,
            e.ask_notional,
            e.open_orders,
            margin,
            e.bid_loss,
            e.ask_loss,
        )
        for key, (e, margin) in changed.items()
    ]
    await conn.execute(
        "UPDATE risk.exposures e SET signed_quantity = n.signed_quantity, entry_notional = n.entry_notional,"
        " bid_quantity = n.bid_quantity, bid_notional = n.bid_notional, ask_quantity = n.ask_quantity,"
        " ask_notional = n.ask_notional, open_orders = n.open_orders, order_margin = n.order_margin,"
        " bid_loss = n.bid_loss, ask_loss = n.ask_loss,"
        " pending_step = coalesce($13, e.pending_step), updated_at = now()"
        " FROM unnest($1::bigint[], $2::text[], $3::numeric[], $4::numeric[], $5::numeric[], $6::numeric[],"
        " $7::numeric[], $8::numeric[], $9::int[], $10::numeric[], $11::numeric[], $12::numeric[])"
        " AS n (user_id, instrument_id, signed_quantity, entry_notional, bid_quantity, bid_notional, ask_quantity,"
        " ask_notional, open_orders, order_margin, bid_loss, ask_loss)"
        " WHERE e.user_id = n.user_id AND e.instrument_id = n.instrument_id",
        *columns(rows, 12),
        pending_step,
    )

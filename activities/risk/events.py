"""What engine events and releases do to exposures."""

from decimal import Decimal

from activities.matching.engine_log import SequencedEvent
from activities.matching.instruments import Rules
from activities.risk.exposures import lock_exposures, read_claims, save_exposures, without_claim
from activities.risk.rows import ExposureRow, Key
from domain.exposure import OPPOSITE, Exposure
from domain.instruments import Instrument
from domain.liquidation_saga import liquidation_workflow_id
from domain.matching import (
    Amended,
    AmendRejected,
    Cancelled,
    Deleveraged,
    Ended,
    Expired,
    Filled,
    Rejected,
    StateChanged,
    Trade,
)
from domain.sagas import EventRange, StepRequest
from domain.steps import CheckResult, MarginMove, MarginMoves, OrderMargin
from storage.db import Connection, columns
from storage.once import first_result

WAITING_MAX = 200


async def waiting_liquidations(conn: Connection, users: set[int] | None) -> list[str]:
    """Workflow ids of open liquidations of these users (None: of everybody), WAITING_MAX at most."""
    rows = await conn.fetch(
        "SELECT position_id, liquidation_id FROM risk.liquidation_queue"
        " WHERE status IN ('PENDING', 'PROCESSING') AND ($1::bigint[] IS NULL OR user_id = ANY($1))"
        " ORDER BY liquidation_id LIMIT $2",
        None if users is None else list(users),
        WAITING_MAX,
    )
    return [liquidation_workflow_id(*row) for row in rows]


async def release_claims(conn: Connection, request: StepRequest, rules: Rules) -> MarginMoves:
    """Take the orders of a step out of the exposures; what of their margin the ledger has to give back."""
    orders = await read_claims(conn, request.order_ids)
    instruments = rules.instruments
    checked = await first_result(conn, "risk", f"check:{request.step_id}", CheckResult)
    assert checked is not None, f"Expected the check of {request.step_id}, was none"
    # All that the check touched, in the one order of locking: the neighbours of what is released wait for this, too.
    step_keys = sorted({(margin.user_id, margin.instrument_id) for margin in checked.passed})
    exposures = await lock_exposures(conn, step_keys)
    released = {row.key for row in orders}
    states = {key: exposures[key].state for key in sorted(released)}
    margins = {key: row.order_margin for key, row in exposures.items()}
    ended = []
    for order in orders:
        key = order.key
        instrument = instruments[key[1]]
        states[key] = without_claim(states[key], order)
        margin = states[key].order_margin(instrument.taker_fee_rate)
        ended.append(OrderMargin(order.order_id, *key, instrument.quote_asset, margins[key] - margin))
        margins[key] = margin
    await save_exposures(conn, {key: (states[key], margins[key]) for key in states}, pending_step=None)
    await conn.execute(
        "UPDATE risk.exposures SET pending_step = NULL WHERE pending_step = $1"
        " AND (user_id, instrument_id) IN (SELECT * FROM unnest($2::bigint[], $3::text[]))",
        request.step_id,
        *columns(step_keys, 2),
    )
    return MarginMoves(_moves(exposures, margins, instruments), ended)


async def apply_range(conn: Connection, events: EventRange, log: list[SequencedEvent], rules: Rules) -> MarginMoves:
    """Fold engine events into the exposures; what margin the ledger has to hold more or less for orders."""
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
    claims = {row.order_id: row for row in await read_claims(conn, [id_ for id_ in amendments if id_])}
    exposures = await lock_exposures(conn, [(user_id, instrument_id) for user_id in sorted(users_of(log))])
    states = {key: row.state for key, row in exposures.items()}
    margins = {key: row.order_margin for key, row in exposures.items()}
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
                    states[key] = without_claim(states[key], claims[event.amendment_id])
                    # Nothing more is needed than both together needed before.
                    freed = before - states[key].order_margin(instrument.taker_fee_rate)
                    ended.append(OrderMargin(event.amendment_id, *key, instrument.quote_asset, freed))
            case _:
                pass
    for key, state in states.items():
        margins[key] = state.order_margin(instrument.taker_fee_rate)
    await save_exposures(conn, {key: (states[key], margins[key]) for key in states})
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
    before: dict[Key, ExposureRow], margins: dict[Key, Decimal], instruments: dict[str, Instrument]
) -> list[MarginMove]:
    return [
        MarginMove(*key, instruments[key[1]].quote_asset, margins[key] - row.order_margin)
        for key, row in before.items()
        if margins[key] != row.order_margin
    ]

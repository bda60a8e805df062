"""The end of placements: orders and amendments go to the engine's log, or fail with a reason."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from decimal import Decimal

from activities.matching.steps import append_commands
from activities.orders.commands import ALL_BACKED, amend_command, new_command
from activities.orders.outcomes import end_amendments, others
from activities.orders.rows import AmendmentRow, EndedRow, OrderRow
from activities.orders.views import order_pushes
from domain.events import BusinessEvent, OrderAmendRequested, OrderCreated
from domain.instruments import Instrument
from domain.matching import AnyCommand, Side
from domain.money import plain
from domain.sagas import Acceptance
from storage import outbox
from storage.db import Connection
from storage.rows import batch, column_list, read, unnest


async def submit_liquidation_order(
    conn: Connection, user_id: int, instrument: Instrument, side: Side, quantity: Decimal, bound_price: Decimal
) -> int:
    """Insert a liquidation order, accepted, and append it to the engine's log in the caller's transaction.

    MARKET, reduce-only, at `bound_price` or better. Answers the seq of its command. No other order of the user is in
    its way: one that still is ends.
    """
    order_id = await conn.fetchval("SELECT nextval('orders.order_id_seq')")
    record = await conn.fetchrow(
        "INSERT INTO orders.orders (order_id, user_id, instrument_id, side, type, time_in_force, bound_price, quantity,"
        " stp_mode, reduce_only, is_liquidation, status)"
        " VALUES ($1, $2, $3, $4, 'MARKET', 'IOC', $5, $6, 'EXPIRE_MAKER', TRUE, TRUE, 'ACCEPTED')"
        f" RETURNING {column_list(OrderRow)}",
        order_id,
        user_id,
        instrument.instrument_id,
        side,
        bound_price,
        quantity,
    )
    assert record is not None
    row = OrderRow(*record)
    await outbox.emit(conn, [_created_event(row)], order_pushes([row]))
    seqs = await append_commands(conn, {instrument.instrument_id: [new_command(row, instrument)]})
    return seqs[instrument.instrument_id]


async def accept_batch(conn: Connection, acceptance: Acceptance, instruments: Mapping[str, Instrument]) -> None:
    """Orders and amendments that passed become ACCEPTED and go to the engine's log, in order of their ids."""
    order_ids, backed = acceptance.passed, {backing.order_id: backing.lots for backing in acceptance.backed}
    records = await conn.fetch(
        "UPDATE orders.orders SET status = 'ACCEPTED', updated_at = now()"
        f" WHERE order_id = ANY($1) AND status = 'PENDING' RETURNING {column_list(OrderRow)}",
        order_ids,
    )
    rows = sorted(read(OrderRow, records), key=lambda row: row.order_id)
    commands: defaultdict[str, list[AnyCommand]] = defaultdict(list)
    events: list[BusinessEvent] = []
    for row in rows:
        instrument = instruments[row.instrument_id]
        commands[row.instrument_id].append(new_command(row, instrument, backed.get(row.order_id, ALL_BACKED)))
        events.append(_created_event(row))
    for change in await _accept_amendments(conn, others(order_ids, rows)):
        instrument = instruments[change.instrument_id]
        lots = backed.get(change.amendment_id, ALL_BACKED)
        commands[change.instrument_id].append(amend_command(change, instrument, lots))
        events.append(_amend_requested_event(change))
    await outbox.emit(conn, events)
    await append_commands(conn, commands)


def _created_event(row: OrderRow) -> OrderCreated:
    return OrderCreated(
        order_id=row.order_id,
        user_id=str(row.user_id),
        instrument_id=row.instrument_id,
        side=row.side,
        type=row.type,
        price=None if row.price is None else plain(row.price),
        quantity=plain(row.quantity),
        is_liquidation=row.is_liquidation,
    )


def _amend_requested_event(row: AmendmentRow) -> OrderAmendRequested:
    return OrderAmendRequested(
        order_id=row.order_id,
        amendment_id=row.amendment_id,
        price=None if row.price is None else plain(row.price),
        quantity=None if row.quantity is None else plain(row.quantity),
    )


async def _accept_amendments(conn: Connection, amendment_ids: Sequence[int]) -> list[AmendmentRow]:
    if not amendment_ids:
        return []
    rows = await conn.fetch(
        "UPDATE orders.amendments SET status = 'ACCEPTED', updated_at = now()"
        f" WHERE amendment_id = ANY($1) AND status = 'PENDING' RETURNING {column_list(AmendmentRow)}",
        amendment_ids,
    )
    return sorted(read(AmendmentRow, rows), key=lambda row: row.amendment_id)


async def fail_batch(conn: Connection, acceptance: Acceptance) -> None:
    """Orders and amendments that were refused become FAILED with the reason, and their users are told."""
    ends = {refusal.order_id: EndedRow(refusal.order_id, "FAILED", refusal.reason) for refusal in acceptance.refused}
    records = await conn.fetch(
        "UPDATE orders.orders SET status = n.final, failure_reason = n.reason, updated_at = now()"
        f" FROM {unnest(EndedRow)} WHERE order_id = n.id AND status = 'PENDING' RETURNING {column_list(OrderRow)}",
        *batch(EndedRow, list(ends.values())),
    )
    rows = read(OrderRow, records)
    amendments = await end_amendments(conn, [ends[id_] for id_ in others(ends, rows)], "PENDING")
    await outbox.emit(conn, pushes=order_pushes(rows) + amendments)

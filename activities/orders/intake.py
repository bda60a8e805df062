"""Taking orders and amendments in: one transaction writes a batch as PENDING, with its saga and its events."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from activities.orders.rows import IN_ENGINE_STATUSES, OrderRow, TakenInAmendmentRow, TakenInRow
from activities.orders.sagas import Saga, record_saga
from domain.events import OrderSubmitted
from domain.money import plain
from domain.order_entry import Amendment, NewOrder, OpenOrder, OrderRequest
from domain.sagas import OrderBatch
from storage import outbox
from storage.db import Connection, columns
from storage.rows import batch, column_list, parameters, read, unnest

_TAKE_IN = f"""
    INSERT INTO orders.orders ({column_list(TakenInRow)}, created_at, updated_at)
    SELECT n.*, $18, $18 FROM {unnest(TakenInRow)}
    ON CONFLICT (user_id, client_order_id) WHERE client_order_id IS NOT NULL DO NOTHING RETURNING order_id
"""
_TAKE_IN_AMENDMENT = f"""
    INSERT INTO orders.amendments (amendment_id, {column_list(TakenInAmendmentRow)}, created_at, updated_at)
    VALUES (nextval('orders.order_id_seq'), {parameters(TakenInAmendmentRow)}, $14, $14) RETURNING amendment_id
"""


@dataclass(frozen=True, slots=True)
class Intake:
    """What became of a batch: ids in the order given (None: the client order id was used before), and its saga."""

    order_ids: list[int | None]
    saga: Saga | None


async def take_in(conn: Connection, orders: Sequence[NewOrder], now: datetime) -> Intake:
    """Write `orders` as PENDING in the caller's transaction."""
    ids = [
        row[0]
        for row in await conn.fetch("SELECT nextval('orders.order_id_seq') FROM generate_series(1, $1)", len(orders))
    ]
    rows = [_taken_in_row(order_id, order) for order_id, order in zip(ids, orders, strict=True)]
    inserted = await conn.fetch(_TAKE_IN, *batch(TakenInRow, rows), now)
    kept = {row["order_id"] for row in inserted}
    order_ids = [order_id if order_id in kept else None for order_id in ids]
    if not kept:
        return Intake(order_ids, None)
    accepted = [(order_id, order) for order_id, order in zip(ids, orders, strict=True) if order_id in kept]
    first_id, first = accepted[0]
    taken = OrderBatch(f"orders-{first_id}-{len(accepted)}", [order_id for order_id, _ in accepted])
    owner = (first.user_id, first.request.instrument_id) if len(accepted) == 1 else None
    saga = Saga("PLACE", taken, owner)
    await record_saga(conn, saga)
    await outbox.emit(conn, [_submitted(order_id, order) for order_id, order in accepted])
    return Intake(order_ids, saga)


def _taken_in_row(order_id: int, order: NewOrder) -> TakenInRow:
    request = order.request
    return TakenInRow(
        order_id=order_id,
        user_id=order.user_id,
        instrument_id=request.instrument_id,
        client_order_id=request.client_order_id,
        side=request.side,
        type=request.type,
        time_in_force=request.time_in_force,
        price=request.price,
        bound_price=order.bound_price,
        quantity=request.quantity,
        stp_mode=request.stp_mode,
        open_loss=order.open_loss,
        post_only=request.post_only,
        reduce_only=request.reduce_only,
        stop_price=request.stop_price,
        working_type=request.working_type if request.is_stop else None,
        margin_price=order.margin_price,
    )


def _submitted(order_id: int, order: NewOrder) -> OrderSubmitted:
    request = order.request
    return OrderSubmitted(
        order_id=order_id,
        user_id=str(order.user_id),
        instrument_id=request.instrument_id,
        side=request.side,
        type=request.type,
        price=None if request.price is None else plain(request.price),
        quantity=plain(request.quantity),
    )


async def find_by_client_ids(conn: Connection, keys: Sequence[tuple[int, str]]) -> dict[tuple[int, str], OrderRow]:
    """Orders by (user id, client order id)."""
    rows = await conn.fetch(
        f"SELECT {column_list(OrderRow)} FROM orders.orders"
        " JOIN unnest($1::bigint[], $2::text[]) AS k (user_id, client_order_id) USING (user_id, client_order_id)",
        *columns(keys, 2),
    )
    return {(row.user_id, row.client_order_id or ""): row for row in read(OrderRow, rows)}


async def lock_for_amendment(conn: Connection, user_id: int, order_id: int) -> tuple[OpenOrder, str] | None:
    """An order of the user, locked, and its status; PENDING, too, while an amendment of it is under way.

    None when the user has no such order.
    """
    record = await conn.fetchrow(
        f"SELECT {column_list(OrderRow)} FROM orders.orders WHERE order_id = $1 AND user_id = $2 FOR UPDATE",
        order_id,
        user_id,
    )
    if record is None:
        return None
    row = OrderRow(*record)
    under_way = await conn.fetchval(
        "SELECT EXISTS (SELECT FROM orders.amendments WHERE order_id = $1 AND status IN ('PENDING', 'ACCEPTED'))",
        order_id,
    )
    status = "PENDING" if row.status in IN_ENGINE_STATUSES and under_way else row.status
    return _open_order(row), status


def _open_order(row: OrderRow) -> OpenOrder:
    request = OrderRequest(
        instrument_id=row.instrument_id,
        side=row.side,
        type=row.type,
        quantity=row.quantity,
        price=row.price,
        time_in_force=row.time_in_force,
        stp_mode=row.stp_mode,
        client_order_id=row.client_order_id,
        post_only=row.post_only,
        reduce_only=row.reduce_only,
        stop_price=row.stop_price,
        working_type=row.working_type or "MARK",
    )
    return OpenOrder(
        order_id=row.order_id,
        user_id=row.user_id,
        request=request,
        bound_price=row.bound_price,
        filled_quantity=row.filled_quantity,
        margin_price=row.margin_price or row.bound_price,
        open_loss=row.open_loss,
    )


async def take_in_amendment(conn: Connection, amendment: Amendment, now: datetime) -> Saga:
    """Write an amendment of an order that was locked for it as PENDING in the caller's transaction.

    Its saga is a placement: what the amended order needs more is checked and frozen like a new order's margin.
    """
    order = amendment.order
    request = order.request
    row = TakenInAmendmentRow(
        order_id=order.order_id,
        user_id=order.user_id,
        instrument_id=request.instrument_id,
        side=request.side,
        reduce_only=request.reduce_only,
        price=amendment.price,
        quantity=amendment.quantity,
        open_quantity=amendment.open_quantity,
        claimed_quantity=amendment.claimed_quantity,
        claimed_notional=amendment.claimed_notional,
        claimed_loss=amendment.claimed_loss,
        margin_price=amendment.margin_price,
        open_loss=amendment.open_loss,
    )
    amendment_id: int = await conn.fetchval(_TAKE_IN_AMENDMENT, *row, now)
    taken = OrderBatch(f"orders-{amendment_id}-1", [amendment_id])
    saga = Saga("PLACE", taken, (order.user_id, request.instrument_id))
    await record_saga(conn, saga)
    return saga


async def take_in_cancels(conn: Connection, order_ids: list[int], token: str) -> Saga:
    """Write down the cancellation of orders in the caller's transaction; `token` tells requests apart."""
    taken = OrderBatch(f"cancels-{order_ids[0]}-{len(order_ids)}-{token}", order_ids)
    saga = Saga("CANCEL", taken, await _owner(conn, order_ids[0]) if len(order_ids) == 1 else None)
    await record_saga(conn, saga)
    return saga


async def _owner(conn: Connection, order_id: int) -> tuple[int, str] | None:
    row = await conn.fetchrow("SELECT user_id, instrument_id FROM orders.orders WHERE order_id = $1", order_id)
    return None if row is None else (row["user_id"], row["instrument_id"])

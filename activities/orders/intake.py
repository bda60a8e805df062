"""Taking orders and amendments in: one transaction writes a batch as PENDING, with its saga and its events."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import asyncpg

from activities.orders.sagas import Saga, record_saga
from activities.orders.steps import IN_ENGINE_STATUSES, MARGIN_COLUMNS, ORDER_COLUMNS
from domain.events import OrderSubmitted
from domain.money import plain
from domain.order_entry import Amendment, NewOrder, OpenOrder, OrderRequest
from domain.sagas import OrderBatch
from storage import outbox
from storage.db import Connection, columns


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
    rows = [
        (
            order_id,
            order.user_id,
            order.request.instrument_id,
            order.request.client_order_id,
            order.request.side,
            order.request.type,
            order.request.time_in_force,
            order.request.price,
            order.bound_price,
            order.request.quantity,
            order.request.stp_mode,
            order.open_loss,
            order.request.post_only,
            order.request.reduce_only,
            order.request.stop_price,
            order.request.working_type if order.request.is_stop else None,
            order.margin_price,
        )
        for order_id, order in zip(ids, orders, strict=True)
    ]
    inserted = await conn.fetch(
        "INSERT INTO orders.orders (order_id, user_id, instrument_id, client_order_id, side, type, time_in_force,"
        " price, bound_price, quantity, stp_mode, open_loss, post_only, reduce_only, stop_price, working_type,"
        " margin_price, created_at, updated_at)"
        " SELECT n.*, $18, $18 FROM unnest($1::bigint[], $2::bigint[], $3::text[], $4::text[], $5::text[], $6::text[],"
        " $7::text[], $8::numeric[], $9::numeric[], $10::numeric[], $11::text[], $12::numeric[], $13::bool[],"
        " $14::bool[], $15::numeric[], $16::text[], $17::numeric[]) AS n"
        " ON CONFLICT (user_id, client_order_id) WHERE client_order_id IS NOT NULL DO NOTHING RETURNING order_id",
        *columns(rows, 17),
        now,
    )
    kept = {row["order_id"] for row in inserted}
    order_ids = [order_id if order_id in kept else None for order_id in ids]
    if not kept:
        return Intake(order_ids, None)
    accepted = [(order_id, order) for order_id, order in zip(ids, orders, strict=True) if order_id in kept]
    first_id, first = accepted[0]
    batch = OrderBatch(f"orders-{first_id}-{len(accepted)}", [order_id for order_id, _ in accepted])
    owner = (first.user_id, first.request.instrument_id) if len(accepted) == 1 else None
    saga = Saga("PLACE", batch, owner)
    await record_saga(conn, saga)
    await outbox.emit(conn, [_submitted(order_id, order) for order_id, order in accepted])
    return Intake(order_ids, saga)


def _submitted(order_id: int, order: NewOrder) -> OrderSubmitted:
    request = order.request
    return OrderSubmitted(
        order_id,
        str(order.user_id),
        request.instrument_id,
        request.side,
        request.type,
        None if request.price is None else plain(request.price),
        plain(request.quantity),
    )


async def find_by_client_ids(
    conn: Connection, keys: Sequence[tuple[int, str]]
) -> dict[tuple[int, str], asyncpg.Record]:
    """Orders (ORDER_COLUMNS) by (user id, client order id)."""
    rows = await conn.fetch(
        f"SELECT {ORDER_COLUMNS} FROM orders.orders"
        " JOIN unnest($1::bigint[], $2::text[]) AS k (user_id, client_order_id) USING (user_id, client_order_id)",
        *columns(keys, 2),
    )
    return {(row["user_id"], row["client_order_id"]): row for row in rows}


async def lock_for_amendment(conn: Connection, user_id: int, order_id: int) -> tuple[OpenOrder, str] | None:
    """An order of the user, locked, and its status; PENDING, too, while an amendment of it is under way.

    None when the user has no such order.
    """
    row = await conn.fetchrow(
        f"SELECT {ORDER_COLUMNS}, {MARGIN_COLUMNS} FROM orders.orders WHERE order_id = $1 AND user_id = $2 FOR UPDATE",
        order_id,
        user_id,
    )
    if row is None:
        return None
    under_way = await conn.fetchval(
        "SELECT EXISTS (SELECT FROM orders.amendments WHERE order_id = $1 AND status IN ('PENDING', 'ACCEPTED'))",
        order_id,
    )
    request = OrderRequest(
        row["instrument_id"],
        row["side"],
        row["type"],
        row["quantity"],
        row["price"],
        row["time_in_force"],
        row["stp_mode"],
        row["client_order_id"],
        row["post_only"],
        row["reduce_only"],
        row["stop_price"],
        row["working_type"] or "MARK",
    )
    is_open = row["status"] in IN_ENGINE_STATUSES
    order = OpenOrder(
        order_id,
        user_id,
        request,
        row["bound_price"],
        row["filled_quantity"],
        row["margin_price"] or row["bound_price"],
        row["open_loss"],
    )
    return order, "PENDING" if is_open and under_way else row["status"]


async def take_in_amendment(conn: Connection, amendment: Amendment, now: datetime) -> Saga:
    """Write an amendment of an order that was locked for it as PENDING in the caller's transaction.

    Its saga is a placement: what the amended order needs more is checked and frozen like a new order's margin.
    """
    order = amendment.order
    request = order.request
    amendment_id: int = await conn.fetchval(
        "INSERT INTO orders.amendments (amendment_id, order_id, user_id, instrument_id, side, reduce_only, price,"
        " quantity, open_quantity, claimed_quantity, claimed_notional, claimed_loss, margin_price, open_loss,"
        " created_at, updated_at)"
        " VALUES (nextval('orders.order_id_seq'), $1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $14)"
        " RETURNING amendment_id",
        order.order_id,
        order.user_id,
        request.instrument_id,
        request.side,
        request.reduce_only,
        amendment.price,
        amendment.quantity,
        amendment.open_quantity,
        amendment.claimed_quantity,
        amendment.claimed_notional,
        amendment.claimed_loss,
        amendment.margin_price,
        amendment.open_loss,
        now,
    )
    batch = OrderBatch(f"orders-{amendment_id}-1", [amendment_id])
    saga = Saga("PLACE", batch, (order.user_id, request.instrument_id))
    await record_saga(conn, saga)
    return saga


async def take_in_cancels(conn: Connection, order_ids: list[int], token: str) -> Saga:
    """Write down the cancellation of orders in the caller's transaction; `token` tells requests apart."""
    batch = OrderBatch(f"cancels-{order_ids[0]}-{len(order_ids)}-{token}", order_ids)
    saga = Saga("CANCEL", batch, await _owner(conn, order_ids[0]) if len(order_ids) == 1 else None)
    await record_saga(conn, saga)
    return saga


async def _owner(conn: Connection, order_id: int) -> tuple[int, str] | None:
    row = await conn.fetchrow("SELECT user_id, instrument_id FROM orders.orders WHERE order_id = $1", order_id)
    return None if row is None else (row["user_id"], row["instrument_id"])

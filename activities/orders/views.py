"""What the orders service shows of its tables: orders and amendments, one or many."""

from collections.abc import Iterable
from decimal import Decimal
from typing import Any

from activities.orders.rows import OPEN_STATUSES, AmendmentRow, OrderRow
from domain.clock import iso
from domain.money import plain
from storage.db import Connection, Pool
from storage.outbox import UserPush
from storage.rows import column_list, read


def order_view(row: OrderRow) -> dict[str, Any]:
    """An order as its user sees it."""
    return {
        "orderId": row.order_id,
        "clientOrderId": row.client_order_id,
        "userId": str(row.user_id),
        "instrumentId": row.instrument_id,
        "side": row.side,
        "type": row.type,
        "timeInForce": row.time_in_force,
        "price": None if row.price is None else plain(row.price),
        "quantity": plain(row.quantity),
        "filledQuantity": plain(row.filled_quantity),
        "averagePrice": average_price(row.filled_notional, row.filled_quantity),
        "status": row.status,
        "failureReason": row.failure_reason,
        "stpMode": row.stp_mode,
        "postOnly": row.post_only,
        "reduceOnly": row.reduce_only,
        "stopPrice": None if row.stop_price is None else plain(row.stop_price),
        "workingType": row.working_type,
        "isLiquidation": row.is_liquidation,
        "createdAt": iso(row.created_at),
        "updatedAt": iso(row.updated_at),
    }


def amendment_view(row: AmendmentRow) -> dict[str, Any]:
    """An amendment as its user sees it."""
    price, quantity = row.price, row.quantity
    return {
        "amendmentId": row.amendment_id,
        "orderId": row.order_id,
        "price": None if price is None else plain(price),
        "quantity": None if quantity is None else plain(quantity),
        "status": row.status,
        "failureReason": row.failure_reason,
        "createdAt": iso(row.created_at),
        "updatedAt": iso(row.updated_at),
    }


def average_price(filled_notional: Decimal, filled_quantity: Decimal) -> str | None:
    """Quote per base over all fills, 8 decimals; None before the first."""
    if not filled_quantity:
        return None
    return plain((filled_notional / filled_quantity).quantize(Decimal("1e-8")))


def order_pushes(rows: Iterable[OrderRow]) -> list[UserPush]:
    """Orders for their users' sockets."""
    # Postgres gives updated rows in any order.
    return [UserPush(row.user_id, "order", order_view(row)) for row in sorted(rows, key=lambda row: row.order_id)]


async def find_order(conn: Connection | Pool, order_id: int, user_id: int | None = None) -> OrderRow | None:
    """An order; None when there is none, or none of this user."""
    row = await conn.fetchrow(
        f"SELECT {column_list(OrderRow)} FROM orders.orders"
        " WHERE order_id = $1 AND ($2::bigint IS NULL OR user_id = $2)",
        order_id,
        user_id,
    )
    return None if row is None else OrderRow(*row)


async def list_orders(
    conn: Connection | Pool,
    user_id: int,
    *,
    instrument_id: str | None,
    status: str | None,
    before: int | None,
    limit: int,
) -> list[OrderRow]:
    """A user's orders with ids below `before`, newest first."""
    rows = await conn.fetch(
        f"SELECT {column_list(OrderRow)} FROM orders.orders WHERE user_id = $1"
        " AND ($2::text IS NULL OR instrument_id = $2) AND ($3::text IS NULL OR status = $3)"
        " AND ($4::bigint IS NULL OR order_id < $4) ORDER BY order_id DESC LIMIT $5",
        user_id,
        instrument_id,
        status,
        before,
        limit,
    )
    return read(OrderRow, rows)


async def open_order_ids(conn: Connection | Pool, user_id: int, instrument_id: str | None) -> list[int]:
    """Ids of a user's open orders, of one instrument or of all, newest first."""
    rows = await conn.fetch(
        "SELECT order_id FROM orders.orders WHERE user_id = $1 AND ($2::text IS NULL OR instrument_id = $2)"
        " AND status = ANY($3) ORDER BY order_id DESC",
        user_id,
        instrument_id,
        OPEN_STATUSES,
    )
    return [row["order_id"] for row in rows]


async def find_amendment(conn: Connection | Pool, amendment_id: int) -> AmendmentRow | None:
    """An amendment; None when there is none."""
    row = await conn.fetchrow(
        f"SELECT {column_list(AmendmentRow)} FROM orders.amendments WHERE amendment_id = $1", amendment_id
    )
    return None if row is None else AmendmentRow(*row)

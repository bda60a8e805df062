"""What the orders service shows of its tables: orders and amendments, one or many."""

from collections.abc import Sequence

import asyncpg

from activities.orders.steps import OPEN_STATUSES, ORDER_COLUMNS
from storage.db import Connection, Pool


async def find_order(conn: Connection | Pool, order_id: int, user_id: int | None = None) -> asyncpg.Record | None:
    """ORDER_COLUMNS of an order; None when there is none, or none of this user."""
    return await conn.fetchrow(
        f"SELECT {ORDER_COLUMNS} FROM orders.orders WHERE order_id = $1 AND ($2::bigint IS NULL OR user_id = $2)",
        order_id,
        user_id,
    )


async def list_orders(
    conn: Connection | Pool,
    user_id: int,
    *,
    instrument_id: str | None,
    status: str | None,
    before: int | None,
    limit: int,
) -> Sequence[asyncpg.Record]:
    """ORDER_COLUMNS of a user's orders with ids below `before`, newest first."""
    return await conn.fetch(
        f"SELECT {ORDER_COLUMNS} FROM orders.orders WHERE user_id = $1"
        " AND ($2::text IS NULL OR instrument_id = $2) AND ($3::text IS NULL OR status = $3)"
        " AND ($4::bigint IS NULL OR order_id < $4) ORDER BY order_id DESC LIMIT $5",
        user_id,
        instrument_id,
        status,
        before,
        limit,
    )


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


async def find_amendment(conn: Connection | Pool, amendment_id: int) -> asyncpg.Record | None:
    """An amendment's `order_id`, `status` and `failure_reason`."""
    return await conn.fetchrow(
        "SELECT order_id, status, failure_reason FROM orders.amendments WHERE amendment_id = $1", amendment_id
    )

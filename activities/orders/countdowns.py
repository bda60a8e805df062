"""The dead-man switch: a user's open orders are cancelled unless the user is heard of again in time."""

from datetime import datetime, timedelta

from activities.orders.intake import take_in_cancels
from activities.orders.rows import OPEN_STATUSES
from activities.orders.sagas import Saga
from storage.db import Connection

USERS_A_TIME = 100


async def set_countdown(conn: Connection, user_id: int, wait: timedelta) -> datetime:
    """Cancel everything the user has open `wait` from now, instead of when it was said before; that moment."""
    cancel_at: datetime = await conn.fetchval(
        "INSERT INTO orders.countdowns (user_id, cancel_at) VALUES ($1, now() + $2::interval)"
        " ON CONFLICT (user_id) DO UPDATE SET cancel_at = excluded.cancel_at RETURNING cancel_at",
        user_id,
        wait,
    )
    return cancel_at


async def stop_countdown(conn: Connection, user_id: int) -> None:
    """Leave the user's orders alone again."""
    await conn.execute("DELETE FROM orders.countdowns WHERE user_id = $1", user_id)


async def fire_countdowns(conn: Connection, token: str) -> list[Saga]:
    """Write down the cancellations of countdowns that are over, in the caller's transaction; `token` names them."""
    rows = await conn.fetch(
        "WITH due AS (DELETE FROM orders.countdowns WHERE user_id IN (SELECT user_id FROM orders.countdowns"
        "   WHERE cancel_at <= now() ORDER BY cancel_at LIMIT $2 FOR UPDATE SKIP LOCKED) RETURNING user_id)"
        " SELECT user_id, array_agg(order_id ORDER BY order_id) AS order_ids FROM due"
        " JOIN orders.orders USING (user_id) WHERE status = ANY($1) GROUP BY user_id ORDER BY user_id",
        OPEN_STATUSES,
        USERS_A_TIME,
    )
    return [await take_in_cancels(conn, row["order_ids"], token) for row in rows]

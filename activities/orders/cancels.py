"""Requests for cancellation, in the engine's log."""

from collections import defaultdict
from collections.abc import Sequence

from activities.matching.steps import append_commands
from activities.orders.rows import IN_ENGINE_STATUSES
from domain.clock import to_ms
from domain.events import OrderCancelRequested
from domain.matching import AnyCommand, Cancel
from storage import outbox
from storage.db import Connection, columns


async def lock_orders(conn: Connection, order_ids: Sequence[int]) -> None:
    """Lock in order of ids, so that no two transactions wait for each other."""
    await conn.execute("SELECT 1 FROM orders.orders WHERE order_id = ANY($1) ORDER BY order_id FOR UPDATE", order_ids)


async def _lock_checked(conn: Connection, order_ids: Sequence[int]) -> list[int]:
    """The same for those of `order_ids` whose check is over; answers which these are.

    Others are not waited for: the transaction that ends their check has locked some of them, in no order, and may be
    about to wait for the rest.
    """
    rows = await conn.fetch(
        "SELECT order_id FROM orders.orders WHERE order_id = ANY($1) AND status <> 'PENDING'"
        " ORDER BY order_id FOR UPDATE",
        order_ids,
    )
    return [row["order_id"] for row in rows]


async def cancel_all_uncovered(conn: Connection) -> int:
    """Request the cancellation of all orders that are not covered in full, wherever a loss took their money: a cross
    account's loss takes it in other instruments than its own. How many it was."""
    keys = await conn.fetch("SELECT user_id, instrument_id FROM ledger.v_margin_holds WHERE order_short > 0")
    return await cancel_uncovered_of(conn, [(row["user_id"], row["instrument_id"]) for row in keys]) if keys else 0


async def cancel_uncovered_of(conn: Connection, keys: Sequence[tuple[int, str]]) -> int:
    """Request the cancellation of all open orders of these (user, instrument), whose money a loss took; how many."""
    rows = await conn.fetch(
        "SELECT order_id FROM orders.orders JOIN unnest($1::bigint[], $2::text[]) AS k (user_id, instrument_id)"
        " USING (user_id, instrument_id) WHERE status = ANY($3) ORDER BY order_id",
        *columns(keys, 2),
        IN_ENGINE_STATUSES,
    )
    return len(await _request_cancels(conn, [row["order_id"] for row in rows], "INSUFFICIENT_MARGIN")) if rows else 0


async def cancel_of_liquidated(conn: Connection, user_id: int, instrument_ids: Sequence[str]) -> int:
    """Request the cancellation of all open orders of a user whose positions are liquidated there; how many."""
    rows = await conn.fetch(
        "SELECT order_id FROM orders.orders WHERE user_id = $1 AND instrument_id = ANY($2) AND status = ANY($3)"
        " AND NOT is_liquidation ORDER BY order_id",
        user_id,
        instrument_ids,
        IN_ENGINE_STATUSES,
    )
    return len(await _request_cancels(conn, [row["order_id"] for row in rows], "LIQUIDATION"))


async def request_checked(conn: Connection, order_ids: Sequence[int]) -> tuple[list[int], list[int]]:
    """Request the cancellation of orders that the engine has: of which it was, and which are still on their way."""
    checked = await _lock_checked(conn, order_ids)
    requested = await _request_cancels(conn, checked)
    waiting = await conn.fetch(
        "SELECT order_id FROM orders.orders WHERE order_id = ANY($1) AND order_id <> ALL($2)", order_ids, checked
    )
    return requested, [row["order_id"] for row in waiting]


async def _request_cancels(conn: Connection, order_ids: Sequence[int], reason: str = "USER_REQUEST") -> list[int]:
    """Append CANCEL commands for those of the orders that the engine has; which these are."""
    await lock_orders(conn, order_ids)
    rows = await conn.fetch(
        "UPDATE orders.orders SET status = 'CANCEL_REQUESTED', updated_at = now()"
        " WHERE order_id = ANY($1) AND status = ANY($2) RETURNING order_id, user_id, instrument_id, updated_at",
        order_ids,
        IN_ENGINE_STATUSES,
    )
    commands: defaultdict[str, list[AnyCommand]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: row["order_id"]):
        commands[row["instrument_id"]].append(
            Cancel(at=to_ms(row["updated_at"]), order_id=row["order_id"], user_id=row["user_id"], reason=reason)
        )
    requested = sorted(row["order_id"] for row in rows)
    await outbox.emit(conn, [OrderCancelRequested(order_id) for order_id in requested])
    await append_commands(conn, commands)
    return requested

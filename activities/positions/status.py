"""Statuses of positions that other services change: taken over by a liquidation, given back, warned."""

from collections.abc import Sequence
from typing import NamedTuple

from activities.positions.margins import read_unconfirmed
from activities.positions.rows import PositionRow
from storage.db import Connection
from storage.rows import column_list, read


class Confirmed(NamedTuple):
    """A position whose fills are all confirmed; `is_adopted`: its margin is what the ledger holds."""

    position: PositionRow
    is_adopted: bool


async def change_status(conn: Connection, position_ids: Sequence[int], before: str, after: str) -> list[PositionRow]:
    """Bring positions from one status into another (CLOSED, if flat) in the caller's transaction; those that were in
    `before`, by user."""
    rows = await conn.fetch(
        "WITH locked AS (SELECT position_id FROM positions.positions WHERE position_id = ANY($1) AND status = $2"
        "  ORDER BY user_id, instrument_id FOR UPDATE)"
        " UPDATE positions.positions p SET status = CASE WHEN p.signed_quantity = 0 THEN 'CLOSED' ELSE $3 END,"
        " updated_at = now() FROM locked WHERE p.position_id = locked.position_id"
        f" RETURNING {column_list(PositionRow, 'p')}",
        position_ids,
        before,
        after,
    )
    return sorted(read(PositionRow, rows), key=lambda row: row.key)


async def mark_warned(conn: Connection, position_ids: Sequence[int], *, warned: bool) -> list[PositionRow]:
    """Remember that the users of these positions were warned, or that it is over; those it is news for."""
    if not position_ids:
        return []
    rows = await conn.fetch(
        "WITH locked AS (SELECT position_id FROM positions.positions WHERE position_id = ANY($1) AND warned <> $2"
        "  ORDER BY user_id, instrument_id FOR UPDATE)"
        " UPDATE positions.positions p SET warned = $2 FROM locked WHERE p.position_id = locked.position_id"
        f" RETURNING {column_list(PositionRow, 'p')}",
        position_ids,
        warned,
    )
    return read(PositionRow, rows)


async def lock_confirmed(conn: Connection, position_ids: Sequence[int]) -> list[Confirmed]:
    """Lock these positions; those that are open and have no fill that is not confirmed yet, by user."""
    await conn.execute(
        "SELECT FROM positions.positions WHERE position_id = ANY($1) ORDER BY user_id, instrument_id FOR UPDATE",
        position_ids,
    )
    # Looked at once they are locked: no fill is applied to them from here on, none is confirmed.
    rows = await conn.fetch(
        f"SELECT {column_list(PositionRow, 'p')}, p.margin_version = coalesce(h.margin_version, 0) AS is_adopted"
        " FROM positions.positions p LEFT JOIN ledger.v_margin_holds h USING (user_id, instrument_id)"
        " WHERE p.position_id = ANY($1) AND p.signed_quantity <> 0 ORDER BY p.user_id, p.instrument_id",
        position_ids,
    )
    unconfirmed = await read_unconfirmed(conn, sorted({row["instrument_id"] for row in rows}))
    found = zip(read(PositionRow, rows), rows, strict=True)
    return [Confirmed(row, record["is_adopted"]) for row, record in found if row.key not in unconfirmed]

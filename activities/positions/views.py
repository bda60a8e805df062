"""What the positions service shows of its tables: positions, fills, and payments of funding."""

from collections.abc import Sequence

import asyncpg

from storage.db import Connection, Pool


async def list_positions(
    conn: Connection | Pool, user_id: int, instrument_id: str | None = None
) -> Sequence[asyncpg.Record]:
    """A user's positions, closed ones included, by instrument; the columns that `position_view` needs."""
    return await conn.fetch(
        "SELECT instrument_id, signed_quantity, entry_notional, margin, realized_pnl, leverage, margin_mode,"
        " liquidation_price, status FROM positions.positions"
        " WHERE user_id = $1 AND ($2::text IS NULL OR instrument_id = $2) ORDER BY instrument_id",
        user_id,
        instrument_id,
    )


async def list_fills(
    conn: Connection | Pool, user_id: int, *, instrument_id: str | None, before: int | None, limit: int
) -> Sequence[asyncpg.Record]:
    """A user's fills with event ids below `before`, newest first; the columns that `fill_view` needs."""
    return await conn.fetch(
        "SELECT * FROM positions.v_fills WHERE user_id = $1 AND ($2::text IS NULL OR instrument_id = $2)"
        " AND ($3::bigint IS NULL OR event_id < $3) ORDER BY event_id DESC LIMIT $4",
        user_id,
        instrument_id,
        before,
        limit,
    )


async def list_funding_payments(
    conn: Connection | Pool, user_id: int, *, instrument_id: str | None, before: int | None, limit: int
) -> Sequence[asyncpg.Record]:
    """A user's payments of funding (`realized_pnl`, quote) with event ids below `before`, newest first, each with the
    rate and the price that it was calculated from."""
    return await conn.fetch(
        "SELECT e.event_id, e.funding_time, e.instrument_id, e.quantity, e.side, e.price, r.rate, e.realized_pnl,"
        " e.created_at FROM positions.position_events e"
        " JOIN ledger.v_funding_runs r USING (instrument_id, funding_time)"
        " WHERE e.user_id = $1 AND e.funding_time IS NOT NULL AND ($2::text IS NULL OR instrument_id = $2)"
        " AND ($3::bigint IS NULL OR e.event_id < $3) ORDER BY e.event_id DESC LIMIT $4",
        user_id,
        instrument_id,
        before,
        limit,
    )

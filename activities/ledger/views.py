"""What the ledger shows of its tables: a user's balances and the entries behind them."""

from collections.abc import Sequence

import asyncpg

from storage.db import Connection, Pool


async def list_balances(conn: Connection | Pool, user_id: int) -> Sequence[asyncpg.Record]:
    """What a user has, `available` and `reserved`, by asset."""
    return await conn.fetch(
        "SELECT asset, available, reserved FROM ledger.ledger_balances WHERE user_id = $1 ORDER BY asset", user_id
    )


async def find_balance(conn: Connection | Pool, user_id: int, asset: str) -> asyncpg.Record | None:
    """What a user has of an asset, `available` and `reserved`; None when there never was any."""
    return await conn.fetchrow(
        "SELECT available, reserved FROM ledger.ledger_balances WHERE user_id = $1 AND asset = $2", user_id, asset
    )


async def list_entries(
    conn: Connection | Pool, user_id: int, *, asset: str | None, before: int | None, limit: int
) -> Sequence[asyncpg.Record]:
    """A user's entries with ids below `before`, newest first."""
    return await conn.fetch(
        "SELECT entry_id, entry_type, asset, instrument_id, delta_available, delta_reserved, balance_after,"
        " reference_type, reference_id, created_at FROM ledger.ledger_entries WHERE user_id = $1"
        " AND ($2::text IS NULL OR asset = $2) AND ($3::bigint IS NULL OR entry_id < $3)"
        " ORDER BY entry_id DESC LIMIT $4",
        user_id,
        asset,
        before,
        limit,
    )

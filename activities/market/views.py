"""What the market service shows of its tables: klines and funding rates."""

from collections.abc import Sequence
from datetime import datetime

import asyncpg

from storage.db import Connection, Pool

_KLINES = """
    SELECT open_time, open, high, low, close, volume, trade_count, closed FROM market.kline_buckets
    WHERE instrument_id = $1 AND period = $2 AND open_time >= $3 AND open_time <= $4
"""
_OLDEST = f"{_KLINES} ORDER BY open_time LIMIT $5"
_NEWEST = f"SELECT * FROM ({_KLINES} ORDER BY open_time DESC LIMIT $5) AS newest ORDER BY open_time"
_RATES = """
    SELECT effective_at, rate, premium_average, mark_price, samples, source FROM market.funding_rates
    WHERE instrument_id = $1 AND ($2::timestamptz IS NULL OR effective_at < $2) ORDER BY effective_at DESC LIMIT $3
"""


async def list_klines(
    conn: Connection | Pool,
    instrument_id: str,
    period: str,
    first: datetime,
    last: datetime,
    *,
    newest: bool,
    limit: int,
) -> Sequence[asyncpg.Record]:
    """The `newest` (or else the oldest) klines that open from `first` to `last`, both included; oldest first."""
    return await conn.fetch(_NEWEST if newest else _OLDEST, instrument_id, period, first, last, limit)


async def list_funding_rates(
    conn: Connection | Pool, instrument_id: str, *, before: datetime | None, limit: int
) -> Sequence[asyncpg.Record]:
    """The rates that took effect before `before`, newest first."""
    return await conn.fetch(_RATES, instrument_id, before, limit)

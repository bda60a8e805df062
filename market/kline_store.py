"""The klines' table: what it has, what it is given, which of it closes; and the trades that it has not counted yet."""

from collections.abc import Mapping, Sequence

import asyncpg

from domain.clock import from_ms, iso, to_ms
from domain.events import KlineClosed
from domain.money import plain
from domain.periods import PERIODS_MS
from market.klines import Kline, Traded
from storage.db import Connection, columns
from storage.outbox import emit

DAY_MS = 24 * 3_600_000
# How long klines are kept; days for ever. A kline may be amended by a late trade while it is there.
KEPT_MS = {"1m": 30 * DAY_MS, "5m": 90 * DAY_MS, "15m": 180 * DAY_MS, "1h": 730 * DAY_MS, "4h": 1_825 * DAY_MS}
# Short transactions: neither locks nor vacuum wait for a long one.
DELETED_MAX = 5_000

Series = tuple[str, str]  # An instrument and a period.

_FIELDS = "open_time, open, high, low, close, volume, trade_count, last_seq, closed"
# Every trade is in a day, and days are never deleted: the newest trade they know of is the newest counted.
_POSITIONS = """
    SELECT name, coalesce(max(b.last_seq), 0) AS seq FROM unnest($1::text[]) AS name
    LEFT JOIN market.kline_buckets b ON b.instrument_id = name AND b.period = '1d' GROUP BY name
"""
_TRADES = """
    SELECT u.instrument_id, t.seq, t.executed_at, t.price, t.quantity
    FROM unnest($1::text[], $2::bigint[]) AS u (instrument_id, seq) CROSS JOIN LATERAL (
        SELECT seq, executed_at, price, quantity FROM matching.v_trades
        WHERE instrument_id = u.instrument_id AND seq > u.seq ORDER BY seq LIMIT $3) AS t
    ORDER BY t.seq
"""
_NEWEST = f"""
    SELECT u.instrument_id, u.period, b.* FROM unnest($1::text[], $2::text[]) AS u (instrument_id, period)
    CROSS JOIN LATERAL (
        SELECT {_FIELDS} FROM market.kline_buckets WHERE instrument_id = u.instrument_id AND period = u.period
        ORDER BY open_time DESC LIMIT $3) AS b
    ORDER BY b.open_time
"""
_SINCE = f"""
    SELECT {_FIELDS} FROM market.kline_buckets WHERE instrument_id = $1 AND period = $2 AND open_time >= $3
    ORDER BY open_time
"""
# A process that leads no longer may still be writing: what knows of more trades stays.
_WRITE = """
    INSERT INTO market.kline_buckets AS b (instrument_id, period, open_time, open, high, low, close, volume,
                                           trade_count, last_seq)
    SELECT * FROM unnest($1::text[], $2::text[], $3::timestamptz[], $4::numeric[], $5::numeric[], $6::numeric[],
                         $7::numeric[], $8::numeric[], $9::bigint[], $10::bigint[])
    ON CONFLICT (instrument_id, period, open_time) DO UPDATE SET open = excluded.open, high = excluded.high,
        low = excluded.low, close = excluded.close, volume = excluded.volume, trade_count = excluded.trade_count,
        last_seq = excluded.last_seq
    WHERE b.last_seq < excluded.last_seq
"""
_CLOSE = """
    UPDATE market.kline_buckets b SET closed = TRUE
    FROM unnest($1::text[], $2::text[], $3::timestamptz[]) AS u (instrument_id, period, open_time)
    WHERE b.instrument_id = u.instrument_id AND b.period = u.period AND b.open_time = u.open_time AND NOT b.closed
    RETURNING b.instrument_id, b.period, b.open_time, b.open, b.high, b.low, b.close, b.volume
"""
_DELETE = """
    DELETE FROM market.kline_buckets WHERE (instrument_id, period, open_time) IN (
        SELECT instrument_id, period, open_time FROM market.kline_buckets
        WHERE instrument_id = $1 AND period = $2 AND open_time < $3 LIMIT $4)
"""


async def read_positions(conn: Connection, instrument_ids: Sequence[str]) -> dict[str, int]:
    """Up to which trade (its number in the engine's log) each instrument's klines have counted."""
    return {row["name"]: row["seq"] for row in await conn.fetch(_POSITIONS, instrument_ids)}


async def read_trades(conn: Connection, positions: Mapping[str, int], limit: int) -> dict[str, list[Traded]]:
    """The first `limit` trades of each instrument after its position, in the log's order."""
    trades: dict[str, list[Traded]] = {}
    for row in await conn.fetch(_TRADES, list(positions), list(positions.values()), limit):
        traded = Traded(row["seq"], to_ms(row["executed_at"]), row["price"], row["quantity"])
        trades.setdefault(row["instrument_id"], []).append(traded)
    return trades


async def read_newest(conn: Connection, series: Sequence[Series], limit: int) -> dict[Series, list[Kline]]:
    """The newest `limit` klines of each series, oldest first."""
    klines: dict[Series, list[Kline]] = {one: [] for one in series}
    for row in await conn.fetch(_NEWEST, *columns(series, 2), limit):
        klines[row["instrument_id"], row["period"]].append(_kline(row))
    return klines


async def read_since(conn: Connection, series: Series, open_ms: int) -> list[Kline]:
    """All klines of a series from `open_ms` on, oldest first."""
    return [_kline(row) for row in await conn.fetch(_SINCE, *series, from_ms(open_ms))]


async def write(conn: Connection, changed: Mapping[Series, Sequence[Kline]]) -> None:
    """Store klines and announce those that close now, in the caller's transaction; doing it again changes nothing."""
    rows = [_row(series, kline) for series, klines in changed.items() for kline in klines]
    await conn.execute(_WRITE, *columns(rows, 10))
    closed = [(*series, from_ms(k.open_ms)) for series, klines in changed.items() for k in klines if k.closed]
    if closed:
        newly = await conn.fetch(_CLOSE, *columns(closed, 3))
        ordered = sorted(newly, key=lambda row: (row["open_time"], row["instrument_id"], PERIODS_MS[row["period"]]))
        await emit(conn, [_event(row) for row in ordered])


async def delete_old(conn: Connection, instrument_ids: Sequence[str], now_ms: int) -> int:
    """Delete the klines that are kept no longer, in small transactions; how many it was."""
    total = 0
    for instrument_id in instrument_ids:
        for period, kept_ms in KEPT_MS.items():
            before = from_ms(now_ms - kept_ms)
            deleted = DELETED_MAX
            while deleted == DELETED_MAX:
                status = await conn.execute(_DELETE, instrument_id, period, before, DELETED_MAX)
                deleted = int(status.removeprefix("DELETE "))
                total += deleted
    return total


def _kline(row: asyncpg.Record) -> Kline:
    return Kline(
        open_ms=to_ms(row["open_time"]),
        open=row["open"],
        high=row["high"],
        low=row["low"],
        close=row["close"],
        volume=row["volume"],
        trade_count=row["trade_count"],
        last_seq=row["last_seq"],
        closed=row["closed"],
    )


def _row(series: Series, kline: Kline) -> tuple[object, ...]:
    prices = (kline.open, kline.high, kline.low, kline.close)
    return (*series, from_ms(kline.open_ms), *prices, kline.volume, kline.trade_count, kline.last_seq)


def _event(row: asyncpg.Record) -> KlineClosed:
    return KlineClosed(
        instrument_id=row["instrument_id"],
        period=row["period"],
        open=plain(row["open"]),
        high=plain(row["high"]),
        low=plain(row["low"]),
        close=plain(row["close"]),
        volume=plain(row["volume"]),
        timestamp=iso(row["open_time"]),
    )

"""Making the read model anew, and which making of it is in force.

Readers see the former one until the new one is committed as a whole.
"""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

from redis.asyncio import Redis

from reporting.counting import ADD_LIQUIDATIONS, ADD_RESULTS, ADD_TRADES, OPEN_INTEREST_CHANGES
from reporting.streams import Position, read_streams
from storage.db import Connection
from storage.outbox import read_watermark

# Held by whoever changes the read model.
WRITER_LOCK = 7_203_301
REBUILD_SECONDS_MAX = 4 * 3600.0

# Fills stay for ever, and trades that are no fills yet are still on the tape. Fills of a
# deleveraging have no order. A trade is counted when it is executed, whether or not it is settled, as its event is.
_SIDES = """
    SELECT user_id, (executed_at AT TIME ZONE 'UTC')::date AS day, instrument_id,
        CASE WHEN order_id IS NOT NULL THEN role END AS role, price * quantity AS volume, fee,
        CASE side WHEN 'BUY' THEN quantity ELSE -quantity END AS net_quantity
    FROM positions.v_fills
    UNION ALL
    SELECT s.user_id, (t.executed_at AT TIME ZONE 'UTC')::date, t.instrument_id, s.role, t.price * t.quantity,
        CASE s.role WHEN 'MAKER' THEN t.maker_fee ELSE t.taker_fee END, s.net_quantity
    FROM matching.v_trades t
    LEFT JOIN positions.v_cursors c USING (instrument_id)
    CROSS JOIN LATERAL (VALUES
        (t.buyer_user_id, CASE t.taker_side WHEN 'BUY' THEN 'TAKER' ELSE 'MAKER' END, t.quantity),
        (t.seller_user_id, CASE t.taker_side WHEN 'SELL' THEN 'TAKER' ELSE 'MAKER' END, -t.quantity)
    ) s (user_id, role, net_quantity)
    WHERE t.seq > coalesce(c.applied_seq, 0)
"""
_RESULTS = """
    SELECT user_id, (created_at AT TIME ZONE 'UTC')::date AS day, instrument_id, asset, entry_type, amount
    FROM ledger.v_results
"""
_LIQUIDATIONS = """
    SELECT liquidation_id, user_id, instrument_id, position_id, reason, date_trunc('milliseconds', created_at)
    FROM risk.v_liquidations
"""
_FROM_TABLES = (
    ADD_TRADES.format(sides=_SIDES),
    # After the trades, from them.
    "INSERT INTO reporting.open_interest_days (instrument_id, day, change) "
    + OPEN_INTEREST_CHANGES.format(users="TRUE"),
    ADD_RESULTS.format(results=_RESULTS),
    ADD_LIQUIDATIONS.format(liquidations=_LIQUIDATIONS),
)
# Not truncated: that would make readers wait.
_EMPTY = (
    "DELETE FROM reporting.trade_days",
    "DELETE FROM reporting.open_interest_days",
    "DELETE FROM reporting.pnl_days",
    "DELETE FROM reporting.liquidations",
    "DELETE FROM reporting.applied_events",
    "DELETE FROM reporting.stream_positions",
)


class TrimmedStreamError(Exception):
    """The streams no longer begin with the first event."""


@dataclass(frozen=True, slots=True)
class Build:
    """A making of the read model, and what it was made with: all outbox messages up to the watermark."""

    generation: int
    watermark: int


async def rebuild(conn: Connection, redis: Redis) -> Build:
    """Make the read model anew from what the services publish; the streams then go on where that ends.

    One snapshot of all services, of which is known which events it holds (`storage.outbox.read_watermark`). The streams
    are asked before it: what they hold by then is in the snapshot.
    """
    async with _writing(conn):
        ends = {topic: stream.end for topic, stream in (await read_streams(redis)).items()}
        async with conn.transaction(isolation="repeatable_read"):
            watermark = await read_watermark(conn)
            for statement in (*_EMPTY, *_FROM_TABLES):
                await conn.execute(statement, timeout=REBUILD_SECONDS_MAX)
            return await _replace(conn, watermark, ends)


async def restart_from_streams(conn: Connection, redis: Redis) -> Build:
    """Empty the read model and have it made from the streams' first entries on, by whoever follows them.

    Raises TrimmedStreamError, and changes nothing, when they don't have them all.
    """
    streams = await read_streams(redis)
    trimmed = [topic for topic, stream in streams.items() if stream.trimmed]
    if trimmed:
        raise TrimmedStreamError(f"the first entries are gone from {', '.join(trimmed)}")
    async with _writing(conn), conn.transaction():
        for statement in _EMPTY:
            await conn.execute(statement, timeout=REBUILD_SECONDS_MAX)
        return await _replace(conn, 0, dict.fromkeys(streams, Position()))


async def read_build(conn: Connection) -> Build | None:
    """The making in force; None before the first."""
    row = await conn.fetchrow("SELECT generation, watermark FROM reporting.builds")
    return None if row is None else Build(*row)


async def read_positions(conn: Connection) -> dict[str, Position]:
    """Up to where each stream is counted."""
    rows = await conn.fetch("SELECT topic, entry_id, entries FROM reporting.stream_positions")
    return {row["topic"]: Position(row["entry_id"], row["entries"]) for row in rows}


@asynccontextmanager
async def _writing(conn: Connection) -> AsyncIterator[None]:
    await conn.execute(f"SELECT pg_advisory_lock({WRITER_LOCK})", timeout=REBUILD_SECONDS_MAX)
    try:
        yield
    finally:
        # A connection that is gone has taken the lock along.
        if not conn.is_closed():
            await conn.execute(f"SELECT pg_advisory_unlock({WRITER_LOCK})")


async def _replace(conn: Connection, watermark: int, positions: Mapping[str, Position]) -> Build:
    await conn.executemany(
        "INSERT INTO reporting.stream_positions (topic, entry_id, entries) VALUES ($1, $2, $3)",
        [(topic, position.entry_id, position.entries) for topic, position in positions.items()],
    )
    generation: int = await conn.fetchval(
        "INSERT INTO reporting.builds AS b (generation, watermark, built_at) VALUES (1, $1, clock_timestamp())"
        " ON CONFLICT (is_current) DO UPDATE SET generation = b.generation + 1, watermark = excluded.watermark,"
        " built_at = excluded.built_at RETURNING generation",
        watermark,
    )
    return Build(generation, watermark)

"""Checkpoints of the markets in `market.checkpoints`: a restart begins at the newest good one, not at the first event.

Beside them, at the same times, `market.market_snapshots` gets its rows: the history of depth, price and volume.
"""

import asyncio
import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta

import msgspec

from domain.clock import to_ms
from domain.instruments import Instrument
from market.instrument_market import CHECKPOINT_VERSION, InstrumentMarket
from storage.db import OUTAGES, Connection, Pool, columns
from storage.waiting import pause
from telemetry.alerts import NO_MARKET_DATA, alert

log = logging.getLogger(__name__)

CHECKPOINT_SECONDS = 60.0
CHECKPOINTS_KEPT = 3
LAST_SECONDS_MAX = 10.0
SNAPSHOT_LEVELS = 20
SNAPSHOTS_KEPT = timedelta(days=7)

# Those from which the log leads on: not ahead of it, nor of what was pruned.
_POSITIONS = """
    SELECT seq FROM market.checkpoints JOIN matching.v_cursors c USING (instrument_id)
    LEFT JOIN matching.v_pruned p USING (instrument_id)
    WHERE instrument_id = $1 AND seq BETWEEN coalesce(p.event_seq, 0) AND c.event_seq ORDER BY seq DESC
"""
_READ = "SELECT version, checksum, payload FROM market.checkpoints WHERE instrument_id = $1 AND seq = $2"
_PRUNED = "SELECT event_seq FROM matching.v_pruned WHERE instrument_id = $1"
# A checkpoint follows from the events alone; what may stand there is the same, or damaged.
_SAVE = """
    INSERT INTO market.checkpoints (instrument_id, seq, version, checksum, payload) VALUES ($1, $2, $3, $4, $5)
    ON CONFLICT (instrument_id, seq) DO UPDATE
    SET version = excluded.version, checksum = excluded.checksum, payload = excluded.payload, created_at = now()
"""
_DELETE_OLD = """
    DELETE FROM market.checkpoints WHERE instrument_id = $1 AND seq < (
        SELECT seq FROM market.checkpoints WHERE instrument_id = $1 ORDER BY seq DESC OFFSET $2 LIMIT 1)
"""
_RECORD = """
    INSERT INTO market.market_snapshots (instrument_id, seq, bid_depth, ask_depth, last_price, volume_24h, created_at)
    SELECT u.instrument_id, u.seq, u.bids::jsonb, u.asks::jsonb, u.last_price, u.volume, $1
    FROM unnest($2::text[], $3::bigint[], $4::text[], $5::text[], $6::numeric[], $7::numeric[])
        AS u (instrument_id, seq, bids, asks, last_price, volume)
"""
_FORGET = "DELETE FROM market.market_snapshots WHERE instrument_id = ANY($1) AND created_at < $2"


class BadCheckpointError(Exception):
    """A checkpoint cannot be used: another version, damaged, or not what a market understands."""


class LogPrunedError(Exception):
    """Neither a good checkpoint nor a log that begins at the first event: nothing to build a market from."""


async def restore_markets(pool: Pool, instruments: Iterable[Instrument]) -> dict[str, InstrumentMarket]:
    """Every market at its newest good checkpoint, or before the first event.

    One that cannot be built at all is left out: a wrong book helps nobody, and the others go on.
    """
    markets = {}
    for instrument in instruments:
        try:
            markets[instrument.instrument_id] = await restore(pool, instrument)
        except LogPrunedError as error:
            alert(NO_MARKET_DATA, "no market data for %s: %s", instrument.instrument_id, error)
    return markets


async def restore(pool: Pool, instrument: Instrument) -> InstrumentMarket:
    """The market at its newest good checkpoint; without one, before the first event. Raises LogPrunedError."""
    name = instrument.instrument_id
    for row in await pool.fetch(_POSITIONS, name):
        try:
            market = await _load(pool, instrument, row["seq"])
        except BadCheckpointError as error:
            log.error("%s: checkpoint at event %d is of no use: %s", name, row["seq"], error)
        else:
            log.info("%s: restored from the checkpoint at event %d", name, market.seq)
            return market
    pruned_seq = await pool.fetchval(_PRUNED, name)
    if pruned_seq:
        raise LogPrunedError(f"Expected a good checkpoint, was none, and events up to {pruned_seq} are deleted")
    log.info("%s: no checkpoint, beginning at the first event", name)
    return InstrumentMarket(instrument)


async def _load(pool: Pool, instrument: Instrument, seq: int) -> InstrumentMarket:
    row = await pool.fetchrow(_READ, instrument.instrument_id, seq)
    if row is None:
        raise BadCheckpointError("it is gone")
    if row["version"] != CHECKPOINT_VERSION:
        raise BadCheckpointError(f"Expected version {CHECKPOINT_VERSION}, was {row['version']}")
    checksum = await asyncio.to_thread(_checksum, row["payload"])
    if checksum != row["checksum"]:
        raise BadCheckpointError(f"Expected checksum {row['checksum'].hex()}, was {checksum.hex()}")
    try:
        market = InstrumentMarket.load(instrument, row["payload"])
    except msgspec.DecodeError as error:
        raise BadCheckpointError(f"it cannot be decoded: {error}") from error
    if market.seq != seq:
        raise BadCheckpointError(f"Expected it to stand at event {seq}, was {market.seq}")
    return market


class Checkpointer:
    """Keeps the checkpoints of `markets`, which stand where they were restored, and their history."""

    def __init__(self, pool: Pool, markets: Mapping[str, InstrumentMarket]) -> None:
        self._pool = pool
        self._markets = markets
        self._saved = {name: market.seq for name, market in markets.items()}

    async def run(self) -> None:
        """Save everything now and then, until cancelled; an outage leaves it to the next time."""
        while True:
            await self._try_to_save()
            await pause(CHECKPOINT_SECONDS)

    async def finish(self) -> None:
        """The last ones on leaving. Only for markets that are whole: not after an event that could not be applied."""
        try:
            async with asyncio.timeout(LAST_SECONDS_MAX):
                await self._try_to_save()
        except TimeoutError:
            log.warning("The last checkpoints took too long; the next start has more events to read")

    async def save(self, now: datetime) -> None:
        """A checkpoint of every market that has moved, and a row of history for each."""
        async with self._pool.acquire() as conn:
            for name, market in self._markets.items():
                if market.seq != self._saved[name]:
                    self._saved[name] = await save(conn, market)
            await record(conn, self._markets, now)

    async def _try_to_save(self) -> None:
        try:
            await self.save(datetime.now(UTC))
        except OUTAGES:
            log.warning("Checkpoints are left to the next time", exc_info=True)


async def save(conn: Connection, market: InstrumentMarket) -> int:
    """Write a checkpoint and forget all but the newest; the event after which it was taken."""
    name, seq, payload = market.instrument.instrument_id, market.seq, market.dump()
    checksum = await asyncio.to_thread(_checksum, payload)
    async with conn.transaction():
        await conn.execute(_SAVE, name, seq, CHECKPOINT_VERSION, checksum, payload)
        await conn.execute(_DELETE_OLD, name, CHECKPOINTS_KEPT - 1)
    return seq


async def record(conn: Connection, markets: Mapping[str, InstrumentMarket], now: datetime) -> None:
    """A row of history for every market; rows older than SNAPSHOTS_KEPT go."""
    rows = []
    for name, market in markets.items():
        seq, bids, asks, last_price, volume = market.overview(SNAPSHOT_LEVELS, to_ms(now))
        rows.append((name, seq, json.dumps(bids), json.dumps(asks), last_price, volume))
    async with conn.transaction():
        await conn.execute(_RECORD, now, *columns(rows, 6))
        await conn.execute(_FORGET, list(markets), now - SNAPSHOTS_KEPT)


def _checksum(payload: bytes) -> bytes:
    return hashlib.sha256(payload).digest()

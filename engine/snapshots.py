"""Snapshots of the book in `matching.snapshots`: a restart begins at the newest good one, not at the first command.

One is taken between two batches and written in the background, on a connection of its own.
"""

import asyncio
import hashlib
import logging
from dataclasses import dataclass

from engine.lease import Lease
from engine.matcher import SNAPSHOT_VERSION, SNAPSHOT_VERSIONS, Matcher
from engine.retention import prune
from storage.db import DATABASE_ERRORS, Connection, Pool

log = logging.getLogger(__name__)

# Of a book that changes, at least this often, so that a restart is quick and the command log can be pruned.
SNAPSHOT_SECONDS = 300.0
# Taking one holds up matching: it may cost at most one part in so many of the time.
PACE = 50

# Whoever has lost the lease writes nothing. No lock on the cursor: the owner moves it meanwhile.
_SAVE = """
    INSERT INTO matching.snapshots (instrument_id, command_seq, event_seq, version, checksum, payload)
    SELECT $1, $3, $4, $5, $6, $7 FROM matching.cursors WHERE instrument_id = $1 AND epoch = $2
    ON CONFLICT (instrument_id, command_seq) DO UPDATE
    SET event_seq = excluded.event_seq, version = excluded.version, checksum = excluded.checksum,
        payload = excluded.payload, created_at = now()
"""
_POSITIONS = """
    SELECT command_seq FROM matching.snapshots WHERE instrument_id = $1 AND command_seq <= $2 ORDER BY command_seq DESC
"""
_READ = """
    SELECT event_seq, version, checksum, payload FROM matching.snapshots WHERE instrument_id = $1 AND command_seq = $2
"""


class BadSnapshotError(Exception):
    """A snapshot cannot be used: another version, damaged, or not what a matcher understands."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A matcher as it stood after `command_seq` and `event_seq`; `payload` is its dump."""

    command_seq: int
    event_seq: int
    payload: bytes


async def save(conn: Connection, lease: Lease, snapshot: Snapshot) -> None:
    """Write a snapshot; nothing when the lease is lost."""
    checksum = await asyncio.to_thread(_checksum, snapshot.payload)
    await conn.execute(
        _SAVE,
        lease.instrument_id,
        lease.epoch,
        snapshot.command_seq,
        snapshot.event_seq,
        SNAPSHOT_VERSION,
        checksum,
        snapshot.payload,
    )


async def positions(conn: Connection, lease: Lease) -> list[int]:
    """The command after which each snapshot was taken, newest first, up to where the log stood with the lease."""
    return [row[0] for row in await conn.fetch(_POSITIONS, lease.instrument_id, lease.command_seq)]


async def read(conn: Connection, instrument_id: str, command_seq: int) -> Snapshot:
    """The snapshot taken after `command_seq`. Raises BadSnapshotError."""
    row = await conn.fetchrow(_READ, instrument_id, command_seq)
    if row is None:
        raise BadSnapshotError("it is gone")
    if row["version"] not in SNAPSHOT_VERSIONS:
        raise BadSnapshotError(f"Expected version {SNAPSHOT_VERSION}, was {row['version']}")
    checksum = await asyncio.to_thread(_checksum, row["payload"])
    if checksum != row["checksum"]:
        raise BadSnapshotError(f"Expected checksum {row['checksum'].hex()}, was {checksum.hex()}")
    return Snapshot(command_seq, row["event_seq"], row["payload"])


def _checksum(payload: bytes) -> bytes:
    return hashlib.sha256(payload).digest()


class Snapshotter:
    """Takes the snapshots of one instrument while `lease` is held: one every `every` commands, or after a while.

    With each it prunes; see `engine/retention.py` for `events_kept`.
    """

    def __init__(self, pool: Pool, lease: Lease, every: int, last_command_seq: int, events_kept: int) -> None:
        self._pool = pool
        self._lease = lease
        self._every = every
        self._last_command_seq = last_command_seq
        self._events_kept = events_kept
        self._clock = asyncio.get_running_loop().time
        self._taken_at = self._clock()
        self._not_before = 0.0
        self._writing: asyncio.Task[None] | None = None

    def offer(self, matcher: Matcher, command_seq: int) -> None:
        """The log is committed up to `command_seq`, where `matcher` stands: take a snapshot if it is time for one."""
        now = self._clock()
        if self._writing is not None or now < self._not_before:
            return
        if command_seq - self._last_command_seq >= self._every or now >= self._taken_at + SNAPSHOT_SECONDS:
            self._take(matcher, command_seq)

    async def finish(self, matcher: Matcher, command_seq: int) -> None:
        """A last one on leaving, so that the next owner has nothing to replay. Pruning is left to that one."""
        if self._writing is not None:
            await self._writing
        if command_seq > self._last_command_seq:
            await self._write(self._dump(matcher, command_seq))

    async def abandon(self) -> None:
        """Stop what is under way."""
        if self._writing is not None:
            self._writing.cancel()
            await asyncio.wait([self._writing])

    def _take(self, matcher: Matcher, command_seq: int) -> None:
        self._writing = asyncio.create_task(self._write_and_prune(self._dump(matcher, command_seq)))
        self._writing.add_done_callback(self._written)

    def _dump(self, matcher: Matcher, command_seq: int) -> Snapshot:
        begun_at = self._clock()
        snapshot = Snapshot(command_seq, matcher.event_seq, matcher.dump())
        self._taken_at = self._clock()
        self._not_before = self._taken_at + PACE * (self._taken_at - begun_at)
        self._last_command_seq = command_seq
        log.info(
            "%s: snapshot at command %d, %d bytes, matching stood still for %.1f ms",
            self._lease.instrument_id,
            command_seq,
            len(snapshot.payload),
            1000 * (self._taken_at - begun_at),
        )
        return snapshot

    async def _write(self, snapshot: Snapshot) -> None:
        """A snapshot that could not be written costs the next restart some time, nothing else."""
        try:
            async with self._pool.acquire() as conn:
                await save(conn, self._lease, snapshot)
        except DATABASE_ERRORS as error:
            log.warning("%s: snapshot at %d not written: %r", self._lease.instrument_id, snapshot.command_seq, error)

    async def _write_and_prune(self, snapshot: Snapshot) -> None:
        await self._write(snapshot)
        try:
            async with self._pool.acquire() as conn:
                await prune(conn, self._lease, self._events_kept)
        except DATABASE_ERRORS as error:
            log.warning("%s: pruning is left to the next time: %r", self._lease.instrument_id, error)

    def _written(self, _: asyncio.Task[None]) -> None:
        self._writing = None

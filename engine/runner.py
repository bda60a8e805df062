"""Owns one instrument: takes its lease, rebuilds its book from the log, then follows the log."""

import asyncio
import logging
import time
from dataclasses import dataclass
from typing import Literal

import msgspec

from domain.instruments import Instrument
from domain.matching import AnyCommand, AnyEvent
from engine import lease as leases
from engine import snapshots
from engine.lease import Lease, LeaseLostError
from engine.log import Batch, ReplayMismatchError, read_commands, verify, write_batch
from engine.matcher import Matcher
from engine.publisher import Publisher
from engine.retention import require_whole_log
from engine.signaller import Signaller
from engine.snapshots import BadSnapshotError, Snapshotter
from engine.traces import MatchTraces
from storage.db import DATABASE_ERRORS, Connection, Pool
from storage.waiting import wait_for_event
from telemetry.alerts import ENGINE_LEASE_LOST, ENGINE_STOPPED, alert
from telemetry.metrics import (
    ENGINE_BATCH,
    ENGINE_BATCH_SECONDS,
    ENGINE_COMMANDS,
    ENGINE_EVENTS,
    ENGINE_LEASE,
    ENGINE_LEASES_LOST,
)

log = logging.getLogger(__name__)

BATCH_MAX = 2000
LEASE_POLL_SECONDS = 0.5
# For how long an instrument of others must have been without an owner before it is taken over.
STANDBY_SECONDS = 3.0
RETRY_SECONDS = 1.0
# A log that cannot be replayed, or a bug: trying again rarely helps, so it should not cost much.
DEFECT_RETRY_SECONDS = 10.0


State = Literal["standing by", "rebuilding", "matching", "stopped"]


@dataclass(frozen=True, slots=True)
class Tenure:
    """How a process owns instruments: under which name, for how long at a time, with how many snapshots, and how many
    events it keeps when nobody needs them.
    """

    owner: str
    lease_seconds: float
    snapshot_commands: int
    events_kept: int


class Runner:
    """The life of one instrument in this process. Stops only when told to; after a failure it starts over.

    `preferred`: takes the instrument as soon as it is free; else only when nobody else has for some time.
    `state` says what it does now.
    """

    def __init__(
        self,
        pool: Pool,
        instrument: Instrument,
        tenure: Tenure,
        publisher: Publisher,
        signaller: Signaller,
        *,
        preferred: bool = True,
        traces: MatchTraces | None = None,
    ) -> None:
        self.command_seq = 0
        self.state: State = "standing by"
        self._pool = pool
        self._instrument = instrument
        self._tenure = tenure
        self._free_for = 0.0 if preferred else STANDBY_SECONDS
        self._publisher = publisher
        self._signaller = signaller
        self._traces = traces
        self._matcher = Matcher(instrument)
        self._woken = asyncio.Event()
        self._stopping = asyncio.Event()
        self._renew_at = 0.0

    def wake(self) -> None:
        """There may be new commands."""
        self._woken.set()

    def stop(self) -> None:
        """Finish the batch at hand, release the lease, and return from `run`."""
        self._stopping.set()
        self._woken.set()

    async def run(self) -> None:
        """Own the instrument until stopped."""
        # Those who prefer it may be starting at the same time.
        await wait_for_event(self._stopping, self._free_for)
        while not self._stopping.is_set():
            try:
                async with self._pool.acquire() as conn:
                    await self._own(conn)
            except LeaseLostError as error:
                ENGINE_LEASES_LOST.labels(self._instrument.instrument_id).inc()
                alert(ENGINE_LEASE_LOST, "%s: lost the lease: %s", self._instrument.instrument_id, error)
            except DATABASE_ERRORS as error:
                log.warning("%s: will rebuild, the database said %r", self._instrument.instrument_id, error)
                await wait_for_event(self._stopping, RETRY_SECONDS)
            except Exception as error:
                # One instrument's defect must not stop the others; it is loud, and nothing of it was written.
                log.exception("%s: stopped by a defect", self._instrument.instrument_id)
                alert(ENGINE_STOPPED, "%s: stopped by a defect: %r", self._instrument.instrument_id, error)
                await wait_for_event(self._stopping, DEFECT_RETRY_SECONDS)

    async def _own(self, conn: Connection) -> None:
        lease = await self._take_lease(conn)
        if lease is None:
            return
        self.state = "rebuilding"
        snapshot_seq = await self._rebuild(conn, lease)
        self._signaller.advanced(lease.instrument_id, lease.event_seq)
        log.info("%s: matching from command %d in epoch %d", lease.instrument_id, self.command_seq, lease.epoch)
        tenure = self._tenure
        snapshotter = Snapshotter(self._pool, lease, tenure.snapshot_commands, snapshot_seq, tenure.events_kept)
        held = ENGINE_LEASE.labels(lease.instrument_id)
        held.set(1)
        self.state = "matching"
        try:
            await self._follow(conn, lease, snapshotter)
            await snapshotter.finish(self._matcher, self.command_seq)
        finally:
            self.state = "stopped"
            held.set(0)
            await snapshotter.abandon()
        await leases.release(conn, lease)

    async def _take_lease(self, conn: Connection) -> Lease | None:
        """The lease as soon as it is free; None when told to stop first."""
        waiting = False
        self.state = "standing by"
        while not self._stopping.is_set():
            lease = await leases.take(
                conn, self._instrument.instrument_id, self._tenure.owner, self._tenure.lease_seconds, self._free_for
            )
            if lease is not None:
                self._renew_later()
                return lease
            if not waiting:
                log.info("%s: another engine holds the lease, standing by", self._instrument.instrument_id)
                waiting = True
            await wait_for_event(self._stopping, LEASE_POLL_SECONDS)
        return None

    async def _rebuild(self, conn: Connection, lease: Lease) -> int:
        """The book at the cursor: from the newest good snapshot, or from the whole log.

        Answers after which command the snapshot was taken, 0 without one. Raises ReplayMismatchError, or LogPrunedError
        when only the whole log could help and it is not whole.
        """
        for snapshot_seq in await snapshots.positions(conn, lease):
            try:
                self._matcher = await self._load(conn, lease, snapshot_seq)
                self.command_seq = snapshot_seq
                await self._replay(conn, lease)
            except (BadSnapshotError, ReplayMismatchError) as error:
                log.error("%s: snapshot at command %d is of no use: %s", lease.instrument_id, snapshot_seq, error)
            else:
                log.info("%s: rebuilt from the snapshot at command %d", lease.instrument_id, snapshot_seq)
                return snapshot_seq
        await require_whole_log(conn, lease)
        self._matcher, self.command_seq = Matcher(self._instrument), 0
        await self._replay(conn, lease)
        log.info("%s: rebuilt from the whole log, without a snapshot", lease.instrument_id)
        return 0

    async def _load(self, conn: Connection, lease: Lease, snapshot_seq: int) -> Matcher:
        """The matcher as it stood after command `snapshot_seq`. Raises BadSnapshotError."""
        await self._renew_if_due(conn, lease)
        snapshot = await snapshots.read(conn, lease.instrument_id, snapshot_seq)
        try:
            matcher = Matcher.load(self._instrument, snapshot.payload)
        except (ValueError, msgspec.DecodeError) as error:
            raise BadSnapshotError(f"it cannot be decoded: {error}") from error
        if matcher.event_seq != snapshot.event_seq:
            raise BadSnapshotError(f"Expected it to stand at event {snapshot.event_seq}, was {matcher.event_seq}")
        return matcher

    async def _replay(self, conn: Connection, lease: Lease) -> None:
        """Match again what was matched up to the cursor. Raises ReplayMismatchError."""
        while self.command_seq < lease.command_seq:
            await self._renew_if_due(conn, lease)
            commands = await self._read(conn, min(BATCH_MAX, lease.command_seq - self.command_seq))
            if not commands:
                raise ReplayMismatchError(f"Expected command {self.command_seq + 1}, was none")
            await verify(conn, lease.instrument_id, self._match(commands))
        if self._matcher.event_seq != lease.event_seq:
            raise ReplayMismatchError(f"Expected event {lease.event_seq}, was {self._matcher.event_seq} at {lease}")

    async def _follow(self, conn: Connection, lease: Lease, snapshotter: Snapshotter) -> None:
        """Match what comes until told to stop. After a failed write the book is ahead of the log: start over."""
        self._woken.set()
        while not self._stopping.is_set():
            self._woken.clear()
            commands = await self._read(conn, BATCH_MAX)
            if commands:
                started = time.perf_counter()
                batch = self._match(commands)
                await write_batch(conn, lease, self._instrument, batch)
                self._renew_later()
                self._count(commands, batch, time.perf_counter() - started)
                self._announce(batch)
                snapshotter.offer(self._matcher, self.command_seq)
            if len(commands) < BATCH_MAX:
                await self._wait(conn, lease)

    async def _read(self, conn: Connection, limit: int) -> list[AnyCommand]:
        return await read_commands(conn, self._instrument.instrument_id, self.command_seq, limit)

    def _match(self, commands: list[AnyCommand]) -> Batch:
        first_event_seq = self._matcher.event_seq + 1
        events: list[AnyEvent] = []
        causes: list[int] = []
        apply = self._matcher.apply
        for seq, command in enumerate(commands, self.command_seq + 1):
            caused = apply(command)
            events += caused
            causes += [seq] * len(caused)
        self.command_seq += len(commands)
        return Batch(self.command_seq, first_event_seq, events, causes)

    def _count(self, commands: list[AnyCommand], batch: Batch, seconds: float) -> None:
        ENGINE_BATCH_SECONDS.observe(seconds)
        ENGINE_BATCH.observe(len(commands))
        ENGINE_COMMANDS.labels(self._instrument.instrument_id).inc(len(commands))
        ENGINE_EVENTS.labels(self._instrument.instrument_id).inc(len(batch.events))
        if self._traces is not None:
            self._traces.offer(self._instrument.instrument_id, commands, seconds)

    def _announce(self, batch: Batch) -> None:
        if batch.events:
            self._publisher.offer(self._instrument.instrument_id, batch)
            self._signaller.advanced(self._instrument.instrument_id, batch.last_seq)

    async def _wait(self, conn: Connection, lease: Lease) -> None:
        """Until woken; keeps the lease meanwhile."""
        await self._renew_if_due(conn, lease)
        while not self._woken.is_set():
            try:
                async with asyncio.timeout_at(self._renew_at):
                    await self._woken.wait()
            except TimeoutError:
                await self._renew_if_due(conn, lease)

    async def _renew_if_due(self, conn: Connection, lease: Lease) -> None:
        if asyncio.get_running_loop().time() >= self._renew_at:
            await leases.renew(conn, lease)
            self._renew_later()

    def _renew_later(self) -> None:
        self._renew_at = asyncio.get_running_loop().time() + self._tenure.lease_seconds / 3

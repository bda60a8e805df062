"""Owns one instrument: takes its lease, rebuilds its book from the log, then follows the log."""

import asyncio
import logging

from domain.instruments import Instrument
from domain.matching import AnyCommand, AnyEvent
from engine import lease as leases
from engine.lease import Lease, LeaseLostError
from engine.log import DATABASE_ERRORS, Batch, read_commands, write_batch
from engine.matcher import Matcher
from engine.publisher import Publisher
from engine.signaller import Signaller
from storage.db import Connection, Pool

log = logging.getLogger(__name__)

BATCH_MAX = 2000
RENEW_SECONDS = leases.LEASE_SECONDS / 3
LEASE_POLL_SECONDS = 0.5
RETRY_SECONDS = 1.0
# A log that cannot be replayed, or a bug: trying again rarely helps, so it should not cost much.
DEFECT_RETRY_SECONDS = 10.0


class ReplayMismatchError(Exception):
    """The log did not lead to where the cursor says it does."""


class Runner:
    """The life of one instrument in this process. Stops only when told to; after a failure it starts over."""

    def __init__(
        self, pool: Pool, instrument: Instrument, owner: str, publisher: Publisher, signaller: Signaller
    ) -> None:
        self.command_seq = 0
        self._pool = pool
        self._instrument = instrument
        self._owner = owner
        self._publisher = publisher
        self._signaller = signaller
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
        while not self._stopping.is_set():
            try:
                async with self._pool.acquire() as conn:
                    await self._own(conn)
            except LeaseLostError as error:
                log.warning("%s: lost the lease, waiting to rebuild: %s", self._instrument.instrument_id, error)
            except DATABASE_ERRORS as error:
                log.warning("%s: will rebuild, the database said %r", self._instrument.instrument_id, error)
                await self._pause(RETRY_SECONDS)
            except Exception:
                # One instrument's defect must not stop the others; it is loud, and nothing of it was written.
                log.exception("%s: stopped by a defect", self._instrument.instrument_id)
                await self._pause(DEFECT_RETRY_SECONDS)

    async def _own(self, conn: Connection) -> None:
        lease = await self._take_lease(conn)
        if lease is None:
            return
        await self._rebuild(conn, lease)
        self._signaller.advanced(lease.instrument_id, lease.event_seq)
        log.info("%s: matching from command %d in epoch %d", lease.instrument_id, self.command_seq, lease.epoch)
        await self._follow(conn, lease)
        await leases.release(conn, lease)

    async def _take_lease(self, conn: Connection) -> Lease | None:
        """The lease as soon as it is free; None when told to stop first."""
        waiting = False
        while not self._stopping.is_set():
            lease = await leases.take(conn, self._instrument.instrument_id, self._owner)
            if lease is not None:
                self._renew_later()
                return lease
            if not waiting:
                log.info("%s: another engine holds the lease, standing by", self._instrument.instrument_id)
                waiting = True
            await self._pause(LEASE_POLL_SECONDS)
        return None

    async def _rebuild(self, conn: Connection, lease: Lease) -> None:
        """Replay the log up to the cursor into a new book. Raises ReplayMismatchError."""
        self._matcher, self.command_seq = Matcher(self._instrument), 0
        while self.command_seq < lease.command_seq:
            await self._renew_if_due(conn, lease)
            self._match(await self._read(conn, min(BATCH_MAX, lease.command_seq - self.command_seq)))
        if self._matcher.event_seq != lease.event_seq:
            raise ReplayMismatchError(f"Expected event {lease.event_seq}, was {self._matcher.event_seq} at {lease}")

    async def _follow(self, conn: Connection, lease: Lease) -> None:
        """Match what comes until told to stop. After a failed write the book is ahead of the log: start over."""
        self._woken.set()
        while not self._stopping.is_set():
            self._woken.clear()
            commands = await self._read(conn, BATCH_MAX)
            if commands:
                batch = self._match(commands)
                await write_batch(conn, lease, self._instrument, batch)
                self._renew_later()
                self._announce(batch)
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
        self._renew_at = asyncio.get_running_loop().time() + RENEW_SECONDS

    async def _pause(self, seconds: float) -> None:
        """Sleep, unless told to stop."""
        try:
            async with asyncio.timeout(seconds):
                await self._stopping.wait()
        except TimeoutError:
            return

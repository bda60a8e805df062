"""Work divided over processes: each leads in some names, by one Postgres advisory lock for each of them.

A process claims what it prefers at once, and the rest when nobody has led in it for some time. What it has it keeps
until it ends: names do not come back by themselves to a process that prefers them.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass

from storage.db import OUTAGES, Connection, Pool
from storage.leadership import STANDBY_SECONDS, lead_while_connected
from storage.waiting import wait_for_event

log = logging.getLogger(__name__)

_FREE = """
    SELECT lock FROM unnest($1::bigint[]) AS lock WHERE NOT EXISTS (
        SELECT FROM pg_locks WHERE locktype = 'advisory' AND objsubid = 1
        AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
        AND (classid::bigint << 32) + objid::bigint = lock)
"""
_TAKE = "SELECT lock FROM unnest($1::bigint[]) AS lock WHERE pg_try_advisory_lock(lock)"

WorkIn = Callable[[frozenset[str]], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Claims:
    """The lock of every name, the names that this process prefers, and how long it leaves the others to others."""

    locks: Mapping[str, int]
    preferred: Collection[str]
    patience_seconds: float


async def run_territory(pool: Pool, claims: Claims, stop: asyncio.Event, work: WorkIn) -> None:
    """Run `work` for the names that this process leads in, until `stop`; anew, for all of them, whenever it gains some.

    The locks live on one connection: when it dies, `work` is cancelled at once. Database outages are waited out; what
    else `work` raises is raised here.
    """

    async def hold(conn: Connection) -> None:
        await _Holder(conn, claims, work).run()

    while not stop.is_set():
        try:
            async with pool.acquire() as conn:
                await lead_while_connected(conn, stop, hold)
        except* OUTAGES as outages:
            log.warning("Postgres is away or the locks are lost: %s", outages.exceptions[0])
        await wait_for_event(stop, STANDBY_SECONDS)


class _Holder:
    def __init__(self, conn: Connection, claims: Claims, work: WorkIn) -> None:
        self._conn = conn
        self._claims = claims
        self._work = work
        self._held: frozenset[str] = frozenset()
        self._free_since: dict[str, float] = {}
        self._task: asyncio.Future[None] | None = None

    async def run(self) -> None:
        """Claim what can be had and work there, until cancelled or `work` ends."""
        try:
            while self._task is None or not self._task.done():
                await self._grow()
                if self._task is None:
                    await asyncio.sleep(STANDBY_SECONDS)
                else:
                    await asyncio.wait([self._task], timeout=STANDBY_SECONDS)
            self._task.result()
        finally:
            await self._cancel()

    async def _grow(self) -> None:
        if len(self._held) == len(self._claims.locks):
            return
        gained = await self._take()
        if gained:
            await self._cancel()
            self._held |= gained
            log.info("Leading in %s", ", ".join(sorted(self._held)))
            self._task = asyncio.ensure_future(self._work(self._held))

    async def _take(self) -> frozenset[str]:
        names = {self._claims.locks[name]: name for name in self._claims.locks.keys() - self._held}
        free = {names[row["lock"]] for row in await self._conn.fetch(_FREE, list(names))}
        now = asyncio.get_running_loop().time()
        self._free_since = {name: self._free_since.get(name, now) for name in free}
        due = [self._claims.locks[name] for name in free if self._is_due(name, now)]
        return frozenset(names[row["lock"]] for row in await self._conn.fetch(_TAKE, due)) if due else frozenset()

    def _is_due(self, name: str, now: float) -> bool:
        return name in self._claims.preferred or now - self._free_since[name] >= self._claims.patience_seconds

    async def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

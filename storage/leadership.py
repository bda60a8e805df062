"""One active process out of many: whoever holds a Postgres advisory lock works, the others stand by."""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable

from storage.db import OUTAGES, Connection, Pool
from storage.waiting import wait_for_event

log = logging.getLogger(__name__)

RELAY_LOCK = 7_203_201
SWEEPER_LOCK = 7_203_203
COUNTDOWN_LOCK = 7_203_204
PRUNER_LOCK = 7_203_205
LIQUIDATION_LOCK = 7_203_206
OBSERVER_LOCK = 7_203_214
REPORTING_LOCK = 7_203_207
# The first of as many as there are instruments: their numbers are added.
MARKET_LOCKS = 7_203_202 << 16
STANDBY_SECONDS = 1.0

Work = Callable[[Connection], Awaitable[None]]


async def run_as_leader(pool: Pool, lock: int, stop: asyncio.Event, work: Work) -> None:
    """Run `work` while this process holds `lock`, until `stop` is set; take over when another leader goes.

    The lock lives on one connection, which `work` is given: when it dies, `work` is cancelled at once, since another
    process may lead from then on. Database outages are waited out; what else `work` raises is raised here.
    """

    async def lead(conn: Connection) -> None:
        if await conn.fetchval("SELECT pg_try_advisory_lock($1)", lock):
            log.info("Leading under lock %d", lock)
            await work(conn)

    while not stop.is_set():
        try:
            async with pool.acquire() as conn:
                await lead_while_connected(conn, stop, lead)
        except* OUTAGES as outages:
            log.warning("Postgres is away or lock %d is lost: %s", lock, outages.exceptions[0])
        await wait_for_event(stop, STANDBY_SECONDS)


async def lead_while_connected(conn: Connection, stop: asyncio.Event, work: Work) -> None:
    """Run `work` until `stop` or the end of `conn`, and give back the advisory locks that it holds or has taken."""
    try:
        await _work_while_connected(conn, stop, work)
    finally:
        # A connection that is gone has taken its locks along.
        with contextlib.suppress(*OUTAGES):
            await conn.execute("SELECT pg_advisory_unlock_all()")


async def _work_while_connected(conn: Connection, stop: asyncio.Event, work: Work) -> None:
    lost = asyncio.Event()

    def connection_lost(_: object) -> None:
        lost.set()

    conn.add_termination_listener(connection_lost)
    tasks = [
        asyncio.ensure_future(work(conn)),
        asyncio.ensure_future(lost.wait()),
        asyncio.ensure_future(stop.wait()),
    ]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        # A lost connection was taken from us by the pool, and its listeners with it.
        if not lost.is_set():
            conn.remove_termination_listener(connection_lost)
    if isinstance(outcomes[0], Exception):
        raise outcomes[0]

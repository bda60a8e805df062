"""The sweeper: starts order sagas that were written down and whose start was lost with their process, and cancels
orders whose money a loss in another instrument took."""

import asyncio
import logging
from datetime import timedelta

from temporalio.client import Client
from temporalio.service import RPCError

from activities.orders.cancels import cancel_all_uncovered
from activities.orders.sagas import start_saga, sweep_up
from storage.db import Connection, Pool
from storage.leadership import SWEEPER_LOCK, run_as_leader
from storage.waiting import pause
from telemetry.metrics import SWEPT_SAGAS

log = logging.getLogger(__name__)

STALLED_AFTER = timedelta(seconds=5)
SWEEP_SECONDS = 2.0
SWEEP_MAX = 200


async def run_sweeper(pool: Pool, client: Client, stop: asyncio.Event) -> None:
    """Sweep until `stop`, while this process leads."""

    async def sweep_for_ever(_: Connection) -> None:
        while True:
            try:
                async with pool.acquire() as conn, conn.transaction():
                    await cancel_all_uncovered(conn)
                await sweep(pool, client)
            except RPCError as error:
                log.warning("Temporal is away, sweeping later: %s", error.message)
            await pause(SWEEP_SECONDS)

    await run_as_leader(pool, SWEEPER_LOCK, stop, sweep_for_ever)


async def sweep(pool: Pool, client: Client) -> int:
    """Start what has stalled; how many workflows that were."""
    started = 0
    for saga in await sweep_up(pool, STALLED_AFTER, SWEEP_MAX):
        if await start_saga(client, saga, eager=False):
            log.warning("Saga %s had no workflow, started it", saga.batch.saga_id)
            SWEPT_SAGAS.inc()
            started += 1
    return started

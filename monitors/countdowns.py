"""Fires dead-man switches when their time has come."""

import asyncio
import logging
import uuid

from temporalio.client import Client
from temporalio.service import RPCError

from activities.orders.countdowns import fire_countdowns
from activities.orders.sagas import start_saga
from storage.db import Connection, Pool
from storage.leadership import COUNTDOWN_LOCK, run_as_leader

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.2


async def run_countdowns(pool: Pool, client: Client, stop: asyncio.Event) -> None:
    """Watch until `stop`, while this process leads."""

    async def watch(conn: Connection) -> None:
        while True:
            await fire(conn, client)
            await asyncio.sleep(LOOK_SECONDS)

    await run_as_leader(pool, COUNTDOWN_LOCK, stop, watch)


async def fire(conn: Connection, client: Client) -> int:
    """Cancel for all whose countdown is over; how many users that were."""
    async with conn.transaction():
        sagas = await fire_countdowns(conn, uuid.uuid4().hex[:12])
    for saga in sagas:
        log.warning("Dead-man switch: cancelling %d orders", len(saga.batch.order_ids))
        try:
            await start_saga(client, saga, eager=False)
        except RPCError as error:
            # It is written down: the sweeper starts it when Temporal is back.
            log.warning("Saga %s could not be started, the sweeper will: %s", saga.batch.saga_id, error.message)
    return len(sagas)

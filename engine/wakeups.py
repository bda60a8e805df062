"""Tells the runners that their command log has grown: by notification, and by a poll in case one was lost."""

import asyncio
import logging
from collections.abc import Mapping

from activities.matching.steps import COMMANDS_CHANNEL
from engine.runner import Runner
from storage.db import DATABASE_ERRORS, Connection, Pool
from storage.waiting import pause

log = logging.getLogger(__name__)

POLL_SECONDS = 0.2
RETRY_SECONDS = 1.0


class Wakeups:
    """Listens on one connection for all runners."""

    def __init__(self, pool: Pool, runners: Mapping[str, Runner]) -> None:
        self._pool = pool
        self._runners = runners

    async def run(self) -> None:
        """Listen until cancelled, through any outage of the database."""
        while True:
            try:
                async with self._pool.acquire() as conn:
                    await self._listen(conn)
            except DATABASE_ERRORS as error:
                log.warning("Lost the notifications of new commands: %r", error)
                await pause(RETRY_SECONDS)

    async def _listen(self, conn: Connection) -> None:
        await conn.add_listener(COMMANDS_CHANNEL, self._notified)
        try:
            while True:
                await self._poll(conn)
                await asyncio.sleep(POLL_SECONDS)
        finally:
            await conn.remove_listener(COMMANDS_CHANNEL, self._notified)

    async def _poll(self, conn: Connection) -> None:
        for instrument_id, last_seq in await conn.fetch("SELECT instrument_id, last_seq FROM matching.sequencers"):
            runner = self._runners.get(instrument_id)
            if runner is not None and last_seq > runner.command_seq:
                runner.wake()

    def _notified(self, _conn: object, _pid: int, _channel: str, instrument_id: object) -> None:
        runner = self._runners.get(str(instrument_id))
        if runner is not None:
            runner.wake()

"""The gateway's check that a session is still good: one look into Redis per request, many requests per look."""

import asyncio
from datetime import datetime

from redis.asyncio import Redis

from activities.identity.sessions import restore, session_key
from domain.problems import Problem
from storage.db import Pool

# Shorter than the client's own retries: a request is told at once to come again.
REDIS_SECONDS_MAX = 2.0


class SessionGuard:
    """Asks Redis for the sessions of all requests that arrive in the same turn of the loop with one MGET."""

    def __init__(self, pool: Pool, redis: Redis) -> None:
        self._pool = pool
        self._redis = redis
        self._asked: dict[str, asyncio.Future[bool]] = {}
        self._asking: set[asyncio.Task[None]] = set()

    async def require(self, session_id: str, now: datetime) -> None:
        """Raise Problem UNAUTHENTICATED unless the session is good. Redis without the key is not the last word."""
        if await self._in_redis(session_id) or await restore(self._pool, self._redis, session_id, now):
            return
        raise Problem("UNAUTHENTICATED", "The session is over; sign in again")

    async def _in_redis(self, session_id: str) -> bool:
        if session_id not in self._asked:
            self._asked[session_id] = asyncio.get_running_loop().create_future()
            if len(self._asked) == 1:
                task = asyncio.create_task(self._ask())
                self._asking.add(task)
                task.add_done_callback(self._asking.discard)
        # Shielded: a client that goes away must not cancel the answer of the others.
        return await asyncio.shield(self._asked[session_id])

    async def _ask(self) -> None:
        asked, self._asked = self._asked, {}
        try:
            async with asyncio.timeout(REDIS_SECONDS_MAX):
                values = await self._redis.mget([session_key(session_id) for session_id in asked])
        except BaseException as error:
            for answer in asked.values():
                answer.set_exception(error)
                answer.exception()  # Marks it as seen: every asker may be gone.
            if not isinstance(error, Exception):
                raise
            return
        for answer, value in zip(asked.values(), values, strict=True):
            answer.set_result(value is not None)

"""Who leads gives the lock back in any case."""

import asyncio

import pytest
from asyncpg import Record
from asyncpg.pool import PoolConnectionProxy

from storage.db import Connection, Pool
from storage.leadership import RELAY_LOCK, run_as_leader

HELD = (
    "SELECT count(*) FROM pg_locks l JOIN pg_database d ON d.oid = l.database"
    " WHERE l.locktype = 'advisory' AND l.granted AND d.datname = current_database()"
)


async def test_a_lock_whose_grant_came_too_late_is_given_back(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    stop, ask = asyncio.Event(), PoolConnectionProxy.fetchval

    async def answered_too_late(conn: "PoolConnectionProxy[Record]", query: str, *arguments: object) -> None:
        assert await ask(conn, query, *arguments) is True
        stop.set()
        raise TimeoutError

    async def work(_: Connection) -> None:
        raise AssertionError("Nobody may lead without knowing that the lock was granted")

    with monkeypatch.context() as patch:
        patch.setattr(PoolConnectionProxy, "fetchval", answered_too_late)
        await run_as_leader(pool, RELAY_LOCK, stop, work)
    assert await pool.fetchval(HELD) == 0

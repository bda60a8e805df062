"""Work divided over processes: each name has one leader, who prefers it gets it, and nobody's is taken over."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import pytest

from storage.db import Pool
from storage.leadership import STANDBY_SECONDS
from storage.territory import Claims, run_territory
from tests.waiting import until

LOCKS = {"a": 11 << 32, "b": (11 << 32) + 1, "c": 7}
PATIENCE = 2.0


class Worker:
    """Remembers where it leads, and every set of names it was started with."""

    def __init__(self) -> None:
        self.leads: frozenset[str] = frozenset()
        self.starts: list[frozenset[str]] = []
        self.failure: Exception | None = None

    async def work(self, names: frozenset[str]) -> None:
        assert not self.leads
        self.leads = names
        self.starts.append(names)
        try:
            if self.failure is not None:
                raise self.failure
            await asyncio.Event().wait()
        finally:
            self.leads = frozenset()

    async def until_it_leads(self, names: str) -> None:
        async def does() -> bool:
            return self.leads == frozenset(names)

        await until(does, 10, f"leading in {names!r}, at last in {sorted(self.leads)}")


Running = Callable[[str], AbstractAsyncContextManager[Worker]]


@pytest.fixture
def running(pool: Pool) -> Running:
    """A process that prefers some names, stopped at the end."""

    @asynccontextmanager
    async def run(preferred: str) -> AsyncIterator[Worker]:
        stop, worker = asyncio.Event(), Worker()
        claims = Claims(LOCKS, set(preferred), PATIENCE)
        task = asyncio.create_task(run_territory(pool, claims, stop, worker.work))
        try:
            yield worker
        finally:
            stop.set()
            await task

    return run


async def test_who_prefers_a_name_has_it_at_once_and_the_rest_when_nobody_takes_it(running: Running) -> None:
    async with running("a") as one, running("bc") as other:
        await one.until_it_leads("a")
        await other.until_it_leads("bc")
        await asyncio.sleep(PATIENCE + 2 * STANDBY_SECONDS)
        assert (one.starts, other.starts) == ([frozenset("a")], [frozenset("bc")])


async def test_what_nobody_prefers_is_taken_after_a_while_and_kept(running: Running) -> None:
    async with running("a") as one:
        await one.until_it_leads("a")
        await one.until_it_leads("abc")
        async with running("b") as late:
            await asyncio.sleep(2 * STANDBY_SECONDS)
            assert (one.leads, late.leads) == (frozenset("abc"), frozenset())


async def test_the_names_of_one_that_ends_go_to_the_others(running: Running) -> None:
    async with running("a") as one:
        async with running("bc") as other:
            await one.until_it_leads("a")
            await other.until_it_leads("bc")
        await one.until_it_leads("abc")


async def test_losing_the_connection_ends_the_work_and_the_names_are_claimed_anew(running: Running, pool: Pool) -> None:
    async with running("abc") as one:
        await one.until_it_leads("abc")
        await pool.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory'"
            " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
        )

        async def anew() -> bool:
            return len(one.starts) == 2 and one.leads == frozenset("abc")

        await until(anew, 10, "a second start")


async def test_a_failure_of_the_work_is_raised_and_the_locks_are_given_back(running: Running, pool: Pool) -> None:
    worker = Worker()
    worker.failure = ValueError("defect")
    with pytest.raises(ValueError, match="defect"):
        await run_territory(pool, Claims(LOCKS, "abc", PATIENCE), asyncio.Event(), worker.work)
    async with running("abc") as other:
        await other.until_it_leads("abc")

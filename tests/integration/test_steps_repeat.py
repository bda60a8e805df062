"""Every step may run again, whole or after a crash between any two of its statements, and has its effect once."""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest
from redis.asyncio import Redis

from activities.ledger.audit import run_audit
from activities.ledger.transfers import transfer_external
from domain.funding import FundingPage, FundingRun, FundingSnapshot, LogPosition
from domain.sagas import Acceptance, OrderBatch, Outcome, StepRequest
from storage.db import Pool, open_pool
from storage.once import NotYetError
from tests.conftest import COPY_OF_TEMPLATE
from tests.integration.ledger_world import BTC, ETH, World, dump, limit, market, settlement_steps

NOON = datetime(2099, 1, 1, 12, tzinfo=UTC)
# One connection to run a statement on; everything else a step does with its connection passes through.
STATEMENTS = ("execute", "fetch", "fetchval", "fetchrow", "copy_records_to_table")


class CrashError(Exception):
    """The process ended here."""


class Fuse:
    """Lets `left` statements through, then crashes; None lets everything through."""

    def __init__(self) -> None:
        self.left: int | None = None

    def burn(self) -> None:
        if self.left is not None:
            if not self.left:
                raise CrashError
            self.left -= 1


class Fused:
    """A pool or a connection whose statements burn the fuse."""

    def __init__(self, inner: Any, fuse: Fuse) -> None:
        self._inner = inner
        self._fuse = fuse

    def __getattr__(self, name: str) -> Any:
        if name not in STATEMENTS:
            return getattr(self._inner, name)

        async def statement(*args: Any, **options: Any) -> Any:
            self._fuse.burn()
            return await getattr(self._inner, name)(*args, **options)

        return statement

    @asynccontextmanager
    async def acquire(self) -> AsyncIterator["Fused"]:
        async with self._inner.acquire() as conn:
            yield Fused(conn, self._fuse)


Activity = Callable[[], Awaitable[object]]


async def script(world: World) -> AsyncIterator[tuple[str, Activity]]:
    """A day on the exchange, activity by activity: the test runs each one as it likes before it goes on."""
    await world.deposit(100_000, 1, 2, 3)
    await world.deposit(6_200, 4)
    await world.cross(4)
    await world.mark(60_000)

    first = await world.take_in(
        limit(2, "SELL", "1", 60_000),
        limit(4, "BUY", "1", 60_000),
        limit(3, "BUY", "0.5", 45_000),
        limit(9, "BUY", "1", 1),
    )
    for step in placement(world, first):
        yield step
    async for settling in settlement_steps(world, BTC):
        yield settling

    # One amendment is carried out, one goes beyond the limits, and one comes too late.
    larger = await world.take_in_amendment(3, first.order_ids[2], 44_000, "0.7")
    for step in placement(world, larger):
        yield step
    async for settling in settlement_steps(world, BTC):
        yield settling
    huge = await world.take_in_amendment(3, first.order_ids[2], quantity="500")
    for step in placement(world, huge):
        yield step
    late_order = (await world.place(limit(1, "BUY", "0.1", 40_000)))[0]
    await world.match(BTC)
    too_late = await world.take_in_amendment(1, late_order, quantity="0.2")
    await world.cancel(late_order)
    for step in placement(world, too_late):
        yield step
    async for settling in settlement_steps(world, BTC):
        yield settling
    ends = [await world.amendment(batch.order_ids[0]) for batch in (larger, huge, too_late)]
    assert ends == [("AMENDED", None), ("FAILED", "RISK_LIMIT_EXCEEDED"), ("REJECTED", "ORDER_NOT_FOUND")]

    # Both see the money of user 4, one gets it.
    early = await world.take_in(limit(4, "BUY", "0.04", 40_000))
    late = await world.take_in(limit(4, "BUY", "0.5", 3_000, ETH), limit(1, "BUY", "0.5", 3_000, ETH))
    request = StepRequest(late.saga_id, 1, late.order_ids)
    yield "check_orders", lambda: world.risk.check_orders(request)
    for step in placement(world, early):
        yield step
    frozen = Outcome()

    async def freeze() -> Outcome:
        nonlocal frozen
        frozen = await world.ledger.freeze_funds(request)
        return frozen

    yield "freeze_funds", freeze
    assert [refusal.order_id for refusal in frozen.refused] == late.order_ids[:1]
    undo = StepRequest(late.saga_id, 1, late.order_ids[:1])
    yield "release_orders", lambda: world.risk.release_orders(undo)
    yield "unfreeze_funds", lambda: world.ledger.unfreeze_funds(undo)
    yield "accept", lambda: world.orders.accept(Acceptance(late.saga_id, frozen.passed, frozen.refused))

    # User 4 loses more than the order at 40 000 leaves over: with terms, the engine would not let that happen.
    world.matchers[BTC.instrument_id].book.accounts[4].leverage = 0
    await world.mark(54_000)
    await world.place(limit(3, "BUY", "1", 54_000))
    await world.place(market(4, "SELL", "1", 50_000))
    async for settling in settlement_steps(world, BTC):
        yield settling
    async for settling in settlement_steps(world, BTC):
        yield settling

    cancels = await world.take_in_cancels(first.order_ids[2], late.order_ids[1])
    yield "request_cancels", lambda: world.orders.request_cancels(cancels)
    async for settling in settlement_steps(world, BTC):
        yield settling
    async for settling in settlement_steps(world, ETH):
        yield settling

    await world.publish_rate(NOON, "0.2", "50000.01")
    for step in funding(world, FundingRun(BTC.instrument_id, NOON.isoformat())):
        yield step

    # User 2, who is short, has nothing but margin to pay with.
    available, _ = await world.balance(2)
    async with world.pool.acquire() as conn, conn.transaction():
        await transfer_external(conn, "WITHDRAWAL", "all", 2, "USDT", -available)
    evening = NOON + timedelta(hours=8)
    await world.publish_rate(evening, "-0.05", "50000.01")
    run = FundingRun(BTC.instrument_id, evening.isoformat())

    async def announce() -> str:
        with pytest.raises(NotYetError):
            await world.ledger.settle_funding(FundingPage(run, 0))
        return "announced"

    for name, activity in funding(world, run):
        if name == "settle_funding":
            yield "announce", announce
            await world.settle(BTC)
        yield name, activity


def placement(world: World, batch: OrderBatch) -> Iterator[tuple[str, Activity]]:
    """As if all passes that risk lets through."""
    request = StepRequest(batch.saga_id, 1, batch.order_ids)
    checked = frozen = Outcome()

    async def check() -> Outcome:
        nonlocal checked
        checked = await world.risk.check_orders(request)
        return checked

    async def freeze() -> Outcome:
        nonlocal frozen
        frozen = await world.ledger.freeze_funds(request)
        return frozen

    yield "check_orders", check
    yield "freeze_funds", freeze
    yield "accept", lambda: world.orders.accept(Acceptance(batch.saga_id, frozen.passed, checked.refused))


def funding(world: World, run: FundingRun) -> Iterator[tuple[str, Activity]]:
    name = run.instrument_id
    seq = world.matchers[name].event_seq
    yield "open_funding", lambda: world.ledger.open_funding(run)
    yield "last_command", lambda: world.matching.last_command(name)
    yield "events_of", lambda: world.matching.events_of(LogPosition(name, 1))
    yield "fix_funding_positions", lambda: world.positions.fix_funding_positions(FundingSnapshot(run, seq))
    yield "settle_funding", lambda: world.ledger.settle_funding(FundingPage(run, 0))
    yield "confirm_funding", lambda: world.positions.confirm_funding(FundingPage(run, 0))
    yield "close_funding", lambda: world.ledger.close_funding(run)


@pytest.fixture
async def other_pool(postgres_url: str) -> AsyncIterator[Pool]:
    """A second database, for the run that nothing happens to."""
    admin = await asyncpg.connect(postgres_url)
    await admin.execute(f"CREATE DATABASE undisturbed {COPY_OF_TEMPLATE}")
    opened = await open_pool(postgres_url.replace("/postgres?", "/undisturbed?", 1))
    yield opened
    opened.terminate()
    await admin.execute("DROP DATABASE undisturbed WITH (FORCE)")
    await admin.close()


async def test_a_step_run_twice_answers_the_same_and_changes_nothing_more(pool: Pool, redis: Redis) -> None:
    seen = set()
    async for name, run in script(World(pool, redis)):
        first = await run()
        before = await dump(pool)
        again = await run()
        # A cancellation requested already is not requested again, and that is what its answer counts.
        assert name == "request_cancels" or again == first, name
        assert await dump(pool) == before, name
        seen.add(name)
    assert seen == {
        "check_orders", "freeze_funds", "release_orders", "unfreeze_funds", "accept", "request_cancels",
        "apply_trades", "risk.apply_events", "settle", "confirm", "orders.apply_events", "cancel_uncovered",
        "acknowledge", "open_funding", "last_command", "events_of", "fix_funding_positions", "settle_funding",
        "confirm_funding", "close_funding", "announce",
    }  # fmt: skip
    assert (await run_audit(pool)).ok


async def test_a_crash_between_any_two_statements_leaves_no_trace(pool: Pool, other_pool: Pool, redis: Redis) -> None:
    fuse = Fuse()
    undisturbed = script(World(other_pool, redis))
    crashes = 0
    async for name, run in script(World(pool, redis, faulty=Fused(pool, fuse))):
        expected_name, run_undisturbed = await anext(undisturbed)
        assert name == expected_name
        expected = await run_undisturbed()
        before = await dump(pool)
        for fuse.left in range(100):
            try:
                answer = await run()
            except CrashError:
                crashes += 1
                # These are several transactions, of which each changes nothing when it comes again.
                several = name in ("acknowledge", "confirm_funding")
                assert several or await dump(pool) == before, f"{name} after {fuse.left} statements"
            else:
                break
        fuse.left = None
        assert answer == expected, name
        assert await dump(pool) == await dump(other_pool), name
    assert crashes > 100
    assert (await run_audit(pool)).ok

"""Every step of a liquidation may run again, whole or after a crash between any two statements."""

from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis

from activities.ledger.audit import run_audit
from domain.liquidation_saga import Claim, Ending, Plan, PlanRequest, Submission, Takeover
from storage.db import Pool
from tests.integration.ledger_world import dump, limit, settlement_steps
from tests.integration.liquidation_world import LiquidationWorld, publish_mark
from tests.integration.test_steps_repeat import Activity, Fuse, Fused, other_pool
from tests.integration.test_steps_repeat import CrashError as Crash

__all__ = ["other_pool"]


async def script(world: LiquidationWorld) -> AsyncIterator[tuple[str, Activity]]:
    """A liquidation that needs the book, the fund, and at last others' positions."""
    await publish_mark(world.redis, 60_000)
    await world.fund(100)
    await world.deposit(100_000, 1, 2, 3)
    await world.trade(1, 2, "1", 60_000)
    await world.place(limit(3, "BUY", "0.4", 53_900), limit(1, "BUY", "0.1", 50_000))
    await world.settle()
    await world.marked(53_950)
    takeover = Takeover(1, is_open=False)

    async def begin() -> Takeover:
        nonlocal takeover
        takeover = await world.liquidations.begin(1)
        return takeover

    yield "begin", begin
    yield "cancel", lambda: world.orders.cancel_for_liquidation(takeover)
    async for step in settlement_steps(world):
        yield step
    first = await world.liquidations.plan(PlanRequest(1))
    assert first.action == "ORDER"
    claim = Claim(1, 1, first.asset, first.insurance)
    yield "claim", lambda: world.insurance.claim(claim)
    yield "submit", lambda: world.liquidations.submit(Submission(1, 1, first, "100"))
    async for step in settlement_steps(world):
        yield step
    second: Plan = await world.liquidations.plan(PlanRequest(1, first.action, first.target))
    assert second.action == "DELEVERAGE", second
    yield "deleverage", lambda: world.liquidations.deleverage(Submission(1, 2, second))
    async for step in settlement_steps(world):
        yield step
    yield "release", lambda: world.insurance.release(1)
    yield "finish", lambda: world.liquidations.finish(Ending(1, "PROCESSED"))


async def test_a_step_run_twice_answers_the_same_and_changes_nothing_more(pool: Pool, redis: Redis) -> None:
    async for name, run in script(LiquidationWorld(pool, redis)):
        first = await run()
        before = await dump(pool)
        again = await run()
        # What is requested already is not requested again, and that is what this answer counts.
        assert name == "cancel" or again == first, name
        assert await dump(pool) == before, name
    assert await pool.fetchval("SELECT status FROM risk.liquidation_queue") == "PROCESSED"
    assert (await run_audit(pool)).ok


@pytest.mark.timeout(90)
async def test_a_crash_between_any_two_statements_leaves_no_trace(pool: Pool, other_pool: Pool, redis: Redis) -> None:
    fuse = Fuse()
    undisturbed = script(LiquidationWorld(other_pool, redis))
    crashes = 0
    async for name, run in script(LiquidationWorld(pool, redis, faulty=Fused(pool, fuse))):
        expected_name, run_undisturbed = await anext(undisturbed)
        assert name == expected_name
        before = await dump(pool)
        for fuse.left in range(100):
            try:
                answer = await run()
            except Crash:
                crashes += 1
                assert name == "acknowledge" or await dump(pool) == before, f"{name} after {fuse.left} statements"
            else:
                break
        fuse.left = None
        # Ids of orders that a crash used up are gone: the other run gets the one that was used in the end.
        used = await pool.fetchval("SELECT max(order_id) FROM orders.orders")
        if name == "submit":
            await other_pool.execute("SELECT setval('orders.order_id_seq', $1, FALSE)", used)
        expected = await run_undisturbed()
        assert answer == expected, name
        assert await dump(pool) == await dump(other_pool), name
    assert crashes > 60
    assert (await run_audit(pool)).ok

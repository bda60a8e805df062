"""What may leave, tried from two connections at once, and around a funding time."""

import asyncio
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest
from redis.asyncio import Redis

from activities.ledger.audit import run_audit
from activities.ledger.transfers import transfer_external
from activities.risk.collateral import free_collateral
from activities.risk.exposures import set_margin_mode
from domain.funding import FundingRun
from domain.problems import Problem
from storage.db import Pool
from tests.integration.ledger_world import BTC, ETH, World, advance, assert_conserved, finish, limit

D = Decimal


@pytest.fixture
async def world(pool: Pool, redis: Redis) -> World:
    world = World(pool, redis)
    await world.deposit(1_000_000, 2, 3)
    return world


async def free(world: World, user: int = 1) -> Decimal:
    async with world.pool.acquire() as conn:
        return (await free_collateral(conn, [user]))[user, "USDT"]


async def cross_loss(world: World) -> None:
    """User 1: cross long 1 BTC at 60000, 10,000 deposited, 3,000 lost."""
    await world.deposit(10_000, 1)
    async with world.pool.acquire() as conn, conn.transaction():
        await set_margin_mode(conn, 1, BTC, "CROSS")
    await world.trade(1, 2, "1", 60_000)
    await world.mark(57_000)


async def withdraw(world: World, amount: object, reference: str, user: int = 1) -> bool:
    async with world.pool.acquire() as conn, conn.transaction():
        try:
            return await transfer_external(conn, "WITHDRAWAL", reference, user, "USDT", -D(str(amount)))
        except Problem:
            return False


async def test_two_withdrawals_wait_for_one_another(world: World) -> None:
    await cross_loss(world)
    left = await free(world)
    assert left == D(970)
    async with world.pool.acquire() as conn:
        tx = conn.transaction()
        await tx.start()
        await transfer_external(conn, "WITHDRAWAL", "a", 1, "USDT", D(-600))
        other = asyncio.create_task(withdraw(world, 600, "b"))
        await asyncio.sleep(0.3)
        assert not other.done()
        await tx.commit()
        assert not await other
    assert await free(world) == left - 600
    done = await asyncio.gather(*(withdraw(world, 100, f"r{n}") for n in range(8)))
    assert sum(done) == 3
    assert await free(world) == 70


@pytest.mark.parametrize("order_mode", ["ISOLATED", "CROSS"])
async def test_withdrawal_between_check_and_freeze(world: World, order_mode: str) -> None:
    await cross_loss(world)
    async with world.pool.acquire() as conn, conn.transaction():
        await set_margin_mode(conn, 1, ETH, order_mode)
    batch = await world.take_in(limit(1, "BUY", "2", 3_000, ETH))
    steps = world.placement(batch)
    await advance(steps, "checked")
    assert await withdraw(world, 970, "a")
    await finish(steps)
    assert await world.status(batch.order_ids[0]) == ("FAILED", "INSUFFICIENT_MARGIN")
    assert await free(world) == 0


async def test_withdrawal_between_plan_and_move(world: World) -> None:
    await cross_loss(world)
    await world.trade(1, 3, "1", 3_000, ETH)
    left = await free(world)
    steps = world.change_margin(world.margin_change(1, "MARGIN", str(left), ETH))
    await advance(steps, "planned")
    assert await withdraw(world, left, "a")
    assert await anext(steps) == "INSUFFICIENT_FUNDS"
    assert await free(world) == 0
    assert await world.change(world.margin_change(1, "MARGIN", "0.01", ETH)) == "INSUFFICIENT_FUNDS"


async def begin(world: World, side: str = "BUY") -> FundingRun:
    """User 1 with 30,000 holds 4 BTC at 100x at a funding time that has just passed."""
    await world.deposit(30_000, 1)
    await world.lever(1, 100)
    if side == "BUY":
        await world.trade(1, 2, "4", 60_000)
    else:
        await world.trade(2, 1, "4", 60_000)
    await world.trade(1, 3, "1", 3_000, ETH)
    await world.schedule_funding(1, "0.00375")
    now = datetime.now(UTC)
    moment = now.replace(microsecond=0) + timedelta(seconds=1)
    # all earlier times have a rate and are collected
    await world.publish_rate(moment - timedelta(seconds=1), "0", 60_000)
    await finish(world.funding(FundingRun(BTC.instrument_id, (moment - timedelta(seconds=1)).isoformat())))
    await asyncio.sleep((moment - datetime.now(UTC)).total_seconds() + 0.05)
    await world.pool.execute("UPDATE market.funding_schedules SET interval_seconds = 1000000000")
    await world.pool.execute("UPDATE market.funding_schedules SET interval_seconds = $1", int(moment.timestamp()))
    return FundingRun(BTC.instrument_id, moment.isoformat())


@pytest.mark.parametrize("side", ["BUY", "SELL"])
async def test_a8(world: World, side: str) -> None:
    run = await begin(world, side)
    available, _ = await world.balance(1)
    assert await free(world) == available - 900  # 240,000 * 0.375 %
    # closes after the time
    if side == "BUY":
        await world.trade(3, 1, "4", 60_000)
    else:
        await world.trade(1, 3, "4", 60_000)
    available, _ = await world.balance(1)
    assert await free(world) == available - 900
    assert not await withdraw(world, available - 899, "a")
    assert await world.change(world.margin_change(1, "MARGIN", str(available - 899), ETH)) == "INSUFFICIENT_FUNDS"
    assert await world.change(world.margin_change(1, "MARGIN", str(available - 900), ETH)) is None
    assert not await withdraw(world, "0.01", "b")
    rate = "0.0002" if side == "BUY" else "-0.0002"
    await world.publish_rate(run.time, rate, 60_000)
    assert (await world.balance(1))[0] - await free(world) == 48
    steps = world.funding(run)
    await advance(steps, "fixed")
    assert (await world.balance(1))[0] - await free(world) == 48
    await advance(steps, "paid")
    assert (await world.balance(1))[0] == await free(world) == 852
    await finish(steps)
    assert await world.system("exchange:insurance_fund") == 0
    assert await withdraw(world, 852, "c")
    assert (await run_audit(world.pool)).ok
    await assert_conserved(world)


async def test_receiver_owes_nothing_once_the_rate_is_known(world: World) -> None:
    run = await begin(world, "BUY")
    await world.publish_rate(run.time, "-0.0002", 60_000)
    assert (await world.balance(1))[0] == await free(world)


async def test_settlement_does_not_let_asks_take_what_a_loss_stands_on(world: World) -> None:
    """An isolated long lost its margin, and asks rest against it: closing it makes them need all of theirs."""
    await world.deposit(20_000, 1)
    async with world.pool.acquire() as conn, conn.transaction():
        await set_margin_mode(conn, 1, BTC, "CROSS")
    await world.lever(1, 10)
    await world.trade(1, 2, "1", 60_000)
    await world.trade(1, 3, "20", 3_000, ETH)
    await world.mark(3_000, ETH)
    await world.place(limit(1, "SELL", "20", "3200", ETH))
    await world.settle(ETH)
    await world.mark(2_750, ETH)
    await world.mark(52_500)
    await world.place(limit(3, "BUY", "20", "2750", ETH))
    await world.place(limit(1, "SELL", "20", "2750", ETH, time_in_force="IOC", reduce_only=True))
    await world.settle(ETH)
    assert await free(world) >= 0


async def test_uncovered_asks_are_cancelled(world: World) -> None:
    """As above, and what becomes of the orders."""
    await test_settlement_does_not_let_asks_take_what_a_loss_stands_on(world)
    rows = await world.pool.fetch(
        "SELECT order_margin, position_margin, order_short FROM ledger.margin_holds"
        " WHERE user_id = 1 AND instrument_id = $1",
        ETH.instrument_id,
    )
    assert [tuple(row) for row in rows] == [(0, 0, 0)]
    assert (
        await world.pool.fetchval("SELECT count(*) FROM orders.orders WHERE user_id = 1 AND status = 'CANCELLED'") == 1
    )
    assert (await run_audit(world.pool)).ok
    await assert_conserved(world)


@pytest.mark.parametrize("mode", ["ISOLATED", "CROSS"])
@pytest.mark.parametrize("side", ["BUY", "SELL"])
async def test_the_payer_pays_from_anywhere(world: World, side: str, mode: str) -> None:
    await world.deposit(20_000, 1)
    async with world.pool.acquire() as conn, conn.transaction():
        await set_margin_mode(conn, 1, BTC, mode)
        await set_margin_mode(conn, 1, ETH, mode)
    buyer, seller = (1, 2) if side == "BUY" else (2, 1)
    await world.trade(buyer, seller, "1", 60_000)
    await world.trade(buyer, seller, "10", 3_000, ETH)
    orders = await world.place(limit(1, side, "20", 3_000, ETH))
    await world.settle(ETH)
    assert await world.status(orders[0]) == ("PLACED", None)
    assert await withdraw(world, await free(world), "all")
    _, reserved = await world.balance(1)
    assert reserved > 15_000
    await world.settle(BTC)
    moment = await world.pool.fetchval("SELECT clock_timestamp() - interval '1 ms'")
    run = FundingRun(BTC.instrument_id, moment.isoformat())
    await world.publish_rate(run.time, "0.25" if side == "BUY" else "-0.25", 60_000)
    await finish(world.funding(run))
    await world.settle(ETH)
    assert await world.system("exchange:insurance_fund") == 0
    available, left = await world.balance(1)
    assert available + left == reserved - 15_000
    assert (await world.status(orders[0]))[0] == "CANCELLED"
    report = await run_audit(world.pool)
    assert report.ok, [c for c in report.checks if not c.ok]
    await assert_conserved(world)


async def test_a_withdrawal_while_a_page_is_booked(world: World) -> None:
    """Everybody withdraws all that is free, all the time, while the run collects: the fund pays nothing."""
    run = await begin(world)
    await world.trade(3, 1, "4", 60_000)
    await world.publish_rate(run.time, "0.0037", 60_000)
    stop = asyncio.Event()

    async def drain(name: str) -> None:
        n = 0
        while not stop.is_set():
            n += 1
            left = await free(world)
            if left > 0:
                await withdraw(world, left, f"{name}{n}")
            await withdraw(world, 1, f"{name}-one{n}")
            await asyncio.sleep(0)

    drains = [asyncio.create_task(drain(f"d{n}")) for n in range(3)]
    await asyncio.sleep(0.1)
    await finish(world.funding(run))
    await asyncio.sleep(0.1)
    stop.set()
    await asyncio.gather(*drains)
    assert await world.system("exchange:insurance_fund") == 0
    assert await world.pool.fetchval("SELECT insurance FROM ledger.funding_runs WHERE funding_time = $1", run.time) == 0
    assert await free(world) == 0
    await assert_conserved(world)

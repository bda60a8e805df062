"""A loss that is larger than the insurance fund: nobody can bring one about, and what the market does shows."""

import logging
from decimal import Decimal
from typing import Any

import pytest
from redis.asyncio import Redis

from activities.ledger.audit import run_audit
from activities.ledger.transfers import transfer_external
from domain.funding import FundingPage, FundingRun, FundingSnapshot
from domain.matching import Side
from storage.db import Pool
from storage.once import NotYetError
from telemetry.alerts import INSURANCE_SHORTFALL
from tests.integration.ledger_world import BTC, ETH, advance, assert_audit_is_clean, assert_conserved, limit
from tests.integration.liquidation_world import LiquidationWorld
from tests.integration.test_steps_guards import OPPOSITE, SIDES, Market

D = Decimal
A, B, C, M = 1, 2, 3, 4
FUND, SHORTFALL = "exchange:insurance_fund", "exchange:shortfall"
SEED, MARGIN = 1_000_000, 480_000


async def opened(pool: Pool, redis: Redis, side: Side, *users: int) -> Market:
    """Each of `users` has 80 BTC of a side at 60000 and 10x against B, in margin 480000, and nothing else."""
    world = LiquidationWorld(pool, redis)
    market = Market(world)
    await world.fund(SEED)
    await world.deposit(10_000_000, B, M)
    await market.move(60_000)
    for user in users:
        await world.deposit(1_000_000, user)
        await world.trade(*((user, B) if side == "BUY" else (B, user)), "80", 60_000)
        await withdraw_all(world, user)
    return market


async def withdraw_all(world: LiquidationWorld, user: int) -> Decimal:
    available, _ = await world.balance(user)
    async with world.pool.acquire() as conn, conn.transaction():
        await transfer_external(conn, "WITHDRAWAL", f"all-{user}", user, "USDT", -available)
    return available


def liquidating(market: Market) -> LiquidationWorld:
    assert isinstance(market.world, LiquidationWorld)
    return market.world


@SIDES
@pytest.mark.parametrize("mode", ["ISOLATED", "CROSS"])
@pytest.mark.parametrize(
    ("kind", "reduce_only", "reasons"),
    [
        # In cross mode, what is lost beyond the mark has to be free, and is not.
        ("LIMIT", False, {"ISOLATED": "MARGIN_AT_MARK", "CROSS": "OPEN_LOSS_NOT_COVERED"}),
        ("LIMIT", True, dict.fromkeys(("ISOLATED", "CROSS"), "MARGIN_AT_MARK")),
        ("MARKET", True, dict.fromkeys(("ISOLATED", "CROSS"), "PROTECTION_PRICE")),
    ],
)
async def test_nobody_closes_at_a_loss_beyond_the_fund(
    pool: Pool, redis: Redis, side: Side, mode: str, kind: Any, reasons: dict[str, str], *, reduce_only: bool
) -> None:
    """A4: the loss would be 400000 more than margin and fund together, and B's to take out."""
    market = await opened(pool, redis, side, A)
    world = liquidating(market)
    if mode == "CROSS":
        await world.make_cross(A, [BTC])
    far = await market.beyond(OPPOSITE[side], (MARGIN + SEED + 400_000) // 80)
    bid = await market.send(B, side, "LIMIT", "80", far)
    order = await market.send(A, OPPOSITE[side], kind, "80", far if kind == "LIMIT" else None, reduce_only=reduce_only)
    assert (await market.state(order))[1:] == (reasons[mode], D(0))
    assert await market.state(bid) == ("PLACED", None, D(0))
    assert await world.system(FUND) == SEED
    await world.cancel(bid)
    await world.settle()
    # The winner of it takes out no more than they brought, less the fee of the trade that opened the position.
    assert await withdraw_all(world, B) < 10_000_000 - MARGIN
    assert await world.system(FUND) == SEED
    await assert_conserved(world)
    await assert_audit_is_clean(world)


@SIDES
async def test_a_mark_that_jumps_beyond_the_fund_leaves_it_at_zero_or_more(
    pool: Pool, redis: Redis, side: Side
) -> None:
    """Two such positions, each worth 968000 below zero: the fund pays for one, and the other one is deleveraged."""
    market = await opened(pool, redis, side, A, C)
    world = liquidating(market)
    sign = 1 if side == "BUY" else -1
    mark = 60_000 - sign * 18_100
    await world.mark(mark)
    await world.place(limit(M, side, "100", mark + sign * 50))
    await world.settle()
    due = await world.marked(mark)
    assert {found.user_id for found in due} == {A, C}
    taken = [await world.liquidate(found.liquidation_id) for found in due]
    assert "deleveraged" not in taken[0]
    assert "deleveraged" in taken[1]
    for user in (A, C):
        assert await world.position(user) == (D(0), D(0), "CLOSED")
        assert await world.balance(user) == (D(0), D(0))
    assert 0 <= await world.system(FUND) < 100_000
    assert await pool.fetchval("SELECT count(*) FROM ledger.system_balances WHERE account = $1", SHORTFALL) == 0
    await assert_conserved(world)
    await assert_audit_is_clean(world)


@SIDES
async def test_what_the_fund_lacks_after_a_jump_is_told_and_stands_in_the_books(
    pool: Pool, redis: Redis, side: Side, caplog: pytest.LogCaptureFixture
) -> None:
    """An order counts on most of the fund, and before it is filled funding of somebody who has nothing takes 897000."""
    market = await opened(pool, redis, side, A)
    world = liquidating(market)
    sign = 1 if side == "BUY" else -1
    await world.deposit(100_000, C)
    await world.trade(C, B, "10", 3_000, ETH)
    await withdraw_all(world, C)
    mark = 60_000 - sign * 18_100
    await world.mark(mark)
    await world.place(limit(M, side, "80", mark + sign * 50))
    await world.settle()
    [due] = [found for found in await world.marked(mark) if found.user_id == A]
    steps = world.liquidation(due.liquidation_id)
    await advance(steps, "submitted")
    await pay_funding(world, "30")
    assert await world.system(FUND) == SEED - 897_000
    with caplog.at_level(logging.ERROR):
        await world.settle()
    [drawn] = await pool.fetchval(
        "SELECT array_agg(amount) FROM ledger.insurance_draws WHERE liquidation_id = $1", due.liquidation_id
    )
    lacking = drawn - (SEED - 897_000)
    assert lacking > 0
    assert await world.system(FUND) == 0
    assert await world.system(SHORTFALL) == -lacking
    assert [r for r in caplog.records if getattr(r, "alert", None) == INSURANCE_SHORTFALL]
    # What is left of the position costs nobody anything more.
    async for step in steps:
        if step == "waits":
            await world.settle()
    assert await world.position(A) == (D(0), D(0), "CLOSED")
    assert await world.system(FUND) >= 0
    assert await world.system(SHORTFALL) == -lacking
    await assert_conserved(world)
    report = await run_audit(pool)
    assert [check.name for check in report.checks if not check.ok] == ["nothing_is_in_shortfall"]


async def pay_funding(world: LiquidationWorld, rate: str) -> None:
    """A funding time of ETH is settled; BTC stands still meanwhile."""
    name = ETH.instrument_id
    moment = await world.pool.fetchval("SELECT clock_timestamp()")
    await world.publish_rate(moment, rate, 3_000, ETH)
    run = FundingRun(name, moment.isoformat())
    assert await world.ledger.open_funding(run)
    await world.positions.fix_funding_positions(FundingSnapshot(run, world.settled[name]))
    page = FundingPage(run, 0)
    with pytest.raises(NotYetError):
        await world.ledger.settle_funding(page)
    await world.settle(ETH)
    await world.ledger.settle_funding(page)
    await world.positions.confirm_funding(page)
    await world.ledger.close_funding(run)

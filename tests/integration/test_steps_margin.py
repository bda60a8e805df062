"""Changing leverage and position margin while orders and positions are open, step by step."""

from collections.abc import AsyncIterator
from decimal import Decimal

import pytest
import pytest_asyncio
from redis.asyncio import Redis

from activities.ledger.transfers import transfer_external
from activities.risk.collateral import free_collateral
from activities.risk.exposures import set_margin_mode
from domain.problems import Problem
from domain.sagas import StepRequest
from storage.db import Pool
from tests.integration.ledger_world import (
    BTC,
    World,
    advance,
    assert_audit_is_clean,
    assert_conserved,
    dump,
    finish,
    limit,
    market,
)

D = Decimal


@pytest_asyncio.fixture
async def world(pool: Pool, redis: Redis) -> AsyncIterator[World]:
    world = World(pool, redis)
    await world.deposit(100_000, 2, 3)
    yield world
    await assert_conserved(world)
    await assert_audit_is_clean(world)


async def held(world: World, user_id: int = 1) -> tuple[Decimal, Decimal]:
    """Position margin as the ledger holds it and as positions shows it."""
    row = await world.pool.fetchrow(
        "SELECT h.position_margin, p.margin FROM ledger.margin_holds h JOIN positions.positions p"
        " USING (user_id, instrument_id) WHERE user_id = $1 AND instrument_id = $2",
        user_id,
        BTC.instrument_id,
    )
    assert row is not None
    return row[0], row[1]


async def liquidation_price(world: World) -> Decimal:
    return Decimal(await world.pool.fetchval("SELECT liquidation_price FROM positions.positions WHERE user_id = 1"))


async def open_long(world: World, quantity: str = "1") -> None:
    """User 1 buys at 60,000 with leverage 10: 6,000 of margin and 30 of fees for one coin."""
    await world.trade(1, 2, quantity, 60_000)
    await world.mark(60_000)


async def test_added_margin_moves_from_available_to_the_position(world: World) -> None:
    await world.deposit(10_000, 1)
    await open_long(world)
    before = await liquidation_price(world)
    assert await world.change(world.margin_change(1, "MARGIN", "1000")) is None
    assert await held(world) == (D(7_000), D(7_000))
    assert await world.balance(1) == (D(2_970), D(7_000))
    assert await liquidation_price(world) < before


async def test_margin_comes_back_down_to_what_the_position_needs(world: World) -> None:
    await world.deposit(10_000, 1)
    await open_long(world)
    assert await world.change(world.margin_change(1, "MARGIN", "500")) is None
    assert await world.change(world.margin_change(1, "MARGIN", "-500.01")) == "INSUFFICIENT_MARGIN"
    assert await world.change(world.margin_change(1, "MARGIN", "-500")) is None
    await world.mark(59_000)
    assert await world.change(world.margin_change(1, "MARGIN", "900")) is None
    # 1,000 are lost by now: they have to stay.
    assert await world.change(world.margin_change(1, "MARGIN", "-0.01")) == "INSUFFICIENT_MARGIN"
    assert await held(world) == (D(6_900), D(6_900))


async def test_more_margin_than_is_available_is_refused_and_nothing_moves(world: World) -> None:
    await world.deposit(10_000, 1)
    await open_long(world)
    before = await dump(world.pool, without=["risk.steps", "ledger.steps"])
    assert await world.change(world.margin_change(1, "MARGIN", "3970.00000001")) == "INSUFFICIENT_FUNDS"
    assert await dump(world.pool, without=["risk.steps", "ledger.steps"]) == before


async def test_without_a_position_or_a_mark_there_is_no_margin_to_change(world: World) -> None:
    await world.deposit(10_000, 1)
    assert await world.change(world.margin_change(1, "MARGIN", "1")) == "POSITION_NOT_FOUND"
    await world.trade(1, 2, "1", 60_000)
    await world.pool.execute("DELETE FROM market.mark_prices")
    assert await world.change(world.margin_change(1, "MARGIN", "1")) == "MARK_PRICE_UNAVAILABLE"
    assert await world.change(world.margin_change(1, "LEVERAGE", "5")) == "MARK_PRICE_UNAVAILABLE"


async def test_lower_leverage_takes_more_for_orders_and_position(world: World) -> None:
    await world.deposit(20_000, 1)
    await open_long(world)
    await world.place(limit(1, "BUY", "0.5", 50_000))
    # Orders: 25,000 / 10 + 12.5.
    assert await world.balance(1) == (D(20_000) - 30 - 6_000 - D("2512.5"), D("8512.5"))
    assert await world.lever(1, 5) is None
    assert await held(world) == (D(12_000), D(12_000))
    assert await world.balance(1) == (D(20_000) - 30 - 12_000 - D("5012.5"), D("17012.5"))
    assert await world.lever(1, 4) == "INSUFFICIENT_MARGIN"
    assert await world.pool.fetchval("SELECT leverage FROM positions.positions WHERE user_id = 1") == 5


async def test_higher_leverage_releases_what_need_not_stay(world: World) -> None:
    await world.deposit(20_000, 1)
    await open_long(world)
    await world.place(limit(1, "BUY", "0.5", 50_000))
    await world.mark(59_000)
    assert await world.lever(1, 20) is None
    # 60,000 / 20 and the loss of 1,000.
    assert await held(world) == (D(4_000), D(4_000))
    assert await world.balance(1) == (D(20_000) - 30 - 4_000 - D("1262.5"), D("5262.5"))


async def test_leverage_above_the_tier_or_the_limit_of_the_user_is_refused(world: World) -> None:
    await world.deposit(1_000_000, 1)
    await world.mark(60_000)
    assert await world.lever(1, 101) == "RISK_LIMIT_EXCEEDED"
    await world.place(limit(1, "BUY", "5", 60_000))
    assert await world.lever(1, 100) == "RISK_LIMIT_EXCEEDED"


async def test_fills_after_the_change_are_backed_at_the_new_leverage(world: World) -> None:
    await world.deposit(20_000, 1)
    await open_long(world)
    assert await world.lever(1, 20) is None
    await world.trade(1, 2, "1", 60_000)
    assert await held(world) == (D(6_000), D(6_000))


async def test_no_order_is_netted_against_a_leverage_that_the_ledger_does_not_hold_yet(world: World) -> None:
    await world.deposit(20_000, 1)
    await open_long(world)
    steps = world.change_margin(world.margin_change(1, "LEVERAGE", 5))
    await advance(steps, "planned")
    batch = await world.take_in(limit(1, "BUY", "0.1", 50_000))
    checked = await world.risk.check_orders(StepRequest(batch.saga_id, 1, batch.order_ids))
    assert checked.busy == batch.order_ids
    await finish(steps)
    await finish(world.placement(batch))
    assert await world.status(batch.order_ids[0]) == ("ACCEPTED", None)
    await world.settle()


async def test_money_that_went_elsewhere_uncovers_orders_and_not_the_position(world: World) -> None:
    await world.deposit(13_000, 1)
    await open_long(world)
    (order,) = await world.place(limit(1, "BUY", "0.05", 50_000))
    steps = world.change_margin(world.margin_change(1, "LEVERAGE", 5))
    await advance(steps, "planned")
    async with world.pool.acquire() as conn, conn.transaction():
        available, _ = await world.balance(1)
        await transfer_external(conn, "WITHDRAWAL", "w", 1, "USDT", -available)
    await finish(steps)
    await world.settle()
    assert (await world.status(order))[0] == "CANCELLED"
    assert (await world.balance(1))[0] == 0


async def test_every_step_done_twice_changes_nothing(world: World) -> None:
    await world.deposit(20_000, 1)
    await open_long(world)
    for change in (world.margin_change(1, "MARGIN", "100"), world.margin_change(1, "LEVERAGE", "7")):
        plan = await world.risk.plan_margin_change(change)
        first = await dump(world.pool)
        assert await world.risk.plan_margin_change(change) == plan
        assert await dump(world.pool) == first
        moved = await world.move_margin(change)
        first = await dump(world.pool)
        assert await world.ledger.move_margin(change) == moved
        assert await dump(world.pool) == first
        await world.positions.adopt_margin(change)
        first = await dump(world.pool, without=["outbox.messages"])
        await world.positions.adopt_margin(change)
        assert await dump(world.pool, without=["outbox.messages"]) == first


async def test_settlement_between_the_steps_keeps_margin_and_copy_equal(world: World) -> None:
    await world.deposit(30_000, 1)
    await open_long(world)
    for stop in ("planned", "moved"):
        steps = world.change_margin(world.margin_change(1, "MARGIN", "100"))
        await advance(steps, stop)
        await world.place(market(1, "SELL", "0.1", 59_000), limit(3, "BUY", "0.1", 60_000))
        await world.settle()
        await finish(steps)
        ledger, shown = await held(world)
        assert ledger == shown


async def test_the_margin_mode_changes_only_while_nothing_is_open(world: World) -> None:
    await world.deposit(30_000, 1)
    async with world.pool.acquire() as conn, conn.transaction():
        await set_margin_mode(conn, 1, BTC, "CROSS")
    await open_long(world)
    assert await world.pool.fetchval("SELECT margin_mode FROM positions.positions WHERE user_id = 1") == "CROSS"
    async with world.pool.acquire() as conn, conn.transaction():
        with pytest.raises(Problem, match="MARGIN_MODE_NOT_CHANGEABLE"):
            await set_margin_mode(conn, 1, BTC, "ISOLATED")
        await set_margin_mode(conn, 1, BTC, "CROSS")


async def test_what_cross_positions_have_lost_cannot_be_spent_again(world: World) -> None:
    await world.deposit(10_000, 1)
    async with world.pool.acquire() as conn, conn.transaction():
        await set_margin_mode(conn, 1, BTC, "CROSS")
    await open_long(world)
    assert await world.balance(1) == (D(3_970), D(6_000))
    await world.mark(57_000)
    async with world.pool.acquire() as conn:
        assert await free_collateral(conn, [1]) == {(1, "USDT"): D(970)}
    # 0.1 at 57,000 would take 570 and 2.85 of fee.
    orders = await world.place(limit(1, "BUY", "0.2", 57_000), limit(1, "BUY", "0.1", 57_000))
    assert [await world.status(order) for order in orders] == [("FAILED", "INSUFFICIENT_MARGIN"), ("ACCEPTED", None)]
    await world.mark(70_000)
    async with world.pool.acquire() as conn:
        # A profit is not money before it is realised.
        assert (await free_collateral(conn, [1]))[1, "USDT"] == (await world.balance(1))[0]
    assert await world.change(world.margin_change(1, "MARGIN", "1")) == "POSITION_IS_CROSS"
    await world.cancel(orders[1])
    await world.settle()


async def begin_change(world: World, kind: str, value: str, sold_meanwhile: str) -> AsyncIterator[str]:
    """A change of user 1's margin that risk has decided on, before so much of the long was sold to user 3."""
    await world.place(limit(1, "SELL", sold_meanwhile, 60_000))
    await world.settle()
    steps = world.change_margin(world.margin_change(1, kind, value))
    await advance(steps, "planned")
    await world.place(limit(3, "BUY", sold_meanwhile, 60_000))
    await world.settle()
    return steps


@pytest.mark.parametrize(("kind", "value"), [("MARGIN", "500"), ("LEVERAGE", "5")])
async def test_no_margin_is_put_behind_a_position_that_was_closed_meanwhile(
    world: World, kind: str, value: str
) -> None:
    await world.deposit(20_000, 1)
    await open_long(world)
    await finish(await begin_change(world, kind, value, sold_meanwhile="1"))
    assert await held(world) == (D(0), D(0))
    assert (await world.balance(1))[1] == 0


async def test_a_position_that_was_reduced_meanwhile_does_not_lose_the_margin_planned_for_the_larger_one(
    world: World,
) -> None:
    await world.deposit(20_000, 1)
    await open_long(world)
    await finish(await begin_change(world, "LEVERAGE", "20", sold_meanwhile="0.5"))
    # 3,000 of the 6,000 went with the other half.
    assert await held(world) == (D(3_000), D(3_000))


async def test_margin_is_not_taken_from_a_position_that_changed_meanwhile(world: World) -> None:
    await world.deposit(20_000, 1)
    await open_long(world)
    assert await world.change(world.margin_change(1, "MARGIN", "1000")) is None
    steps = await begin_change(world, "MARGIN", "-1000", sold_meanwhile="0.9")
    assert [step async for step in steps] == ["POSITION_CHANGED"]
    assert await held(world) == (D(700), D(700))


async def test_a_change_waits_until_the_ledger_has_booked_the_fills_that_risk_knows_of(world: World) -> None:
    await world.deposit(20_000, 1)
    await world.mark(60_000)
    await world.place(limit(2, "SELL", "1", 60_000))
    await world.place(limit(1, "BUY", "1", 60_000))
    await world.match()
    events = world.unsettled(BTC)
    assert events is not None
    settling = world.settlement(events)
    await advance(settling, "exposed")
    change = world.margin_change(1, "LEVERAGE", "5")
    assert (await world.risk.plan_margin_change(change)).is_busy
    await finish(settling)
    assert await world.change(change) is None
    assert await held(world) == (D(12_000), D(12_000))

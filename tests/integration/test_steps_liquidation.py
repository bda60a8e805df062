"""Liquidation, step by step: who is liquidated when, what it costs whom, and who is deleveraged."""

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import cast

import pytest
from redis.asyncio import Redis
from temporalio.client import Client

from activities.ledger.audit import run_audit
from activities.ledger.transfers import transfer_external
from activities.liquidation.accounts import cross_backing
from activities.liquidation.steps import LiquidationActivities
from activities.liquidation.triggering import ABORT_PAUSE
from activities.liquidation.views import deleverage_ranks
from activities.liquidation.warnings import warn
from activities.positions.telling import tell_moved
from activities.positions.views import list_positions, position_view
from activities.risk.check import pre_check
from domain.contracts.liquidation import Claim, Ending
from domain.mark_price import MARK_AGE_MAX
from domain.matching import Side
from monitors.liquidations import LiquidationMonitor
from storage.db import Pool
from tests.integration.ledger_world import BTC, ETH, World, advance, finish, limit, outbox_events
from tests.integration.liquidation_world import LiquidationWorld, publish_mark

D = Decimal
FUND = "exchange:insurance_fund"


@pytest.fixture
async def world(pool: Pool, redis: Redis) -> LiquidationWorld:
    """User 1 is long 1 BTC at 60 000 with a margin of 6 000 (10x) against user 2; the fund has 1 000 000."""
    world = LiquidationWorld(pool, redis)
    await world.fund(1_000_000)
    await world.deposit(100_000, 1, 2, 3, 4, 5)
    await world.trade(1, 2, "1", 60_000)
    return world


async def assert_clean(world: World) -> None:
    report = await run_audit(world.pool)
    assert report.ok, [check for check in report.checks if not check.ok]
    assert [check for check in report.checks if check.detail] == []


async def liquidation_price(world: World, user_id: int) -> Decimal:
    price: Decimal = await world.pool.fetchval(
        "SELECT liquidation_price FROM positions.positions WHERE user_id = $1", user_id
    )
    return price


async def test_a_position_is_liquidated_when_mark_reaches_its_liquidation_price_and_not_before(
    world: LiquidationWorld,
) -> None:
    price = await liquidation_price(world, 1)
    assert await world.marked(price + D("0.00000001")) == []
    [opened] = await world.marked(price - D("0.00000001"))
    assert (await world.position(1))[2] == "LIQUIDATION_PENDING"
    assert await world.queue() == [(1, "PENDING")]
    # Once only, however often the price comes.
    assert await world.marked(price - 1) == []
    [triggered] = await outbox_events(world.pool, "LiquidationTriggered")
    assert (triggered["userId"], triggered["positionId"]) == ("1", str(opened.position_id))
    assert (await outbox_events(world.pool, "RiskUpdate"))[-1]["status"] == "LIQUIDATION_PENDING"


async def test_a_short_is_liquidated_when_mark_rises_to_its_liquidation_price(world: LiquidationWorld) -> None:
    price = await liquidation_price(world, 2)
    assert await world.marked(price - D("0.00000001")) == []
    [opened] = await world.marked(price + D("0.00000001"))
    assert opened.user_id == 2


async def test_the_book_takes_what_it_can_and_the_rest_of_the_margin_goes_to_the_fund(world: LiquidationWorld) -> None:
    await world.place(limit(3, "BUY", "2", 54_200))
    await world.settle()
    [opened] = await world.marked(54_200)
    assert await world.liquidate(opened.liquidation_id) == ["begun", "claimed", "submitted", "released", "finished"]
    assert await world.position(1) == (D(0), D(0), "CLOSED")
    # Margin 6 000 less the loss of 5 800 and a trading fee of 27.1: the fund's fee takes what is left of it.
    assert await world.balance(1) == (D("93970"), D(0))
    assert await world.system(FUND) == D("1000172.9")
    assert await world.queue() == [(1, "PROCESSED")]
    [order] = await world.pool.fetch("SELECT * FROM orders.orders WHERE is_liquidation")
    assert (order["status"], order["type"], order["reduce_only"]) == ("FILLED", "MARKET", True)
    await assert_clean(world)


async def test_beyond_the_bankruptcy_price_the_fund_pays_and_no_other_money_of_the_user(
    world: LiquidationWorld,
) -> None:
    await world.place(limit(3, "BUY", "2", 53_100))
    await world.settle()
    [opened] = await world.marked(53_000)
    await world.liquidate(opened.liquidation_id)
    assert await world.balance(1) == (D("93970"), D(0))
    # The loss is 6 900 and a fee of 26.55; the margin was 6 000. At the mark the position was worth 1 000 below zero.
    assert await world.system(FUND) == D("999073.45")
    [needed] = await outbox_events(world.pool, "InsuranceFundRequired")
    assert needed["amount"] == "926.55"
    assert await world.pool.fetchval("SELECT bool_or(is_open) FROM ledger.insurance_claims") is False
    await assert_clean(world)


async def test_what_book_and_fund_cannot_take_is_deleveraged_at_the_bankruptcy_price(pool: Pool, redis: Redis) -> None:
    world = LiquidationWorld(pool, redis)
    await world.deposit(100_000, 1, 2, 3)
    await world.trade(1, 2, "1", 60_000)
    # Without a fund, a bid below the bankruptcy price is of no use.
    await world.place(limit(3, "BUY", "2", 53_500))
    await world.settle()
    [opened] = await world.marked(54_000)
    steps = await world.liquidate(opened.liquidation_id)
    assert steps == ["begun", "claimed", "submitted", "deleveraged", "released", "finished"]
    assert await world.position(1) == (D(0), D(0), "CLOSED")
    assert await world.position(2) == (D(0), D(0), "CLOSED")
    # The winner gets the price at which the loser's margin is used up: 6 000 of profit.
    assert await world.balance(1) == (D("93970"), D(0))
    assert await world.balance(2) == (D("105988"), D(0))
    [told] = await outbox_events(pool, "AutoDeleveraged")
    assert (told["userId"], told["quantity"], told["price"]) == ("2", "1", "54000")
    await assert_clean(world)


@pytest.mark.parametrize("side", ["BUY", "SELL"])
async def test_all_that_stands_behind_a_cross_position_counts_when_somebody_is_deleveraged(
    pool: Pool, redis: Redis, side: Side
) -> None:
    world = LiquidationWorld(pool, redis)
    sign = 1 if side == "BUY" else -1
    other: Side = "SELL" if side == "BUY" else "BUY"
    await world.deposit(100_000, 1, 2, 3)
    await world.cross(2)
    assert await world.lever(2, 100) is None
    early = 60_000 - sign * 5_000
    await world.marked(early)
    await world.place(limit(2, other, "1", early), limit(3, side, "1", early))
    await world.settle()
    await world.marked(60_000)
    await world.place(limit(3, other, "1", 60_000), limit(1, side, "1", 60_000))
    await world.settle()
    # User 2 is 5,000 behind with a margin of 600 at most, and has 90,000 more.
    [opened] = await world.marked(60_000 - sign * 5_900)
    assert (await world.liquidate(opened.liquidation_id))[-1] == "finished"
    assert [await world.position(user) for user in (1, 2)] == [(D(0), D(0), "CLOSED")] * 2
    await assert_clean(world)


async def test_the_most_profitable_and_leveraged_are_deleveraged_first_and_nobody_more_than_needed(
    pool: Pool, redis: Redis
) -> None:
    world = LiquidationWorld(pool, redis)
    await world.deposit(100_000, 1, 2, 3, 4, 9)
    assert await world.lever(4, 50) is None
    # Same entry price: the leverage of 50 comes first; then whoever sold dearer.
    await world.trade(9, 2, "0.5", 60_000)
    await world.trade(9, 3, "0.5", 60_500)
    await world.trade(9, 4, "0.3", 60_000)
    # 9 has sold its longs to 1 and is out.
    await world.trade(1, 9, "1.3", 60_100)
    assert await pool.fetchval("SELECT signed_quantity FROM positions.positions WHERE user_id = 9") == 0
    [opened] = await world.marked(54_000)
    steps = await world.liquidate(opened.liquidation_id)
    assert steps[-3:] == ["deleveraged", "released", "finished"]
    told = await outbox_events(pool, "AutoDeleveraged")
    assert [(event["userId"], event["quantity"]) for event in told] == [("4", "0.3"), ("3", "0.5"), ("2", "0.5")]
    await assert_clean(world)


async def test_a_large_position_is_reduced_tier_by_tier_until_it_is_sound_again(pool: Pool, redis: Redis) -> None:
    world = LiquidationWorld(pool, redis)
    await world.fund(1_000_000)
    await world.deposit(10_000_000, 1, 2, 3)
    tier = await pool.fetchrow(
        "SELECT * FROM risk.leverage_tiers WHERE instrument_id = $1 AND tier = 2", BTC.instrument_id
    )
    assert tier is not None
    quantity = (tier["notional_from"] / 60_000).to_integral_value() + 2
    await pool.execute("UPDATE risk.risk_limits SET max_order_quantity = 10000, max_position_notional = 1e12")
    await world.trade(1, 2, str(quantity), 60_000)
    price = (await liquidation_price(world, 1)).quantize(D("0.1"))
    await world.place(limit(3, "BUY", str(quantity), price))
    await world.settle()
    [opened] = await world.marked(price)
    await world.liquidate(opened.liquidation_id)
    left, margin, status = await world.position(1)
    assert left * price < tier["notional_from"]
    assert status in ("OPEN", "CLOSED")
    [first, *_] = await pool.fetch("SELECT quantity FROM orders.orders WHERE is_liquidation ORDER BY order_id")
    assert first["quantity"] < quantity
    if status == "OPEN":
        assert margin > 0
    await assert_clean(world)


async def test_orders_are_cancelled_first_and_new_ones_are_refused(world: LiquidationWorld) -> None:
    [resting] = await world.place(limit(1, "SELL", "0.5", 61_000))
    await world.settle()
    # One is between its check and its freeze when the position is taken over, one comes later.
    early = world.placement(await world.take_in(limit(1, "BUY", "0.1", 50_000)))
    await anext(early)
    [opened] = await world.marked(54_200)
    [late] = await world.place(limit(1, "BUY", "0.1", 50_000))
    assert await world.status(late) == ("FAILED", "POSITION_IN_LIQUIDATION")
    async with world.pool.acquire() as conn:
        assert (await pre_check(conn, limit(1, "BUY", "0.1", 50_000)))[1] == "POSITION_IN_LIQUIDATION"
    steps = world.liquidation(opened.liquidation_id)
    # Nor does its user change the margin or the leverage any more.
    assert await world.lever(1, 5) == "POSITION_IN_LIQUIDATION"
    seen = [await anext(steps) for _ in range(3)]
    assert seen == ["begun", "cancelled", "waits"]
    await finish(early)
    await world.settle()
    assert [await anext(steps) for _ in range(2)] == ["cancelled", "waits"]
    await world.settle()
    await world.place(limit(3, "BUY", "2", 54_200))
    await world.settle()
    async for step in steps:
        if step == "waits":
            await world.settle()
    rows = await world.pool.fetch(
        "SELECT status, failure_reason FROM orders.orders WHERE user_id = 1 AND status = 'CANCELLED' ORDER BY order_id"
    )
    assert [tuple(row) for row in rows] == [("CANCELLED", "LIQUIDATION")] * 2
    assert await world.status(resting) == ("CANCELLED", "LIQUIDATION")
    assert (await world.position(1))[2] == "CLOSED"
    # Free again: what was refused is taken now.
    [again] = await world.place(limit(1, "BUY", "0.1", 50_000))
    assert (await world.status(again))[0] == "ACCEPTED"
    await world.settle()
    await assert_clean(world)


@pytest.mark.parametrize(("kind", "value"), [("MARGIN", 500), ("LEVERAGE", 20), ("LEVERAGE", 8)])
async def test_a_margin_change_that_was_planned_before_the_takeover_moves_nothing_after_it(
    world: LiquidationWorld, kind: str, value: int
) -> None:
    await world.mark(60_000)
    change = world.change_margin(world.margin_change(1, kind, value))
    assert await anext(change) == "planned"
    await world.marked(54_200)
    await world.settle()
    before = await world.balance(1)
    async for _ in change:
        pass
    assert await world.balance(1) == before
    assert (await world.position(1))[1] == 6_000
    await assert_clean(world)


async def test_a_position_that_recovers_before_anything_is_sold_is_its_users_again(world: LiquidationWorld) -> None:
    [opened] = await world.marked(54_200)
    await publish_mark(world.redis, 60_000)
    assert await world.liquidate(opened.liquidation_id) == ["begun", "released", "finished"]
    assert await world.position(1) == (D(1), D(6_000), "OPEN")
    assert await world.pool.fetchval("SELECT count(*) FROM orders.orders WHERE is_liquidation") == 0
    await assert_clean(world)


async def test_a_halted_instrument_and_an_old_mark_price_liquidate_nobody(world: LiquidationWorld) -> None:
    [opened] = await world.marked(54_200)
    await world.pool.execute("UPDATE matching.instruments SET state = 'HALTED'")
    steps = world.liquidation(opened.liquidation_id)
    assert [await anext(steps) for _ in range(5)] == ["begun", "cancelled", "pauses", "cancelled", "pauses"]
    await world.pool.execute("UPDATE matching.instruments SET state = 'TRADING'")
    await world.redis.flushall()
    assert [await anext(steps) for _ in range(2)] == ["cancelled", "pauses"]
    await publish_mark(world.redis, 54_200, age=MARK_AGE_MAX + timedelta(seconds=1))
    assert [await anext(steps) for _ in range(2)] == ["cancelled", "pauses"]
    await publish_mark(world.redis, 54_200)
    assert [await anext(steps) for _ in range(3)] == ["cancelled", "claimed", "submitted"]


async def test_an_order_that_a_halt_refused_is_tried_again_before_anybody_is_deleveraged(
    world: LiquidationWorld,
) -> None:
    await world.place(limit(3, "BUY", "2", 54_200))
    await world.settle()
    [opened] = await world.marked(54_200)
    steps = world.liquidation(opened.liquidation_id)
    await advance(steps, "submitted")
    # The engine sees the halt first.
    await world.pool.execute("UPDATE matching.instruments SET state = 'HALTED'")
    world.matchers[BTC.instrument_id].state = "HALTED"
    await world.settle()
    assert [await anext(steps) for _ in range(2)] == ["cancelled", "pauses"]
    await world.pool.execute("UPDATE matching.instruments SET state = 'TRADING'")
    world.matchers[BTC.instrument_id].state = "TRADING"
    assert [await anext(steps) for _ in range(3)] == ["cancelled", "claimed", "submitted"]
    await world.settle()
    await finish(steps)
    rows = await world.pool.fetch("SELECT status FROM orders.orders WHERE is_liquidation ORDER BY order_id")
    assert [row["status"] for row in rows] == ["REJECTED", "FILLED"]
    assert await world.pool.fetchval("SELECT count(*) FROM matching.deleveragings") == 0
    await assert_clean(world)


async def test_the_monitor_liquidates_nobody_by_an_old_or_frozen_price_or_in_a_halted_instrument(
    world: LiquidationWorld,
) -> None:
    now = datetime.now(UTC)
    # It starts no workflows here.
    monitor = LiquidationMonitor(world.redis, cast(Client, None))
    async with world.pool.acquire() as conn:
        await publish_mark(world.redis, 54_200, age=MARK_AGE_MAX + timedelta(seconds=1))
        assert await monitor.look(conn, now) == []
        await publish_mark(world.redis, 54_200, is_frozen=True)
        assert await monitor.look(conn, now) == []
        await publish_mark(world.redis, 54_200)
        await conn.execute("UPDATE matching.instruments SET state = 'HALTED'")
        assert await monitor.look(conn, now) == []
        await conn.execute("UPDATE matching.instruments SET state = 'TRADING'")
        [opened] = await monitor.look(conn, now)
        # The same price is not looked at twice; a new one is.
        await conn.execute("UPDATE positions.positions SET status = 'OPEN' WHERE user_id = 1")
        assert await monitor.look(conn, now) == []
    assert opened.user_id == 1


async def test_a_liquidation_an_operator_has_aborted_is_not_triggered_again_for_a_while(
    world: LiquidationWorld,
) -> None:
    [opened] = await world.marked(54_200)
    await world.liquidations.begin(opened.liquidation_id)
    await world.liquidations.finish(Ending(opened.liquidation_id, "ABORTED"))
    assert await world.marked(54_100) == []
    await world.pool.execute("UPDATE risk.liquidation_queue SET updated_at = now() - $1::interval", ABORT_PAUSE)
    [again] = await world.marked(54_000)
    assert again.position_id == opened.position_id


@pytest.mark.parametrize(("user_id", "mark"), [(1, 54_200), (2, 65_800)])
async def test_a_liquidation_ends_without_redis(world: LiquidationWorld, user_id: int, mark: int) -> None:
    """What its user is told is at the last mark in the tables; the mirror image is the short."""
    [opened] = await world.marked(mark)
    await world.liquidations.begin(opened.liquidation_id)
    async with Redis.from_url("redis://127.0.0.1:1", retry=None) as away:
        await LiquidationActivities(world.pool, away).finish(Ending(opened.liquidation_id, "ABORTED"))
    assert (await world.position(user_id))[2] == "OPEN"
    told = (await outbox_events(world.pool, "RiskUpdate"))[-1]
    assert (told["userId"], told["status"]) == (str(user_id), "OPEN")
    # 6 000 less the loss of 5 800, of what the position is worth.
    assert D(told["marginRatio"]) == (200 / D(mark)).quantize(D("1e-8"))
    snapshot = await world.pool.fetchrow("SELECT * FROM risk.risk_snapshots ORDER BY snapshot_id DESC LIMIT 1")
    assert snapshot is not None
    assert (snapshot["user_id"], snapshot["mark_price"]) == (user_id, mark)


async def test_a_cross_account_is_liquidated_by_its_equity(world: LiquidationWorld) -> None:
    await world.make_cross(1, [BTC])
    await world.mark(60_000)
    async with world.pool.acquire() as conn, conn.transaction():
        await transfer_external(conn, "WITHDRAWAL", "w", 1, "USDT", D(-93_000))
    # 970 available and 6 000 held: not yet in trouble where the isolated margin would be gone.
    assert await world.marked(54_000) == []
    await world.place(limit(3, "BUY", "2", 53_300))
    await world.settle()
    [opened] = await world.marked(53_230)
    # No figures of the position alone: it is not by those that a cross account is judged.
    [told] = [event for event in await outbox_events(world.pool, "RiskUpdate") if event["status"] != "OPEN"]
    assert (told["status"], told["marginRatio"], told["liquidationPrice"]) == ("LIQUIDATION_PENDING", None, None)
    await world.liquidate(opened.liquidation_id)
    assert (await world.position(1))[2] == "CLOSED"
    # 6 970 less the loss of 6 700 and the trading fee of 26.65; the liquidation fee takes the rest.
    assert await world.balance(1) == (D(0), D(0))
    assert await world.system(FUND) == D("1000243.35")
    await assert_clean(world)


async def test_the_liquidation_price_of_a_cross_position_is_where_its_account_is_liquidated(
    world: LiquidationWorld,
) -> None:
    await world.trade(1, 2, "10", 3_000, ETH)
    await world.make_cross(1, [BTC, ETH])
    async with world.pool.acquire() as conn, conn.transaction():
        await transfer_external(conn, "WITHDRAWAL", "w", 1, "USDT", D(-80_000))
    marks = {BTC.instrument_id: D(58_000), ETH.instrument_id: D(2_900)}
    assert await world.marks(marks) == []
    tiers = (await world.rules()).tiers
    prices = {}
    for name, mark in marks.items():
        backing = (await cross_backing(world.pool, marks, 1))[name]
        [row] = await list_positions(world.pool, 1, name)
        view = position_view(row, mark, tiers[name], backing)
        assert D(view["marginRatio"]) > D("0.01")
        prices[name] = D(view["liquidationPrice"])
    for name, price in prices.items():
        assert await world.marks(marks | {name: price + D("0.001")}) == []
        # The other one is valued at its last mark.
        other = await cross_backing(world.pool, {name: price}, 1)
        last = marks | {name: price}
        assert other == await cross_backing(world.pool, last, 1) != {}
    [opened] = await world.marks(marks | {BTC.instrument_id: prices[BTC.instrument_id] - D("0.001")})
    assert opened.user_id == 1


async def test_a_user_sees_their_place_in_the_queue_for_deleveraging(pool: Pool, redis: Redis) -> None:
    world = LiquidationWorld(pool, redis)
    await world.deposit(100_000, *range(1, 12))
    for seller in range(2, 12):
        await world.trade(1, seller, "0.1", 60_000 + 10 * seller)
    places = {}
    for seller in range(2, 12):
        places[seller] = (await deleverage_ranks(pool, seller, [BTC.instrument_id], {BTC.instrument_id: D(58_000)}))[
            BTC.instrument_id
        ]
    # Whoever sold dearest has won most.
    assert places == {11: 5, 10: 5, 9: 4, 8: 4, 7: 3, 6: 3, 5: 2, 4: 2, 3: 1, 2: 1}
    assert await deleverage_ranks(pool, 2, [BTC.instrument_id], {}) == {}


async def test_users_are_warned_once_before_they_are_liquidated(world: LiquidationWorld) -> None:
    rules, name = await world.rules(), BTC.instrument_id
    warning, liquidation = await world.pool.fetchrow(  # type: ignore[misc]  # a row of two
        "SELECT warning_price, liquidation_price FROM positions.positions WHERE user_id = 1"
    )
    assert liquidation < warning < liquidation * D("1.01")
    async with world.pool.acquire() as conn:
        told = [
            await warn(conn, {name: price}, rules)
            for price in (warning + D("0.00000001"), warning, warning - 1, warning * D("1.001"), warning)
        ]
        assert told == [0, 1, 0, 0, 0]
        # Far enough away again, it is a new crossing.
        assert await warn(conn, {name: warning * D("1.02")}, rules) == 0
        assert await warn(conn, {name: warning}, rules) == 1
    updates = [event for event in await outbox_events(world.pool, "RiskUpdate") if event["status"] == "WARNING"]
    assert [update["userId"] for update in updates] == ["1", "1"]
    assert await world.pool.fetchval("SELECT count(*) FROM risk.risk_snapshots WHERE status = 'WARNING'") == 2


async def test_users_hear_of_their_position_when_its_profit_has_moved_by_a_tenth_of_its_margin(
    world: LiquidationWorld,
) -> None:
    rules, name = await world.rules(), BTC.instrument_id
    # The margin of both is 6 000, so 600 of mark on 1 BTC.
    async with world.pool.acquire() as conn:
        for mark in (60_000, 60_599, 60_600, 60_601, 60_000):
            await tell_moved(conn, name, D(mark), rules.tiers[name], 0, 10)
    updates = (await outbox_events(world.pool, "PositionUpdated"))[2:]
    marks = [update["markPrice"] for update in updates if update["userId"] == "1"]
    assert marks == ["60600", "60000"]


async def test_the_fund_promises_its_money_once(world: LiquidationWorld) -> None:
    first = await world.insurance.claim(Claim(1, 1, "USDT", "900000"))
    second = await world.insurance.claim(Claim(2, 1, "USDT", "900000"))
    assert (first, second) == ("900000", "100000")
    assert await world.insurance.claim(Claim(2, 1, "USDT", "900000")) == "100000"
    await world.insurance.release(1)
    assert await world.insurance.claim(Claim(2, 2, "USDT", "900000")) == "900000"

"""Engine events applied to positions, risk, ledger and orders: who ends up with what."""

from decimal import Decimal

import pytest
from redis.asyncio import Redis

from domain.contracts.settlement import EventRange
from domain.matching import Side
from domain.positions import Position, apply_fill
from storage.db import Pool
from storage.once import CursorGapError
from tests.integration.ledger_world import (
    BTC,
    ETH,
    World,
    advance,
    assert_audit_is_clean,
    assert_conserved,
    dump,
    finish,
    limit,
    market,
    outbox_events,
)

ID = BTC.instrument_id


@pytest.fixture
def world(pool: Pool, redis: Redis) -> World:
    return World(pool, redis)


async def position(world: World, user_id: int) -> tuple[object, ...]:
    """Signed quantity, entry notional, margin, realised profit, status."""
    row = await world.pool.fetchrow(
        "SELECT signed_quantity, entry_notional, margin, realized_pnl, status FROM positions.positions"
        " WHERE user_id = $1 AND instrument_id = $2",
        user_id,
        ID,
    )
    assert row is not None
    return (*row,)


async def test_a_trade_moves_margin_into_positions_and_fees_to_the_exchange(world: World) -> None:
    await world.deposit(10_000, 1, 2)
    await world.trade(1, 2, "1", 60_000)
    assert await world.balance(1) == (Decimal(3_970), Decimal(6_000))
    assert await world.balance(2) == (Decimal(3_988), Decimal(6_000))
    assert await world.system("exchange:fees") == 42
    assert await position(world, 1) == (1, 60_000, 6_000, 0, "OPEN")
    assert await position(world, 2) == (-1, 60_000, 6_000, 0, "OPEN")
    await assert_audit_is_clean(world)


async def test_closing_pays_the_profit_and_releases_everything(world: World) -> None:
    await world.deposit(20_000, 1, 2)
    await world.trade(1, 2, "1", 60_000)
    await world.trade(2, 1, "1", 61_000)
    assert await world.balance(1) == (Decimal(20_000 + 1_000) - 30 - Decimal("12.2"), Decimal(0))
    assert await world.balance(2) == (Decimal(20_000 - 1_000) - 12 - Decimal("30.5"), Decimal(0))
    assert await position(world, 1) == (0, 0, 0, 1_000, "CLOSED")
    assert await position(world, 2) == (0, 0, 0, -1_000, "CLOSED")
    assert await world.system("exchange:clearing") == 0
    closed = await outbox_events(world.pool, "PositionClosed")
    assert {(event["userId"], event["realizedPnl"]) for event in closed} == {("1", "1000"), ("2", "-1000")}
    await assert_audit_is_clean(world)


async def test_a_position_opens_again_after_it_was_closed(world: World) -> None:
    await world.deposit(20_000, 1, 2)
    await world.trade(1, 2, "0.1", 60_000)
    await world.trade(2, 1, "0.1", 60_000)
    await world.trade(2, 1, "0.2", 60_000)
    assert await position(world, 1) == (Decimal("-0.2"), 12_000, 1_200, 0, "OPEN")
    await assert_audit_is_clean(world)


async def test_a_flip_realises_the_old_position_and_backs_the_new_one(world: World) -> None:
    await world.deposit(50_000, 1, 2)
    await world.trade(1, 2, "1", 60_000)
    await world.trade(2, 1, "3", 61_000)
    assert await position(world, 1) == (-2, 122_000, 12_200, 1_000, "OPEN")
    await assert_audit_is_clean(world)


async def test_the_liquidation_price_goes_with_the_margin_held(world: World, pool: Pool) -> None:
    await world.deposit(10_000, 1, 2)
    await world.trade(1, 2, "1", 60_000)
    price = await pool.fetchval("SELECT liquidation_price FROM positions.positions WHERE user_id = 1")
    assert price == (Decimal(54_000) / Decimal("0.995")).quantize(Decimal("1e-8"))
    await world.trade(2, 1, "1", 60_000)
    assert await pool.fetchval("SELECT count(liquidation_price) FROM positions.positions") == 0


async def test_an_order_filled_better_than_its_bound_gets_the_difference_back(world: World) -> None:
    await world.deposit(10_000, 1, 2)
    await world.mark(52_000)
    await world.place(limit(2, "SELL", "1", 50_000))
    (order,) = await world.place(market(1, "BUY", "1", 60_000))
    assert await world.balance(1) == (Decimal(3_970), Decimal(6_030))
    await world.settle()
    assert await world.status(order) == ("FILLED", None)
    assert await world.balance(1) == (Decimal(4_975), Decimal(5_000))


async def test_the_rest_of_a_market_order_frees_its_margin(world: World) -> None:
    await world.deposit(100_000, 1, 2)
    await world.place(limit(2, "SELL", "0.25", 60_000))
    (order,) = await world.place(market(1, "BUY", "1", 63_000))
    await world.settle()
    assert await world.status(order) == ("EXPIRED", "NO_LIQUIDITY")
    assert await world.balance(1) == (Decimal(100_000 - 1_500) - Decimal("7.5"), Decimal(1_500))
    await assert_audit_is_clean(world)


async def test_many_fills_of_many_users_in_one_range_come_out_as_one_by_one(world: World) -> None:
    await world.deposit(100_000, 1, 2, 3, 4)
    for price in (60_000, 60_100, 60_200):
        await world.place(limit(2, "SELL", "0.3", price), limit(3, "SELL", "0.2", price))
    await world.place(limit(1, "BUY", "1.2", 60_200), limit(4, "BUY", "0.1", 60_200), limit(3, "BUY", "0.2", 60_300))
    await world.settle()
    await world.place(limit(1, "SELL", "2", 60_000), limit(4, "BUY", "1.5", 60_500))
    await world.settle()
    await assert_conserved(world)
    await assert_audit_is_clean(world)


@pytest.mark.parametrize("events_max", [1, 2, 3])
async def test_how_the_log_is_cut_into_ranges_changes_nothing(world: World, events_max: int) -> None:
    await world.deposit(100_000, 1, 2, 3)
    for n in range(6):
        await world.place(limit(1, "SELL", "0.2", 60_000 + n), limit(2, "BUY", "0.3", 60_005 - n))
        await world.place(limit(3, "BUY" if n % 2 else "SELL", "0.25", 60_002))
    await world.match()
    while (events := world.unsettled(BTC, events_max)) is not None:
        await finish(world.settlement(events))
    await assert_audit_is_clean(world)
    rows = await world.pool.fetch(
        "SELECT user_id, signed_quantity, entry_notional FROM positions.positions ORDER BY user_id"
    )
    assert [tuple(row) for row in rows] == await settled_at_once(world)


async def settled_at_once(world: World) -> list[tuple[object, ...]]:
    """Positions as `domain.positions` has them over the whole tape."""
    positions: dict[int, Position] = {}
    for row in await world.pool.fetch("SELECT * FROM matching.trade_tickers ORDER BY seq"):
        for user_id, quantity in ((row["buyer_user_id"], row["quantity"]), (row["seller_user_id"], -row["quantity"])):
            before = positions.get(user_id, Position())
            positions[user_id] = apply_fill(before, quantity, row["price"]).position
    return [(user_id, p.signed_quantity, p.entry_notional) for user_id, p in sorted(positions.items())]


@pytest.mark.parametrize("side", ["BUY", "SELL"])
async def test_nobody_closes_at_a_price_at_which_nothing_is_left(world: World, side: Side) -> None:
    """A long of 60,000 with 6,000 behind it is worth nothing at 54,000, and a taker's fee above that; a short at
    66,000."""
    opposite = "SELL" if side == "BUY" else "BUY"
    empty, bound = ("54027.1", 50_000) if side == "BUY" else ("65967", 70_000)
    tick = Decimal("0.1") if side == "BUY" else Decimal("-0.1")
    await world.deposit(16_100, 1)
    await world.deposit(100_000, 2, 3)
    await world.mark(60_000)
    await world.place(limit(2, opposite, "1", 60_000))
    await world.place(limit(1, side, "1", 60_000))
    await world.settle()
    await world.mark(empty)
    await world.place(limit(3, side, "0.4", empty))
    await world.place(limit(3, side, "0.6", Decimal(empty) - tick))
    (order,) = await world.place(market(1, opposite, "1", bound))
    await world.settle()
    assert await world.status(order) == ("EXPIRED", "MARGIN_AT_MARK")
    assert await world.pool.fetchval("SELECT filled_quantity FROM orders.orders WHERE order_id = $1", order) == Decimal(
        "0.4"
    )
    assert await world.system("exchange:insurance_fund") == 0
    # What is available is not touched.
    assert (await world.balance(1))[0] >= Decimal(10_070)
    await assert_conserved(world)
    await assert_audit_is_clean(world)


async def test_orders_that_a_loss_leaves_without_money_are_cancelled(world: World) -> None:
    await world.deposit(6_200, 1)
    await world.deposit(100_000, 2, 3)
    await world.cross(1)
    await world.trade(1, 2, "1", 60_000)
    await world.mark(60_000)
    (uncovered,) = await world.place(limit(1, "BUY", "0.04", 40_000))
    (elsewhere,) = await world.place(limit(1, "BUY", "0.01", 3_000, ETH))
    await world.mark(54_000)
    await world.place(limit(3, "BUY", "1", 54_000))
    await world.place(market(1, "SELL", "1", 50_000))
    await world.match()
    events = world.unsettled()
    assert events is not None
    settling = world.settlement(events)
    await advance(settling, "booked")
    short = await world.pool.fetchval(
        "SELECT order_short FROM ledger.margin_holds WHERE user_id = 1 AND order_short > 0"
    )
    assert short > 0
    await finish(settling)
    assert await world.status(uncovered) == ("CANCEL_REQUESTED", None)
    await world.settle()
    assert await world.status(uncovered) == ("CANCELLED", "INSUFFICIENT_MARGIN")
    assert await world.status(elsewhere) == ("ACCEPTED", None)
    await assert_conserved(world)
    await assert_audit_is_clean(world)


async def test_an_order_that_fills_before_its_cancellation_leaves_nobody_negative(world: World) -> None:
    await world.deposit(6_060, 1)
    await world.deposit(100_000, 2, 3)
    await world.cross(1)
    await world.trade(1, 2, "1", 60_000)
    await world.mark(60_000)
    await world.place(limit(1, "BUY", "0.001", 53_900))
    # With terms, the engine would not let all but 3 of the money go.
    world.matchers[BTC.instrument_id].book.accounts[1].leverage = 0
    await world.mark(54_000)
    await world.place(limit(3, "BUY", "1", 54_000))
    await world.place(market(1, "SELL", "1", 51_000), limit(2, "SELL", "0.001", 53_900))
    await world.settle()
    # Of 6,060 there are 3 left, less the fee of a maker.
    assert (await position(world, 1))[:3] == (Decimal("0.001"), Decimal("53.9"), Decimal("2.98922"))
    await assert_conserved(world)
    await assert_audit_is_clean(world)


async def test_a_loss_in_one_instrument_leaves_what_is_held_for_another(world: World) -> None:
    await world.deposit(6_100, 1)
    await world.deposit(100_000, 2, 3)
    await world.trade(1, 2, "0.01", 3_000, ETH)
    await world.trade(1, 2, "1", 60_000)
    await world.mark(54_100)
    await world.place(limit(3, "BUY", "1", 54_100))
    await world.place(market(1, "SELL", "1", 51_500))
    await world.settle()
    assert await world.balance(1) == (Decimal("139.935"), Decimal(3))
    await assert_audit_is_clean(world)


async def test_a_deposit_covers_the_next_time_the_wallet_is_settled(world: World, pool: Pool) -> None:
    await world.deposit(6_200, 1)
    await world.deposit(100_000, 2, 3)
    await world.trade(1, 2, "1", 60_000)
    await world.place(limit(1, "BUY", "0.04", 40_000))
    await world.place(limit(3, "BUY", "1", 54_000))
    await world.place(market(1, "SELL", "1", 50_000))
    await world.match()
    events = world.unsettled()
    assert events is not None
    settling = world.settlement(events)
    await advance(settling, "booked")
    await world.deposit(1_000, 1, reference="rescue")
    await finish(settling)
    await world.settle()
    assert await pool.fetchval("SELECT sum(order_short) FROM ledger.margin_holds") == 0
    await assert_audit_is_clean(world)


async def test_a_range_that_does_not_follow_is_refused_and_changes_nothing(world: World, pool: Pool) -> None:
    await world.deposit(100_000, 1, 2)
    await world.trade(1, 2, "1", 60_000)
    await world.place(limit(1, "BUY", "1", 60_000), limit(1, "BUY", "1", 59_000))
    await world.match()
    stands, ends = world.settled[ID], world.matchers[ID].event_seq
    before = await dump(pool)
    for after_seq, to_seq in (
        (stands + 1, ends),
        (stands - 1, ends),
        (stands, stands),
        (stands, stands - 1),
        (ends, ends),
        (ends, stands),
    ):
        events = EventRange(ID, after_seq, to_seq)
        for step in (
            world.positions.apply_trades,
            world.risk.apply_events,
            world.ledger.settle,
            world.positions.confirm,
            world.orders.apply_events,
        ):
            with pytest.raises(CursorGapError):
                await step(events)
    assert await dump(pool) == before
    await world.settle()
    await assert_audit_is_clean(world)


async def test_a_range_beyond_the_log_is_refused_and_changes_nothing(world: World, pool: Pool) -> None:
    await world.deposit(100_000, 1, 2)
    await world.trade(1, 2, "1", 60_000)
    before = await dump(pool)
    events = EventRange(ID, world.settled[ID], world.settled[ID] + 3)
    with pytest.raises(RuntimeError, match="Expected 3 events"):
        await world.positions.apply_trades(events)
    assert await dump(pool) == before


async def test_an_instrument_that_does_not_exist_is_refused(world: World) -> None:
    with pytest.raises(CursorGapError):
        await world.positions.apply_trades(EventRange("DOGE-USDT-PERP", 0, 1))


async def test_the_ledger_does_not_go_ahead_of_risk(world: World, pool: Pool) -> None:
    await world.deposit(100_000, 1, 2)
    await world.place(limit(2, "SELL", "1", 60_000), limit(1, "BUY", "1", 60_000))
    await world.match()
    events = world.unsettled()
    assert events is not None
    await world.positions.apply_trades(events)
    before = await dump(pool)
    with pytest.raises(AssertionError, match="risk has not applied"):
        await world.ledger.settle(events)
    assert await dump(pool) == before
    await finish(world.settlement(events))
    await assert_audit_is_clean(world)


async def test_settlement_funding_and_margin_changes_go_on_without_redis(pool: Pool) -> None:
    """What they tell is at the last mark in the tables."""
    async with Redis.from_url("redis://127.0.0.1:1", retry=None) as away:
        world = World(pool, away)
        await world.deposit(20_000, 1, 2)
        await world.trade(1, 2, "1", 60_000)
        await world.mark(60_500)
        await world.lever(1, 5)
        await world.trade(2, 1, "0.4", 60_500)
        assert await position(world, 1) == (Decimal("0.6"), 36_000, 7_200, 200, "OPEN")
        told = [event for event in await outbox_events(pool, "PositionUpdated") if event["userId"] == "1"]
        assert [event["markPrice"] for event in told] == ["60000", "60500", "60500"]
        await assert_audit_is_clean(world)

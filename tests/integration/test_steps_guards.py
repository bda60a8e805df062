"""What adversaries tried (two accounts of one person, stops, dead marks), with the values that are right."""

from dataclasses import replace
from decimal import Decimal
from typing import Any

import pytest
from redis.asyncio import Redis

from domain.instruments import Instrument
from domain.matching import Side
from domain.order_entry import OrderRequest, Reference, new_order
from storage.db import Pool
from tests.integration.ledger_world import BTC, SOL, World, assert_audit_is_clean, assert_conserved

A, B, M = 1, 2, 3
OPPOSITE: dict[Side, Side] = {"BUY": "SELL", "SELL": "BUY"}
SIDES = pytest.mark.parametrize("side", ["BUY", "SELL"])
FUND = "exchange:insurance_fund"


class Market:
    """A world whose orders pass order entry at the mark that a test sets."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.mark = Decimal(0)

    async def move(self, price: object, instrument: Instrument = BTC) -> None:
        self.mark = Decimal(str(price))
        await self.world.mark(self.mark, instrument)

    async def send(
        self,
        user: int,
        side: Side,
        kind: Any,
        quantity: str,
        price: object = None,
        instrument: Instrument = BTC,
        **terms: Any,
    ) -> int:
        """An order by its own terms; its id, once the engine has answered and all is settled."""
        limit_price = None if price is None else Decimal(str(price))
        stop = terms.pop("stop", None)
        request = OrderRequest(
            instrument.instrument_id,
            side,
            kind,
            Decimal(quantity),
            limit_price,
            time_in_force=terms.pop("time_in_force", "GTC" if kind.endswith("LIMIT") else "IOC"),
            stop_price=None if stop is None else Decimal(str(stop)),
            **terms,
        )
        # Bands are order entry's business: here they are as wide as they were when this was tried.
        wide = replace(instrument, price_band=Decimal("0.5"))
        (order,) = await self.world.place(new_order(user, request, wide, Reference(self.mark)))
        await self.world.settle(instrument)
        return order

    async def state(self, order: int) -> tuple[str, str | None, Decimal]:
        filled = await self.world.pool.fetchval("SELECT filled_quantity FROM orders.orders WHERE order_id = $1", order)
        return (*await self.world.status(order), filled)

    async def equity(self, user: int) -> Decimal:
        """What a user has at the mark."""
        profit = await self.world.pool.fetchval(
            "SELECT coalesce(sum(signed_quantity * $2 - sign(signed_quantity) * entry_notional), 0)"
            " FROM positions.positions WHERE user_id = $1",
            user,
            self.mark,
        )
        return sum(await self.world.balance(user), Decimal(profit))

    async def beyond(self, side: Side, off: object) -> Decimal:
        """A price that is worse than the mark for who trades on `side`."""
        return self.mark + Decimal(str(off)) if side == "BUY" else self.mark - Decimal(str(off))


@pytest.fixture
async def market(pool: Pool, redis: Redis) -> Market:
    found = Market(World(pool, redis))
    await found.move(60_000)
    await found.world.deposit(1_000_000, M)
    return found


async def clean(market: Market) -> None:
    assert await market.world.system(FUND) == 0
    await assert_conserved(market.world)
    await assert_audit_is_clean(market.world)


@SIDES
async def test_who_trades_far_from_the_mark_puts_up_what_is_lost_at_once(market: Market, side: Side) -> None:
    world = market.world
    await world.deposit(40_000, A)
    await world.deposit(100_000, B)
    assert await world.lever(A, 100) is None
    far = await market.beyond(side, 27_000)
    await market.send(B, OPPOSITE[side], "LIMIT", "1", far)
    before = await market.equity(A) + await market.equity(B)
    order = await market.send(A, side, "LIMIT", "1", far)
    assert await market.state(order) == ("FILLED", None, Decimal(1))
    margin = await world.pool.fetchval("SELECT position_margin FROM ledger.margin_holds WHERE user_id = $1", A)
    # Equity at the mark is the initial margin, of the price or, for a sale, of the mark.
    assert margin >= 27_000 + min(far, market.mark) / 100
    assert await market.equity(A) + await market.equity(B) < before
    await clean(market)


@SIDES
@pytest.mark.parametrize("kind", ["LIMIT", "STOP_LIMIT"])
async def test_open_loss_that_nobody_has_is_refused_or_not_filled(market: Market, side: Side, kind: str) -> None:
    world = market.world
    await world.deposit(2_000, A)
    await world.deposit(100_000, B)
    assert await world.lever(A, 100) is None
    far = await market.beyond(side, 27_000)
    await market.send(B, OPPOSITE[side], "LIMIT", "1", far)
    order = await market.send(A, side, kind, "1", far, stop=None if kind == "LIMIT" else 60_000)
    assert (await world.status(order))[0] == "FAILED"
    assert (await world.status(order))[1] in ("OPEN_LOSS_NOT_COVERED", "INSUFFICIENT_MARGIN")
    await clean(market)


@SIDES
@pytest.mark.parametrize("kind", ["MARKET", "STOP_MARKET", "TAKE_PROFIT_MARKET"])
async def test_an_order_without_a_limit_takes_the_bait_and_no_more(market: Market, side: Side, kind: str) -> None:
    world = market.world
    await world.deposit(2_000, A)
    await world.deposit(100_000, B)
    assert await world.lever(A, 100) is None
    await market.send(B, OPPOSITE[side], "LIMIT", "0.001", 60_000)
    await market.send(B, OPPOSITE[side], "LIMIT", "1", await market.beyond(side, 2_990))
    order = await market.send(A, side, kind, "1", stop=None if kind == "MARKET" else 60_000)
    assert await market.state(order) == ("EXPIRED", "MARGIN_AT_MARK", Decimal("0.001"))
    await clean(market)


@SIDES
@pytest.mark.parametrize("reduce_only", [False, True])
@pytest.mark.parametrize("kind", ["LIMIT", "MARKET"])
async def test_nobody_sells_to_himself_below_the_price_at_which_he_is_empty(
    market: Market, side: Side, kind: str, *, reduce_only: bool
) -> None:
    world = market.world
    await market.move(150, SOL)
    await world.deposit(1_850, A)
    await world.deposit(200_000, B)
    assert await world.lever(A, 50, SOL) is None
    await market.send(M, OPPOSITE[side], "LIMIT", "600", 150, SOL)
    await market.send(A, side, "LIMIT", "600", 150, SOL)
    far = await market.beyond(OPPOSITE[side], 7)
    bid = await market.send(B, side, "LIMIT", "600", far, SOL)
    order = await market.send(
        A, OPPOSITE[side], kind, "600", far if kind == "LIMIT" else None, SOL, reduce_only=reduce_only
    )
    assert await market.state(order) == ("EXPIRED", "MARGIN_AT_MARK", Decimal(0))
    assert (await world.status(bid))[0] == "PLACED"
    await clean(market)


async def test_the_engine_knows_a_mark_that_no_stop_waited_for(market: Market) -> None:
    await market.world.deposit(100_000, A)
    await market.move(70_000)
    stop = await market.send(A, "SELL", "STOP_MARKET", "1", stop=65_000)
    profit = await market.send(A, "BUY", "TAKE_PROFIT_MARKET", "1", stop=65_000)
    assert [(await market.state(order))[0] for order in (stop, profit)] == ["PLACED", "PLACED"]


@pytest.mark.parametrize(("side", "stop", "before"), [("BUY", "60000.2", "60000.15"), ("SELL", "59999.8", "59999.85")])
async def test_a_stop_waits_for_the_mark_itself(market: Market, side: Side, stop: str, before: str) -> None:
    await market.world.deposit(100_000, A)
    await market.send(M, OPPOSITE[side], "LIMIT", "1", 60_000)
    order = await market.send(A, side, "STOP_MARKET", "1", stop=stop)
    await market.move(before)
    await market.world.settle()
    assert (await market.state(order))[0] == "PLACED"
    await market.move(stop)
    await market.world.settle()
    assert (await market.state(order))[0] == "FILLED"


@SIDES
async def test_a_stop_that_is_jumped_over_closes_like_a_market_order_of_that_moment(market: Market, side: Side) -> None:
    world = market.world
    await world.deposit(40_000, A)
    await market.send(M, OPPOSITE[side], "LIMIT", "1", 60_000)
    await market.send(A, side, "LIMIT", "1", 60_000)
    assert await world.change(world.margin_change(A, "MARGIN", 9_000)) is None
    sign = 1 if side == "BUY" else -1
    order = await market.send(A, OPPOSITE[side], "STOP_MARKET", "1", stop=60_000 - sign * 5_000)
    await market.send(M, side, "LIMIT", "1", 60_000 - sign * 8_100)
    await market.move(60_000 - sign * 8_000)
    await world.settle()
    assert await market.state(order) == ("FILLED", None, Decimal(1))
    await clean(market)


@SIDES
async def test_without_a_live_mark_nothing_opens_and_closing_goes_on(market: Market, side: Side) -> None:
    world = market.world
    await world.deposit(100_000, A)
    await market.send(M, OPPOSITE[side], "LIMIT", "1", 60_000)
    await market.send(A, side, "LIMIT", "1", 60_000)
    await market.send(M, side, "LIMIT", "1", 59_990 if side == "BUY" else 60_010)
    await world.pool.execute("UPDATE market.mark_prices SET calculated_at = calculated_at - interval '11 seconds'")
    for matcher in world.matchers.values():
        matcher.guards.live_until = 0
    for kind, price in (("LIMIT", 60_000), ("MARKET", None), ("STOP_MARKET", None)):
        order = await market.send(A, side, kind, "1", price, stop=60_000 if kind == "STOP_MARKET" else None)
        assert await world.status(order) == ("FAILED", "MARK_PRICE_UNAVAILABLE")
    assert await world.change(world.margin_change(A, "MARGIN", -10)) == "MARK_PRICE_UNAVAILABLE"
    closing = await market.send(A, OPPOSITE[side], "MARKET", "1")
    assert (await market.state(closing))[0] == "FILLED"
    await clean(market)


@SIDES
async def test_a_maker_whose_guard_the_mark_has_passed_is_cancelled_when_it_is_met(market: Market, side: Side) -> None:
    world = market.world
    await world.deposit(1_000, A)
    await world.deposit(100_000, B)
    assert await world.lever(A, 100) is None
    stale = await market.send(A, side, "LIMIT", "1", 60_000)
    await market.move(59_000 if side == "BUY" else 61_000)
    assert (await world.status(stale))[0] == "PLACED"
    next_best = await market.send(M, side, "LIMIT", "1", 59_500 if side == "BUY" else 60_500)
    taker = await market.send(B, OPPOSITE[side], "MARKET", "1")
    assert await world.status(stale) == ("CANCELLED", "MARGIN_AT_MARK")
    assert [(await market.state(order))[0] for order in (next_best, taker)] == ["FILLED", "FILLED"]
    await clean(market)


@SIDES
async def test_margin_is_not_taken_away_before_the_engine_knows_of_it(market: Market, side: Side) -> None:
    world = market.world
    await world.deposit(40_000, A)
    await world.deposit(100_000, B)
    await market.send(M, OPPOSITE[side], "LIMIT", "1", 60_000)
    await market.send(A, side, "LIMIT", "1", 60_000)
    assert await world.change(world.margin_change(A, "MARGIN", 10_000)) is None
    # What 16,000 cover, and 6,000 do not.
    far = await market.beyond(OPPOSITE[side], 10_000)
    await market.send(B, side, "LIMIT", "1", far)
    assert await world.change(world.margin_change(A, "MARGIN", -10_000)) is None
    order = await market.send(A, OPPOSITE[side], "LIMIT", "1", far, reduce_only=True)
    assert await market.state(order) == ("EXPIRED", "MARGIN_AT_MARK", Decimal(0))
    await clean(market)

"""What closes a cross position may cost what the whole account has left at the mark, and nothing of the fund's."""

from decimal import Decimal

import pytest

from activities.ledger.transfers import transfer_external
from activities.risk.terms import tell_lower_covers
from domain.matching import Side
from tests.integration.ledger_world import SOL
from tests.integration.test_steps_guards import OPPOSITE, SIDES, A, B, M, Market, clean, market

__all__ = ["market"]


async def hold(market: Market, side: Side, money: int) -> int:
    """A's position of 1 BTC at 60000, in cross mode, `money` left after the fee; 1 or -1 for long or short."""
    await market.world.deposit(money + 30, A)
    await market.world.deposit(100_000, B)
    await market.world.cross(A)
    assert await market.world.lever(A, 100) is None
    await market.send(M, OPPOSITE[side], "LIMIT", "1", 60_000)
    await market.send(A, side, "LIMIT", "1", 60_000)
    assert sum(await market.world.balance(A)) == money
    return 1 if side == "BUY" else -1


@SIDES
async def test_a_resting_order_does_not_close_for_more_than_the_account_has_left(market: Market, side: Side) -> None:
    sign = await hold(market, side, 2_000)
    far = 60_000 - sign * 3_000
    order = await market.send(A, OPPOSITE[side], "LIMIT", "0.3", far)
    assert (await market.state(order))[0] == "PLACED"
    await market.move(60_000 - sign * 1_690)
    assert await market.equity(A) == 310
    # 1,310 for each of 0.3 would be more than that.
    taker = await market.send(B, side, "LIMIT", "0.3", far)
    assert await market.state(order) == ("CANCELLED", "MARGIN_AT_MARK", Decimal(0))
    assert (await market.state(taker))[0] == "PLACED"
    await clean(market)


@SIDES
@pytest.mark.parametrize("kind", ["MARKET", "STOP_MARKET"])
async def test_an_account_that_is_due_closes_down_to_where_it_is_empty(market: Market, side: Side, kind: str) -> None:
    sign = await hold(market, side, 2_000)
    mark = 60_000 - sign * 1_790
    # The maintenance margin is 290, the account has 210: 30 for the fee, 30 kept back.
    await market.send(B, side, "LIMIT", "0.5", mark - sign * 140)
    await market.send(B, side, "LIMIT", "0.5", mark - sign * 175)
    if kind == "STOP_MARKET":
        order = await market.send(A, OPPOSITE[side], kind, "1", stop=mark)
        await market.move(mark)
        await market.world.settle()
    else:
        await market.move(mark)
        order = await market.send(A, OPPOSITE[side], kind, "1")
    assert await market.state(order) == ("EXPIRED", "MARGIN_AT_MARK", Decimal("0.5"))
    assert await market.equity(A) > 0
    await clean(market)


@SIDES
async def test_a_cross_stop_that_is_jumped_over_closes_like_a_market_order(market: Market, side: Side) -> None:
    sign = await hold(market, side, 20_000)
    order = await market.send(A, OPPOSITE[side], "STOP_MARKET", "1", stop=60_000 - sign * 5_000)
    await market.send(M, side, "LIMIT", "1", 60_000 - sign * 8_100)
    await market.move(60_000 - sign * 8_000)
    await market.world.settle()
    assert await market.state(order) == ("FILLED", None, Decimal(1))
    await clean(market)


@SIDES
async def test_money_that_was_withdrawn_covers_nothing(market: Market, side: Side) -> None:
    sign = await hold(market, side, 20_000)
    order = await market.send(A, OPPOSITE[side], "STOP_MARKET", "1", stop=60_000 - sign * 800)
    await market.send(B, side, "LIMIT", "1", 60_000 - sign * 900)
    async with market.world.pool.acquire() as conn, conn.transaction():
        await transfer_external(conn, "WITHDRAWAL", "w", A, "USDT", Decimal(-19_100))
    # It would close at 100 beyond the mark: what was there before would cover that.
    await market.move(60_000 - sign * 800)
    await market.world.settle()
    assert await market.equity(A) == 100
    assert await market.state(order) == ("EXPIRED", "MARGIN_AT_MARK", Decimal(0))
    await clean(market)


@SIDES
async def test_a_loss_elsewhere_covers_nothing(market: Market, side: Side) -> None:
    world = market.world
    sign = await hold(market, side, 9_000)
    await world.mark(Decimal(150), SOL)
    await world.cross(A, SOL)
    assert await world.lever(A, 50, SOL) is None
    market.mark = Decimal(150)
    await market.send(M, OPPOSITE[side], "LIMIT", "600", 150, SOL)
    await market.send(A, side, "LIMIT", "600", 150, SOL)
    market.mark = Decimal(60_000)
    order = await market.send(A, OPPOSITE[side], "STOP_MARKET", "1", stop=60_000 - sign * 100)
    await market.send(B, side, "LIMIT", "1", 60_000 - sign * 300)
    async with world.pool.acquire() as conn:
        assert await tell_lower_covers(conn) == 0
    # 600 * 14.6 are lost there, of 8,955.
    await world.mark(Decimal(150) - sign * Decimal("14.6"), SOL)
    async with world.pool.acquire() as conn:
        assert await tell_lower_covers(conn) == 1
        assert await tell_lower_covers(conn) == 0
    await market.move(60_000 - sign * 100)
    await world.settle()
    assert await market.state(order) == ("EXPIRED", "MARGIN_AT_MARK", Decimal(0))


@SIDES
@pytest.mark.parametrize("kind", ["MARKET", "LIMIT"])
async def test_a_profit_on_paper_pays_for_no_loss(market: Market, side: Side, kind: str) -> None:
    world = market.world
    await world.mark(150, SOL)
    await world.cross(A, SOL)
    assert await world.lever(A, 50, SOL) is None
    sign = await hold(market, side, 1_500)
    mark = market.mark
    await market.move(150, SOL)
    await market.send(M, side, "LIMIT", "200", 150, SOL)
    await market.send(A, OPPOSITE[side], "LIMIT", "200", 150, SOL)
    await market.move(150 - sign * 12, SOL)
    await market.move(mark - sign * 2_400)
    # It has lost 2,400 with one, and won as much with the other; of money there is less.
    assert sum(await world.balance(A)) < 1_500
    await market.send(B, side, "LIMIT", "1", market.mark)
    order = await market.send(
        A, OPPOSITE[side], kind, "1", None if kind == "MARKET" else market.mark, time_in_force="IOC", reduce_only=True
    )
    assert await market.state(order) == ("EXPIRED", "MARGIN_AT_MARK", Decimal(0))
    # The profit comes first.
    await world.mark(150 - sign * 12, SOL)
    market.mark, kept = Decimal(150 - sign * 12), market.mark
    await market.send(B, OPPOSITE[side], "LIMIT", "200", market.mark, SOL)
    won = await market.send(A, side, "LIMIT", "200", market.mark, SOL, reduce_only=True)
    assert (await market.state(won))[0] == "FILLED"
    market.mark = kept
    lost = await market.send(A, OPPOSITE[side], "LIMIT", "1", kept, reduce_only=True)
    assert (await market.state(lost))[0] == "FILLED"
    await clean(market)

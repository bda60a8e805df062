"""A fill whose margin has gone between its check and its settlement: the engine counts on no more than there is."""

from decimal import Decimal

from activities.ledger.transfers import transfer_external
from activities.matching.steps import append_commands
from domain.matching import SetTerms, Side
from domain.order_entry import OrderRequest, Reference, new_order
from tests.integration.ledger_world import BTC
from tests.integration.test_steps_guards import OPPOSITE, SIDES, A, B, Market, clean, market

__all__ = ["market"]


async def send_unsettled(market: Market, user: int, side: Side, quantity: str, price: object) -> None:
    """An order up to the engine's log."""
    request = OrderRequest(BTC.instrument_id, side, "LIMIT", Decimal(quantity), Decimal(str(price)))
    await market.world.place(new_order(user, request, BTC, Reference(market.mark)))


async def raise_what_orders_need(market: Market, side: Side) -> int:
    """A's order at 100 x becomes one at 10 x, and the money for that is withdrawn before the ledger holds it."""
    world = market.world
    await world.deposit(8_000, A)
    await world.deposit(100_000, B)
    assert await world.lever(A, 100) is None
    resting = await market.send(A, side, "LIMIT", "1", 60_000)
    change = world.margin_change(A, "LEVERAGE", 10)
    assert (await world.risk.plan_margin_change(change)).refusal is None
    async with world.pool.acquire() as conn, conn.transaction():
        await transfer_external(conn, "WITHDRAWAL", "w", A, "USDT", Decimal(-7_000))
    assert (await world.move_margin(change)).is_uncovered
    await world.deposit(100, A, reference="second")
    return resting


def believed(market: Market) -> Decimal:
    """The margin that the engine counts on for A's position, entered at 60,000; none if there is none."""
    known = market.world.matchers[BTC.instrument_id].book.accounts[A]
    entry = known.position * 600_000 * 1_000_000
    margin = entry - known.backing if known.position > 0 else known.backing + entry
    return margin * BTC.tick_size * BTC.lot_size / 1_000_000


async def close_far(market: Market, side: Side) -> None:
    """A and B try to close A's position where more is lost than there is."""
    far = market.mark - (1_800 if side == "BUY" else -1_800)
    await market.send(B, side, "LIMIT", "1", far)
    await market.send(A, OPPOSITE[side], "LIMIT", "1", far, reduce_only=True)


@SIDES
async def test_a_lower_leverage_is_not_told_for_orders_that_are_not_covered(market: Market, side: Side) -> None:
    resting = await raise_what_orders_need(market, side)
    # Before the cancellation: an order with which risk tells its terms, and one that meets the first.
    away = 60_000 - (100 if side == "BUY" else -100)
    await send_unsettled(market, A, side, "0.001", away)
    await market.send(B, OPPOSITE[side], "LIMIT", "1", 60_000)
    assert (await market.state(resting))[0] == "FILLED"
    assert believed(market) == 600
    await close_far(market, side)
    await clean(market)


@SIDES
async def test_the_engine_hears_of_margin_that_a_fill_did_not_get(market: Market, side: Side) -> None:
    world = market.world
    resting = await raise_what_orders_need(market, side)
    # It counts on what would be needed.
    terms = SetTerms(at=0, user_id=A, leverage=10, maintenance=5_000, cross=False)
    async with world.pool.acquire() as conn, conn.transaction():
        await append_commands(conn, {BTC.instrument_id: [terms]})
    await market.send(B, OPPOSITE[side], "LIMIT", "1", 60_000)
    assert (await market.state(resting))[0] == "FILLED"
    held = await world.pool.fetchval("SELECT position_margin FROM ledger.margin_holds WHERE user_id = $1", A)
    assert 600 < held < 2_000
    await world.settle()
    assert believed(market) == held
    await close_far(market, side)
    await clean(market)

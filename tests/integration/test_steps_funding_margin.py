"""Funding that takes of a margin: the engine hears of it first, and no liquidation counts on what is taken."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import datetime, timedelta
from decimal import Decimal

import pytest
from redis.asyncio import Redis

from activities.ledger.transfers import transfer_external
from activities.liquidation.triggering import Opened
from domain.funding import FundingPage, FundingRun, FundingSnapshot
from domain.instruments import Instrument
from domain.matching import Side
from engine.guards import ONE
from storage.db import Pool
from storage.once import NotYetError
from tests.integration.ledger_world import (
    BTC,
    ETH,
    advance,
    assert_audit_is_clean,
    dump,
    limit,
)
from tests.integration.liquidation_world import LiquidationWorld
from tests.integration.test_steps_liquidation_solvency import WAITS_FOR_A_ROW
from tests.waiting import until

D = Decimal
ALICE, BOB, CAROL = 1, 2, 3
FUND = "exchange:insurance_fund"
OPPOSITE: dict[Side, Side] = {"BUY": "SELL", "SELL": "BUY"}
SIDES = pytest.mark.parametrize("side", ["BUY", "SELL"])
MODES = pytest.mark.parametrize("mode", ["ISOLATED", "CROSS"])


class Funded(LiquidationWorld):
    """Alice has 1 BTC of a side at 60000 and 10x, in margin 6000, and nothing else; Bob has the other side."""

    side: Side = "BUY"

    @property
    def sign(self) -> int:
        return 1 if self.side == "BUY" else -1

    async def open(self, side: Side) -> None:
        self.side = side
        await self.fund(100_000)
        await self.deposit(100_000, ALICE, BOB, CAROL)
        await self.mark(60_000)
        await self.take("1")

    async def take(self, quantity: str, price: int = 60_000, instrument: Instrument = BTC) -> None:
        """Alice adds to her position, or has one of the same side in another instrument."""
        await self.trade(*((ALICE, BOB) if self.side == "BUY" else (BOB, ALICE)), quantity, price, instrument)

    async def leave(self, money: object = 0) -> None:
        """Alice withdraws all that is available but so much."""
        available, _ = await self.balance(ALICE)
        async with self.pool.acquire() as conn, conn.transaction():
            amount = D(str(money)) - available
            assert await transfer_external(conn, "WITHDRAWAL", f"out-{available}", ALICE, "USDT", amount)

    async def owe(self, payment: int, instrument: Instrument = BTC, mark: int = 60_000) -> FundingPage:
        """A funding time passes at which Alice's position pays so much; its page, ready to be settled."""
        moment, name = await self.clock(), instrument.instrument_id
        quantity, _, _ = await self.position(ALICE, instrument)
        await self.publish_rate(moment, str(payment / quantity / mark), mark, instrument)
        run = FundingRun(name, moment.isoformat())
        assert await self.ledger.open_funding(run)
        await self.positions.fix_funding_positions(FundingSnapshot(run, self.settled[name]))
        return FundingPage(run, 0)

    async def clock(self) -> datetime:
        """The time of the database, after all that happened."""
        moment: datetime = await self.pool.fetchval("SELECT clock_timestamp() + interval '2 ms'")
        while await self.pool.fetchval("SELECT clock_timestamp() < $1", moment + timedelta(milliseconds=2)):
            pass
        return moment

    async def told(self) -> list[Decimal]:
        """All that the engine was told of Alice's BTC margin, in quote, in the order of its log."""
        rows = await self.pool.fetch(
            "SELECT (payload::json ->> 'amount')::numeric FROM matching.commands WHERE instrument_id = $1"
            " AND payload::json ->> 'kind' = 'MOVE_MARGIN' AND (payload::json ->> 'user_id')::bigint = $2 ORDER BY seq",
            BTC.instrument_id,
            ALICE,
        )
        return [row[0] / ONE * BTC.tick_size * BTC.lot_size for row in rows]

    async def margins(self) -> tuple[Decimal, Decimal]:
        """What is behind Alice's position: in the ledger, and as the engine believes."""
        held = await self.pool.fetchval("SELECT position_margin FROM ledger.margin_holds WHERE user_id = $1", ALICE)
        entry = await self.pool.fetchval("SELECT entry_notional FROM positions.positions WHERE user_id = $1", ALICE)
        backing = self.matchers[BTC.instrument_id].book.accounts[ALICE].backing
        return held, self.sign * (entry - D(backing) / ONE * BTC.tick_size * BTC.lot_size)

    async def waits(self, step: Callable[[], Awaitable[object]], why: str) -> None:
        with pytest.raises(NotYetError, match=why):
            await step()

    async def pay(self, page: FundingPage) -> None:
        await self.ledger.settle_funding(page)
        await self.positions.confirm_funding(page)
        await self.ledger.close_funding(page.run)

    async def fall(self, mark: int = 5_750) -> tuple[AsyncIterator[str], Opened]:
        """The mark goes so far against Alice, who is liquidated: the steps of it."""
        [opened] = await self.marked(60_000 - self.sign * mark)
        return self.liquidation(opened.liquidation_id), opened

    async def bid(self, loss: int) -> None:
        """Carol would take Alice's position where it has lost so much."""
        await self.place(limit(CAROL, self.side, "1", 60_000 - self.sign * loss))
        await self.settle()

    async def end(self, steps: AsyncIterator[str]) -> list[str]:
        """Take the steps of a liquidation to its end, settlement included; those without waiting."""
        taken = []
        async for step in steps:
            if step == "waits":
                await self.settle()
            elif step != "cancelled":
                taken.append(step)
        return taken

    async def draws(self) -> list[tuple[str, Decimal]]:
        rows = await self.pool.fetch("SELECT reference_type, amount FROM ledger.insurance_draws ORDER BY created_at")
        return [(row[0], row[1]) for row in rows]


@pytest.fixture
async def world(pool: Pool, redis: Redis) -> Funded:
    return Funded(pool, redis)


@SIDES
async def test_the_engine_is_told_before_the_money_moves_and_once(world: Funded, side: Side) -> None:
    await world.open(side)
    await world.leave()
    before = await world.margins()
    page = await world.owe(600)
    for why in ("is told", "the engine is at"):
        await world.waits(lambda: world.ledger.settle_funding(page), why)
        assert await world.told() == [-600]
        assert (await world.margins()) == before
    await world.match()
    await world.pay(page)
    assert (await world.margins())[0] == before[0] - 600
    assert (await world.margins())[1] <= before[1] - 600
    paid = await dump(world.pool)
    await world.pay(page)
    assert await dump(world.pool) == paid
    await assert_audit_is_clean(world)


@SIDES
async def test_fills_that_counted_on_the_margin_are_settled_before_it_is_taken(world: Funded, side: Side) -> None:
    await world.open(side)
    await world.leave()
    page = await world.owe(3_000)
    # In the log before the engine hears of the payment: half is closed, at nearly all that backs it.
    price = 60_000 - world.sign * 5_900
    await world.place(limit(BOB, side, "0.5", price))
    await world.place(limit(ALICE, OPPOSITE[side], "0.5", price, reduce_only=True))
    await world.waits(lambda: world.ledger.settle_funding(page), "is told")
    await world.waits(lambda: world.ledger.settle_funding(page), "the engine is at")
    await world.match()
    await world.waits(lambda: world.ledger.settle_funding(page), "is not settled")
    await world.settle()
    assert (await world.position(ALICE))[0] == world.sign * D("0.5")
    await world.pay(page)
    await world.settle()
    held, believed = await world.margins()
    assert believed <= held < believed + D("0.001")
    assert await world.draws() == []
    assert await world.system(FUND) == 100_000
    await assert_audit_is_clean(world)


@SIDES
async def test_a_fill_after_the_engine_heard_counts_on_what_is_left(world: Funded, side: Side) -> None:
    await world.open(side)
    await world.leave()
    page = await world.owe(3_000)
    await world.waits(lambda: world.ledger.settle_funding(page), "is told")
    await world.match()
    # Settled, and not paid yet: 5900 would be in the ledger, and are not for this order.
    await world.place(limit(BOB, side, "1", 60_000 - world.sign * 5_900))
    [far] = await world.place(limit(ALICE, OPPOSITE[side], "1", 60_000 - world.sign * 5_900, reduce_only=True))
    await world.settle()
    assert await world.status(far) == ("EXPIRED", "MARGIN_AT_MARK")
    await world.place(limit(CAROL, side, "1", 60_000 - world.sign * 2_900))
    [near] = await world.place(limit(ALICE, OPPOSITE[side], "1", 60_000 - world.sign * 2_900, reduce_only=True))
    await world.settle()
    assert await world.status(near) == ("FILLED", None)
    await world.pay(page)
    assert await world.draws() == []
    await assert_audit_is_clean(world)


@SIDES
async def test_what_other_money_pays_meanwhile_backs_the_position_again(world: Funded, side: Side) -> None:
    await world.open(side)
    await world.leave()
    _, believed = await world.margins()
    page = await world.owe(600)
    await world.waits(lambda: world.ledger.settle_funding(page), "is told")
    await world.match()
    await world.deposit(500, ALICE, reference="more")
    await world.pay(page)
    await world.settle()
    assert await world.told() == [-600, 500]
    held, now = await world.margins()
    assert now == believed - 100 <= held
    await assert_audit_is_clean(world)


async def test_what_the_announced_margin_does_not_pay_is_announced_of_another(world: Funded) -> None:
    await world.open("BUY")
    await world.trade(ALICE, BOB, "10", 3_000, ETH)
    await world.leave()
    page = await world.owe(600)
    await world.waits(lambda: world.ledger.settle_funding(page), "is told")
    # Then a fill that the engine had carried out before uses up that margin.
    await world.pool.execute(
        "UPDATE ledger.margin_holds SET position_margin = 100 WHERE user_id = $1 AND instrument_id = $2",
        ALICE,
        BTC.instrument_id,
    )
    await world.pool.execute("UPDATE ledger.ledger_balances SET reserved = reserved - 5900 WHERE user_id = $1", ALICE)
    await world.settle_all()
    await world.waits(lambda: world.ledger.settle_funding(page), "is told")
    await world.waits(lambda: world.ledger.settle_funding(page), f"of {ETH.instrument_id}")
    await world.settle(ETH)
    await world.ledger.settle_funding(page)
    left = await world.pool.fetch("SELECT instrument_id, position_margin FROM ledger.margin_holds WHERE user_id = 1")
    assert {row[0]: row[1] for row in left} == {BTC.instrument_id: 0, ETH.instrument_id: 2_500}
    assert await world.told() == [-600, 500]


@SIDES
async def test_who_pays_from_what_is_available_waits_for_nothing(world: Funded, side: Side) -> None:
    await world.open(side)
    page = await world.owe(600)
    await world.place(limit(ALICE, side, "0.1", 60_000 - world.sign * 1_000))
    await world.pay(page)
    assert await world.told() == []
    await world.settle()
    await assert_audit_is_clean(world)


async def poor(world: Funded, side: Side, mode: str, money: int = 0) -> None:
    """Alice has her margin and so much beside, in a mode."""
    await world.open(side)
    if mode == "CROSS":
        await world.make_cross(ALICE, [BTC])
    await world.leave(money)


@SIDES
async def test_funding_waits_for_a_liquidation_order_that_counted_on_the_margin(world: Funded, side: Side) -> None:
    """Of another instrument: orders that are in the log before a funding time are of before it in their own."""
    await poor(world, side, "ISOLATED", 10_000)
    assert await world.lever(ALICE, 50, ETH) is None
    await world.take("10", 3_000, ETH)
    await world.leave()
    await world.bid(5_900)
    steps, _ = await world.fall()
    await advance(steps, "submitted")
    # 600 of it pays the margin in its own instrument.
    page = await world.owe(780, ETH, 3_000)
    await world.waits(lambda: world.ledger.settle_funding(page), "is told")
    await world.settle(ETH)
    await world.waits(lambda: world.ledger.settle_funding(page), "the engine is at")
    await world.match()
    await world.waits(lambda: world.ledger.settle_funding(page), "is not settled")
    await world.settle()
    await world.pay(page)
    await world.end(steps)
    # What the sale left of 6000, the fee paid, goes to funding; only then is there nothing.
    left = 100 - D(60_000 - world.sign * 5_900) * D("0.0005")
    assert await world.draws() == [("FUNDING_FEE", 180 - left)]
    assert await world.balance(ALICE) == (D(0), D(0))
    await world.settle_all()
    await assert_audit_is_clean(world)


@SIDES
@MODES
@pytest.mark.parametrize("told", ["before", "after"])
async def test_a_liquidation_leaves_what_funding_is_owed(world: Funded, side: Side, mode: str, told: str) -> None:
    await poor(world, side, mode)
    await world.bid(5_760)
    page = await world.owe(180)
    if told == "before":
        await world.waits(lambda: world.ledger.settle_funding(page), "is told")
    steps, _ = await world.fall()
    await advance(steps, "submitted")
    await world.match()
    if told == "after":
        await world.waits(lambda: world.ledger.settle_funding(page), "is told")
    await world.waits(lambda: world.ledger.settle_funding(page), "is not settled" if told == "before" else "engine")
    await world.settle()
    await world.pay(page)
    assert "deleveraged" not in await world.end(steps)
    assert await world.draws() == []
    assert await world.system(FUND) > 100_000
    assert await world.balance(ALICE) == (D(0), D(0))
    await assert_audit_is_clean(world)


@SIDES
@MODES
@pytest.mark.parametrize("paid", ["owed", "taken"])
async def test_no_sale_at_a_price_that_would_take_what_funding_is_owed(
    world: Funded, side: Side, mode: str, paid: str
) -> None:
    """The bid is within the margin, but not within what funding leaves of it: owed when it is planned, or, worse,
    taken between the plan and the order."""
    await poor(world, side, mode)
    await world.bid(5_900)
    if paid == "owed":
        page = await world.owe(180)
    steps, _ = await world.fall()
    await advance(steps, "claimed")
    if paid == "taken":
        page = await world.owe(180)
        await world.waits(lambda: world.ledger.settle_funding(page), "is told")
        await world.settle()
        await world.pay(page)
        assert (await world.margins())[0] == 5_820
    assert "deleveraged" in await world.end(steps)
    if paid == "owed":
        await world.settle()
        await world.pay(page)
    assert await world.draws() == []
    assert await world.system(FUND) >= 100_000
    await assert_audit_is_clean(world)


@SIDES
async def test_available_money_of_a_cross_account_is_not_taken_under_a_liquidation_order(
    world: Funded, side: Side
) -> None:
    await poor(world, side, "CROSS", 10_000)
    await world.take("1", 3_000, ETH)
    await world.leave(300)
    await world.bid(6_200)
    steps, _ = await world.fall(6_050)
    await advance(steps, "submitted")
    page = await world.owe(180, ETH, 3_000)
    await world.waits(lambda: world.ledger.settle_funding(page), "the engine is at")
    assert await world.told() == []
    await world.settle()
    # The sale has left less than that available: the margin in the payment's own instrument pays the rest.
    await world.waits(lambda: world.ledger.settle_funding(page), "is told")
    await world.settle(ETH)
    await world.pay(page)
    await world.end(steps)
    assert await world.draws() == []
    await assert_audit_is_clean(world)


@SIDES
async def test_an_isolated_liquidation_does_not_keep_other_money_from_paying(world: Funded, side: Side) -> None:
    await poor(world, side, "ISOLATED", 10_000)
    await world.take("1", 3_000, ETH)
    await world.leave(300)
    await world.bid(5_900)
    steps, _ = await world.fall()
    await advance(steps, "submitted")
    await world.pay(await world.owe(180, ETH, 3_000))
    await world.end(steps)
    assert await world.draws() == []
    assert (await world.balance(ALICE))[0] == 120
    await assert_audit_is_clean(world)


@SIDES
async def test_a_liquidation_order_waits_for_a_payment_that_is_being_booked(world: Funded, side: Side) -> None:
    await poor(world, side, "ISOLATED")
    steps, _ = await world.fall()
    await advance(steps, "claimed")
    async with world.pool.acquire() as conn:
        booking = conn.transaction()
        await booking.start()
        await conn.execute("UPDATE ledger.ledger_balances SET reserved = reserved - 180 WHERE user_id = $1", ALICE)
        await conn.execute(
            "UPDATE ledger.margin_holds SET position_margin = position_margin - 180 WHERE user_id = $1", ALICE
        )
        submitting = asyncio.ensure_future(anext(steps))
        await until(lambda: world.pool.fetchval(WAITS_FOR_A_ROW), 10, "the order to wait for the payment")
        assert not submitting.done()
        await booking.commit()
    assert await submitting == "submitted"
    bound = await world.pool.fetchval("SELECT bound_price FROM orders.orders WHERE is_liquidation")
    assert world.sign * (bound - (60_000 - world.sign * 5_820)) > 0

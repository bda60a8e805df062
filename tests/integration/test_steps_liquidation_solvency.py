"""What a liquidation may cost the insurance fund, and which accounts are liquidated: `docs/architecture.md`."""

import asyncio
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, cast

import pytest
from redis.asyncio import Redis
from temporalio.client import Client

from activities.ledger.accounts import DEPOSITS, INSURANCE_FUND
from activities.ledger.audit import run_audit
from activities.ledger.book import Book, write_book
from activities.ledger.transfers import transfer_external
from activities.liquidation.triggering import Opened
from domain.instruments import Instrument
from domain.liquidation_saga import PlanRequest
from monitors.liquidations import LiquidationMonitor
from storage.db import Connection, Pool
from tests.integration.ledger_world import BTC, SOL, advance, assert_audit_is_clean, limit, outbox_events
from tests.integration.liquidation_world import LiquidationWorld, publish_mark
from tests.waiting import until

D = Decimal
FUND = "exchange:insurance_fund"
WAITS_FOR_A_ROW = (
    "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock')"
)


@pytest.mark.parametrize("side", ["BUY", "SELL"])
@pytest.mark.parametrize("mode", ["ISOLATED", "CROSS"])
async def test_a_position_that_has_equity_at_the_mark_costs_the_fund_nothing(
    pool: Pool, redis: Redis, side: Any, mode: str
) -> None:
    """A10: 4 BTC at 100x, bankrupt at 59400; the only bid is 56900 and comes from the winner. And its mirror images."""
    sign = 1 if side == "BUY" else -1
    world = LiquidationWorld(pool, redis)
    await world.fund(1_000_000)
    await world.deposit(40_000, 1, 2)
    assert await world.lever(1, 100) is None
    buyer, seller = (1, 2) if side == "BUY" else (2, 1)
    await world.trade(buyer, seller, "4", 60_000)
    kept = 40_000 - D(240_000) * await _fee_rate(pool, 1) - 2_400
    if mode == "CROSS":
        await world.make_cross(1, [BTC])
        await leave(world, 1, 2_400)
        kept = D(0)
    mark, far = 60_000 - sign * 310, 60_000 - sign * 3_100
    await world.mark(mark)
    await world.place(limit(2, side, "4", far))
    await world.settle()
    [opened] = await world.marked(mark)
    steps = await world.liquidate(opened.liquidation_id)
    assert steps == ["begun", "claimed", "submitted", "deleveraged", "released", "finished"]
    assert await world.system(FUND) == 1_000_000
    assert await pool.fetchval("SELECT sum(amount) FROM ledger.insurance_claims") == 0
    assert await pool.fetchval("SELECT array_agg(price) FROM matching.deleveragings") == [60_000 - sign * 600]
    # Its margin is used up, no other money of its user.
    assert await world.balance(1) == (kept, D(0))
    assert await world.position(1) == (D(0), D(0), "CLOSED")
    await assert_audit_is_clean(world)


async def leave(world: LiquidationWorld, user_id: int, money: int) -> None:
    """The user withdraws all but so much."""
    available, reserved = await world.balance(user_id)
    async with world.pool.acquire() as conn, conn.transaction():
        leaves = money - available - reserved
        assert await transfer_external(conn, "WITHDRAWAL", f"w{user_id}", user_id, "USDT", leaves)


async def _fee_rate(pool: Pool, user_id: int) -> Decimal:
    """What the user paid for the trade that opened the position."""
    rate: Decimal = await pool.fetchval(
        "SELECT fee / (price * quantity) FROM positions.v_fills WHERE user_id = $1 ORDER BY seq LIMIT 1", user_id
    )
    return rate


async def two_cross_accounts(
    pool: Pool, redis: Redis, sign: int, sol: str = "0.1", money: int = 2_000
) -> LiquidationWorld:
    """Users 1 and 2 have `money` each and a cross position of 1 BTC at 60000; user 1 holds SOL at 150, too."""
    world = LiquidationWorld(pool, redis)
    await world.fund(1_000_000)
    await world.deposit(100_000, 1, 2, 3, 4)
    for user in (1, 2):
        assert await world.lever(user, 50) is None
        assert await world.lever(user, 50, SOL) is None
        await world.trade(*((user, 3) if sign > 0 else (3, user)), "1", 60_000)
    if sol != "0":
        await world.trade(*((1, 3) if sign > 0 else (3, 1)), sol, 150, SOL)
    for user in (1, 2):
        await world.make_cross(user, [BTC, SOL])
        await leave(world, user, money)
    return world


async def look(world: LiquidationWorld) -> list[Opened]:
    """What the monitor opens by the marks that are published."""
    async with world.pool.acquire() as conn:
        return await LiquidationMonitor(world.redis, cast(Client, None)).look(conn, datetime.now(UTC))


@pytest.mark.parametrize("sign", [1, -1], ids=["long", "short"])
@pytest.mark.parametrize("stands", ["halted", "frozen", "gone"])
@pytest.mark.parametrize("moved", [1_800, 4_000])
async def test_a_position_that_does_not_trade_keeps_nobody_from_being_liquidated_in_what_does(
    pool: Pool, redis: Redis, sign: int, stands: str, moved: int
) -> None:
    """A9, and its mirror images."""
    world = await two_cross_accounts(pool, redis, sign)
    mark = 60_000 - sign * moved
    if stands == "halted":
        await pool.execute(
            "UPDATE matching.instruments SET state = 'HALTED' WHERE instrument_id = $1", SOL.instrument_id
        )
    if stands != "gone":
        await publish_mark(redis, 150, SOL, is_frozen=stands == "frozen")
    await publish_mark(redis, 60_000 - sign * 1_600)
    assert await look(world) == []
    # It has warned of it, though.
    assert await pool.fetchval("SELECT count(*) FROM positions.positions WHERE warned") == 3
    await world.mark(mark)
    # Somebody takes the positions at a price that pays the fee, too.
    await world.place(limit(4, "BUY" if sign > 0 else "SELL", "2", mark + sign * 100))
    await world.settle()
    await publish_mark(redis, mark)
    opened = await look(world)
    assert [(found.user_id, found.instrument_id) for found in opened] == [
        (1, BTC.instrument_id),
        (2, BTC.instrument_id),
    ]
    for found in opened:
        assert "deleveraged" not in await world.liquidate(found.liquidation_id)
        assert (await world.position(found.user_id))[2] == "CLOSED"
    assert (await world.position(1, SOL))[2] == "OPEN"
    # Nothing but SOL is left, which stands: nobody is due by what cannot be closed.
    await publish_mark(redis, mark + 1)
    assert await look(world) == []
    await assert_audit_is_clean(world)


async def test_what_never_had_a_mark_is_valued_at_entry_and_the_plan_says_so(pool: Pool, redis: Redis) -> None:
    world = await two_cross_accounts(pool, redis, 1)
    await pool.execute("DELETE FROM market.mark_prices WHERE instrument_id = $1", SOL.instrument_id)
    await publish_mark(redis, 58_200)
    opened = await look(world)
    assert [found.user_id for found in opened] == [1, 2]
    said = []
    for found in opened:
        await world.liquidations.begin(found.liquidation_id)
        plan = await world.liquidations.plan(PlanRequest(found.liquidation_id))
        assert plan.action == "ORDER"
        said.append(plan.why.partition(", ")[2])
    assert said == ["with SOL-USDT-PERP at entry", ""]


@pytest.mark.parametrize("instrument", [BTC, SOL], ids=["smaller halted", "larger halted"])
async def test_a_halt_after_the_takeover_makes_room_for_what_still_trades(
    pool: Pool, redis: Redis, instrument: Instrument
) -> None:
    """The position with the larger maintenance margin is taken over first; if it comes to stand, the other one is."""
    world = await two_cross_accounts(pool, redis, 1, sol="600", money=5_000)
    marks = {BTC.instrument_id: D(57_500), SOL.instrument_id: D(147)}
    await world.mark(147, SOL)
    await world.settle(SOL)
    [opened] = [found for found in await world.marks(marks) if found.user_id == 1]
    assert opened.instrument_id == SOL.instrument_id
    steps = world.liquidation(opened.liquidation_id)
    await advance(steps, "cancelled")
    await pool.execute(
        "UPDATE matching.instruments SET state = 'HALTED' WHERE instrument_id = $1", instrument.instrument_id
    )
    if instrument is BTC:
        assert await anext(steps) == "claimed"
        return
    assert [step async for step in steps] == ["released", "finished"]
    assert (await world.position(1, SOL))[2] == "OPEN"
    [again] = [found for found in await look(world) if found.user_id == 1]
    assert again.instrument_id == BTC.instrument_id


@pytest.mark.parametrize("sign", [1, -1], ids=["long", "short"])
@pytest.mark.parametrize("recovers", [True, False])
async def test_a_cross_account_that_recovers_while_its_position_stands_is_given_back(
    pool: Pool, redis: Redis, sign: int, recovers: bool
) -> None:
    """What was taken over comes to stand, the other one cannot be closed either: only who is still due is kept."""
    world = await two_cross_accounts(pool, redis, sign, sol="600", money=5_000)
    lost = {BTC.instrument_id: D(60_000 - sign * 2_500), SOL.instrument_id: D(150 - sign * 3)}
    await world.mark(lost[SOL.instrument_id], SOL)
    await world.settle(SOL)
    [opened] = [found for found in await world.marks(lost) if found.user_id == 1]
    steps = world.liquidation(opened.liquidation_id)
    await advance(steps, "cancelled")
    await pool.execute("UPDATE matching.instruments SET state = 'HALTED'")
    assert await anext(steps) == "pauses"
    assert await anext(steps) == "cancelled"
    if recovers:
        await publish_mark(redis, 60_000)
        assert [step async for step in steps] == ["released", "finished"]
        assert (await world.position(1, SOL))[2] == "OPEN"
    else:
        assert await anext(steps) == "pauses"


@pytest.mark.parametrize("sign", [1, -1], ids=["long", "short"])
async def test_the_fund_advances_nothing_to_an_account_that_has_equity(pool: Pool, redis: Redis, sign: int) -> None:
    """The loss of one position is covered by the profit of another: that is taken first, and nothing claimed."""
    world = await two_cross_accounts(pool, redis, sign, sol="600", money=5_000)
    mark, profit = 60_000 - sign * 8_000, 150 + sign * 6
    opened = await world.marks({BTC.instrument_id: D(mark), SOL.instrument_id: D(profit)})
    chosen = {found.user_id: found for found in opened}
    assert chosen[1].instrument_id == SOL.instrument_id
    await world.liquidations.begin(chosen[1].liquidation_id)
    assert (await world.liquidations.plan(PlanRequest(chosen[1].liquidation_id))).insurance == "0"
    # The other account is worth 3000 below zero at this mark, and no more is asked for.
    await world.liquidations.begin(chosen[2].liquidation_id)
    assert (await world.liquidations.plan(PlanRequest(chosen[2].liquidation_id))).insurance == "3000"


@pytest.mark.parametrize("sign", [1, -1], ids=["long", "short"])
async def test_nor_when_the_profit_that_covers_the_loss_stands(pool: Pool, redis: Redis, sign: int) -> None:
    """The account has equity, though its own money does not pay for what is closed: that is not the fund's to pay."""
    world = await two_cross_accounts(pool, redis, sign, sol="600", money=5_000)
    marks = {BTC.instrument_id: D(60_000 - sign * 8_000), SOL.instrument_id: D(150 + sign * 6)}
    await pool.execute("UPDATE matching.instruments SET state = 'HALTED' WHERE instrument_id = $1", SOL.instrument_id)
    [opened] = [found for found in await world.marks(marks) if found.user_id == 1]
    assert opened.instrument_id == BTC.instrument_id
    await world.liquidations.begin(opened.liquidation_id)
    plan = await world.liquidations.plan(PlanRequest(opened.liquidation_id))
    assert (plan.action, plan.insurance) == ("ORDER", "0")


@pytest.mark.parametrize("sign", [1, -1], ids=["long", "short"])
async def test_a_draw_names_the_liquidation_the_mark_and_the_bankruptcy_price(
    pool: Pool, redis: Redis, sign: int
) -> None:
    world = await bankrupt(pool, redis, sign)
    [opened] = await world.marked(60_000 - sign * 7_000)
    await world.liquidate(opened.liquidation_id)
    [draw] = await pool.fetch("SELECT * FROM ledger.insurance_draws")
    named = ("user_id", "instrument_id", "asset", "liquidation_id", "round", "mark_price", "bankruptcy_price")
    justification = (1, BTC.instrument_id, "USDT", opened.liquidation_id, 1, 60_000 - sign * 7_000)
    assert tuple(draw[name] for name in named) == (*justification, 60_000 - sign * 6_000)
    assert 0 < draw["amount"] <= 1_000
    assert await world.system(FUND) == 1_000_000 - draw["amount"]
    # What consumers of the ledger's events go by.
    kinds = {(e["referenceType"], e["entryType"]) for e in await outbox_events(pool, "LedgerEntryCreated")}
    assert {("LIQUIDATION", "REALIZED_PNL"), ("LIQUIDATION", "FEE"), ("INSURANCE_FUND", "INSURANCE_FUND")} <= kinds
    assert {entry for reference, entry in kinds if reference == "TRADE"} == {"FEE"}
    assert "INSURANCE_FUND" not in {entry for reference, entry in kinds if reference != "INSURANCE_FUND"}
    [trade_id] = [
        row[0]
        for row in await pool.fetch("SELECT reference_id FROM ledger.journals WHERE reference_type = 'LIQUIDATION'")
    ]
    causes = await pool.fetch("SELECT cause FROM positions.v_fills WHERE trade_id = $1 ORDER BY 1", int(trade_id))
    assert [row["cause"] for row in causes] == ["LIQUIDATION", "TRADE"]
    await assert_audit_is_clean(world)


@pytest.mark.parametrize("meanwhile", [False, True], ids=["before", "at the same time"])
async def test_what_the_fund_does_not_have_it_does_not_give_and_the_audit_says_so(
    pool: Pool, redis: Redis, meanwhile: bool
) -> None:
    world = await bankrupt(pool, redis, 1)
    [opened] = await world.marked(53_000)
    steps = world.liquidation(opened.liquidation_id)
    await advance(steps, "submitted")
    async with pool.acquire() as conn:
        # As if the settlement of another instrument had emptied it.
        emptying = conn.transaction()
        await emptying.start()
        await take_from_fund(conn, 999_900)
        settling = asyncio.create_task(world.settle()) if meanwhile else None
        if settling is not None:
            await until(lambda: pool.fetchval(WAITS_FOR_A_ROW), 10, "settlement to wait for the fund")
            assert not settling.done()
        await emptying.commit()
    await (settling or world.settle())
    async for step in steps:
        if step == "waits":
            await world.settle()
    [drawn] = [row["amount"] for row in await pool.fetch("SELECT amount FROM ledger.insurance_draws")]
    assert await world.system(FUND) == 0
    assert await world.system("exchange:shortfall") == 100 - drawn
    report = await run_audit(pool)
    assert [check.name for check in report.checks if not check.ok] == ["nothing_is_in_shortfall"]
    # A deposit makes it good first.
    await world.fund(5_000, "more")
    assert await world.system("exchange:shortfall") == 0
    assert await world.system(FUND) == 5_100 - drawn
    await assert_audit_is_clean(world)


async def test_a_settlement_that_draws_nothing_does_not_wait_for_the_fund(pool: Pool, redis: Redis) -> None:
    world = await bankrupt(pool, redis, 1)
    async with pool.acquire() as conn, conn.transaction():
        await conn.execute("SELECT FROM ledger.system_balances WHERE account = $1 FOR UPDATE", FUND)
        async with asyncio.timeout(5):
            await world.trade(1, 2, "0.1", 60_000)
    assert (await world.position(1))[0] == D("1.1")


async def take_from_fund(conn: Connection, amount: int) -> None:
    book = Book()
    book.open_journal("INSURANCE_FUND_DEPOSIT", "taken")
    book.post_system(INSURANCE_FUND, "USDT", "INSURANCE_FUND_DEPOSIT", D(-amount))
    book.post_system(DEPOSITS, "USDT", "INSURANCE_FUND_DEPOSIT", D(amount))
    await write_book(conn, book, {})


async def bankrupt(pool: Pool, redis: Redis, sign: int) -> LiquidationWorld:
    """User 1 has 1 BTC at 60000 and 10x, bankrupt 6000 from there; at 6900 somebody takes it."""
    world = LiquidationWorld(pool, redis)
    await world.fund(1_000_000)
    await world.deposit(100_000, 1, 2, 3)
    await world.trade(*((1, 2) if sign > 0 else (2, 1)), "1", 60_000)
    await world.place(limit(3, "BUY" if sign > 0 else "SELL", "1", 60_000 - sign * 6_900))
    await world.settle()
    return world

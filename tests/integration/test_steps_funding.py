"""Funding, step by step: who pays whom, from what, once, and as of which moment."""

import random
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest
from redis.asyncio import Redis

from activities.ledger import funding as ledger
from activities.ledger.audit import run_audit
from activities.ledger.insurance import deposit_to_fund
from activities.ledger.transfers import transfer_external
from activities.positions import funding as positions
from domain.funding import FundingPage, FundingRun, FundingSnapshot, FundingTotals, LogPosition, funding_payment
from domain.money import plain
from engine.guards import ONE
from storage.db import Pool
from storage.once import NotYetError
from tests.integration.ledger_world import BTC, World, advance, assert_conserved, dump, finish, limit, outbox_events

D = Decimal
ALICE, BOB, CAROL = 1, 2, 3


@pytest.fixture
async def world(pool: Pool, redis: Redis) -> World:
    """Alice is long 1 BTC against Bob at 60000 and leverage 10."""
    world = World(pool, redis)
    await world.deposit(100_000, ALICE, BOB, CAROL)
    await world.trade(ALICE, BOB, "1", 60_000)
    return world


def due(moment: datetime) -> FundingRun:
    return FundingRun(BTC.instrument_id, moment.isoformat())


async def now(world: World) -> datetime:
    """The time of the database, which stamps commands, to the millisecond after all that happened."""
    moment: datetime = await world.pool.fetchval("SELECT clock_timestamp() + interval '2 ms'")
    while await world.pool.fetchval("SELECT clock_timestamp() < $1", moment + timedelta(milliseconds=2)):
        pass
    return moment


async def position(world: World, user_id: int) -> tuple[Decimal, Decimal, Decimal]:
    """Margin, realised profit and liquidation price."""
    row = await world.pool.fetchrow(
        "SELECT margin, realized_pnl, liquidation_price FROM positions.positions WHERE user_id = $1", user_id
    )
    assert row is not None
    return row[0], row[1], row[2]


async def paid_out(world: World, *user_ids: int) -> None:
    """Withdraw all that is available."""
    for user_id in user_ids:
        available, _ = await world.balance(user_id)
        async with world.pool.acquire() as conn, conn.transaction():
            await transfer_external(conn, "WITHDRAWAL", f"all-{user_id}", user_id, "USDT", -available)


async def assert_clean(world: World) -> None:
    report = await run_audit(world.pool)
    assert report.ok, report
    await assert_conserved(world)


@pytest.mark.parametrize(("rate", "alice_gets"), [("0.0001", D(-6)), ("-0.0001", D(6)), ("0", D(0))])
async def test_longs_pay_shorts_when_the_rate_is_positive_and_the_reverse(
    world: World, rate: str, alice_gets: Decimal
) -> None:
    moment = await now(world)
    before = {user_id: await world.balance(user_id) for user_id in (ALICE, BOB)}
    await world.publish_rate(moment, rate, 60_000)
    await finish(world.funding(due(moment)))
    for user_id, payment in ((ALICE, alice_gets), (BOB, -alice_gets)):
        available, reserved = before[user_id]
        assert await world.balance(user_id) == (available + payment, reserved)
        assert (await position(world, user_id))[1] == payment
    assert await world.pool.fetchval("SELECT count(*) FROM positions.position_events WHERE type = 'FUNDING'") == 2
    await assert_clean(world)


async def test_a_payment_is_told_as_a_ledger_entry_and_a_balance(world: World) -> None:
    moment = await now(world)
    await world.publish_rate(moment, "0.0001", 60_000)
    await finish(world.funding(due(moment)))
    told = [e for e in await outbox_events(world.pool, "LedgerEntryCreated") if e["referenceType"] == "FUNDING_FEE"]
    assert [(e["userId"], e["deltaAvailable"], e["instrumentId"]) for e in told] == [
        ("1", "-6", BTC.instrument_id),
        ("2", "6", BTC.instrument_id),
    ]


async def test_dust_goes_to_its_account(world: World) -> None:
    await world.trade(CAROL, BOB, "0.001", 60_000)
    moment = await now(world)
    await world.publish_rate(moment, "0.000000000001", "60001.37")
    await finish(world.funding(due(moment)))
    # Exact: 1 and 0.001 times 0.00000006000137; longs pay 0.00000007 and 0.00000001, the short gets 0.00000006.
    assert await world.system("exchange:rounding") == D("0.00000002")
    assert await world.system("exchange:funding") == 0
    await assert_clean(world)


async def test_a_second_run_pays_nothing_more_and_answers_the_same(world: World) -> None:
    moment = await now(world)
    await world.publish_rate(moment, "0.0001", 60_000)
    await finish(world.funding(due(moment)))
    before = await dump(world.pool)
    await finish(world.funding(due(moment)))
    assert await world.ledger.close_funding(due(moment)) == FundingTotals(2, "6", "6", "0")
    assert await dump(world.pool) == before


async def test_the_rate_is_fixed_once(world: World) -> None:
    moment = await now(world)
    await world.publish_rate(moment, "0.0001", 60_000)
    steps = world.funding(due(moment))
    await advance(steps, "opened")
    await world.pool.execute("UPDATE market.funding_rates SET rate = 0.01, mark_price = 1")
    await finish(steps)
    assert (await position(world, ALICE))[1] == -6


async def test_without_a_rate_nothing_is_paid(world: World) -> None:
    moment = await now(world)
    with pytest.raises(NotYetError, match="no funding rate"):
        await world.ledger.open_funding(due(moment))
    assert not await world.pool.fetchval("SELECT count(*) FROM ledger.funding_runs")


async def test_fills_after_the_funding_time_do_not_count(world: World) -> None:
    moment = await now(world)
    await world.trade(CAROL, ALICE, "1", 60_000)
    await world.trade(CAROL, BOB, "0.5", 60_000)
    await world.publish_rate(moment, "0.0001", 60_000)
    await finish(world.funding(due(moment)))
    rows = await world.pool.fetch("SELECT user_id, signed_quantity FROM positions.funding_positions ORDER BY user_id")
    assert [tuple(row) for row in rows] == [(ALICE, 1), (BOB, -1)]
    # Alice is flat by now and pays all the same.
    assert await world.pool.fetchval("SELECT status FROM positions.positions WHERE user_id = $1", ALICE) == "CLOSED"
    assert (await position(world, CAROL))[1] == 0
    await assert_clean(world)


async def test_positions_are_fixed_once_all_commands_before_are_carried_out_and_applied(world: World) -> None:
    await world.place(limit(BOB, "SELL", "1", 60_000))
    await world.place(limit(CAROL, "BUY", "1", 60_000))
    moment = await now(world)
    await world.publish_rate(moment, "0.0001", 60_000)
    run = due(moment)
    assert await world.ledger.open_funding(run)
    commands = LogPosition(BTC.instrument_id, await world.matching.last_command(BTC.instrument_id))
    with pytest.raises(NotYetError, match="engine"):
        await world.matching.events_of(commands)
    await world.match()
    snapshot = FundingSnapshot(run, await world.matching.events_of(commands))
    with pytest.raises(NotYetError, match="Positions"):
        await world.positions.fix_funding_positions(snapshot)
    await world.settle()
    await world.positions.fix_funding_positions(snapshot)
    rows = await world.pool.fetch("SELECT user_id, signed_quantity FROM positions.funding_positions ORDER BY user_id")
    assert [tuple(row) for row in rows] == [(ALICE, 1), (BOB, -2), (CAROL, 1)]


async def test_who_has_nothing_available_pays_from_the_position_s_margin_and_comes_nearer_to_liquidation(
    world: World,
) -> None:
    await world.place(limit(ALICE, "SELL", "1.5", 70_000))
    await world.settle()
    await paid_out(world, ALICE)
    margin, _, liquidation = await position(world, ALICE)
    orders = await world.pool.fetchval("SELECT order_margin FROM ledger.margin_holds WHERE user_id = $1", ALICE)
    backing = world.matchers[BTC.instrument_id].book.accounts[ALICE].backing
    moment = await now(world)
    await world.publish_rate(moment, "0.01", 60_000)
    await finish(world.funding(due(moment)))
    assert orders > 0
    assert await world.balance(ALICE) == (D(0), margin + orders - 600)
    after, realized, nearer = await position(world, ALICE)
    assert (after, realized) == (margin - 600, D(-600))
    assert nearer > liquidation
    # The engine closes no further than what is left.
    account = world.matchers[BTC.instrument_id].book.accounts[ALICE]
    taken = D(abs(account.backing - backing)) / ONE * BTC.tick_size * BTC.lot_size
    assert taken == 600
    assert D((await outbox_events(world.pool, "RiskUpdate"))[-1]["liquidationPrice"]) == nearer
    await assert_clean(world)


@pytest.mark.parametrize("fund", [20_000, 1_000])
async def test_what_an_account_cannot_pay_the_insurance_fund_does(world: World, fund: int) -> None:
    async with world.pool.acquire() as conn, conn.transaction():
        assert await deposit_to_fund(conn, "seed", "USDT", D(fund))
    await paid_out(world, ALICE)
    margin, _, _ = await position(world, ALICE)
    before, _ = await world.balance(BOB)
    moment = await now(world)
    await world.publish_rate(moment, "0.2", 60_000)
    await finish(world.funding(due(moment)))
    assert await world.balance(ALICE) == (D(0), D(0))
    assert (await world.balance(BOB))[0] == before + 12_000
    # It gives what it has; what is missing stands in an account of its own.
    assert await world.system("exchange:insurance_fund") == max(0, fund + margin - 12_000)
    [draw] = await world.pool.fetch("SELECT * FROM ledger.insurance_draws")
    assert (draw["reference_type"], draw["user_id"], draw["amount"]) == ("FUNDING_FEE", ALICE, 12_000 - margin)
    assert draw["liquidation_id"] is None
    required = await outbox_events(world.pool, "InsuranceFundRequired")
    assert [(e["userId"], D(e["amount"])) for e in required] == [("1", 12_000 - margin)]
    assert await world.ledger.close_funding(due(moment)) == FundingTotals(2, "12000", "12000", plain(12_000 - margin))
    if fund == 1_000:
        assert await world.system("exchange:shortfall") == fund + margin - 12_000
        report = await run_audit(world.pool)
        assert [check.name for check in report.checks if not check.ok] == ["nothing_is_in_shortfall"]
    else:
        await assert_clean(world)


@pytest.mark.parametrize("size", [1, 2, 3])
async def test_pages_of_any_size_come_to_the_same(world: World, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(ledger, "FUNDING_PAGE", size)
    monkeypatch.setattr(positions, "FUNDING_PAGE", size)
    await world.trade(CAROL, BOB, "0.3", 60_000)
    moment = await now(world)
    await world.publish_rate(moment, "0.0001", "60000.01")
    await finish(world.funding(due(moment)))
    assert [(await position(world, user_id))[1] for user_id in (ALICE, BOB, CAROL)] == [
        D("-6.000001"),
        D("7.8000013"),
        D("-1.8000003"),
    ]
    assert await world.system("exchange:funding") == 0
    await assert_clean(world)


async def test_between_ledger_and_positions_the_audit_waits_and_afterwards_it_is_strict(world: World) -> None:
    await paid_out(world, ALICE)
    moment = await now(world)
    await world.publish_rate(moment, "0.01", 60_000)
    run = due(moment)
    steps = world.funding(run)
    await advance(steps, "paid")
    report = await run_audit(world.pool)
    assert report.ok, report
    assert [check.name for check in report.checks if check.detail] == ["ledger_holds_what_positions_need"]
    await world.ledger.close_funding(run)
    report = await run_audit(world.pool)
    assert [check.name for check in report.checks if not check.ok] == ["funding_is_confirmed"]
    await world.positions.confirm_funding(FundingPage(run, 0))
    await assert_clean(world)


async def test_payments_are_those_of_the_rule(world: World) -> None:
    dice = random.Random(7)
    await world.pool.execute(
        "INSERT INTO positions.positions (user_id, instrument_id, signed_quantity, leverage)"
        " SELECT 1000 + n, $1, q, 10 FROM unnest($2::numeric[]) WITH ORDINALITY AS u (q, n)",
        BTC.instrument_id,
        [D(dice.randint(-(10**11), 10**11)) / 10**8 for _ in range(500)],
    )
    for number in range(10):
        moment = datetime(2099, 1, 1 + number, tzinfo=UTC)
        mark, rate = D(dice.randint(1, 10**13)) / 10**8, D(dice.randint(-(10**10), 10**10)) / 10**12
        await world.publish_rate(moment, str(rate), mark)
        await advance(world.funding(due(moment)), "fixed")
        rows = await world.pool.fetch(
            "SELECT signed_quantity, payment FROM positions.funding_positions WHERE funding_time = $1", moment
        )
        assert len(rows) > 500
        for row in rows:
            assert row["payment"] == funding_payment(row["signed_quantity"], mark, rate)

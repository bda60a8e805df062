"""What may leave: losses of cross positions and funding that is due stay, on every way out, in every interleaving."""

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest
import pytest_asyncio
from redis.asyncio import Redis

from activities.ledger import funding as ledger
from activities.ledger.transfers import transfer_external
from activities.positions import funding as positions
from activities.risk.collateral import free_collateral, read_collateral
from activities.risk.exposures import set_margin_mode
from domain.collateral import Collateral
from domain.funding import FundingRun
from domain.instruments import Instrument
from domain.margin_changes import MarginChange
from domain.problems import Problem
from domain.sagas import StepRequest
from storage.db import Pool
from tests.integration.ledger_world import (
    BTC,
    ETH,
    SOL,
    World,
    advance,
    assert_audit_is_clean,
    assert_conserved,
    finish,
    limit,
)

D = Decimal
ALICE, BOB, CAROL = 1, 2, 3
RATE = "0.0001934"
OWED = D("46.416")


@pytest_asyncio.fixture
async def world(pool: Pool, redis: Redis) -> AsyncIterator[World]:
    world = World(pool, redis)
    await world.deposit(1_000_000, BOB, CAROL)
    yield world
    await world.settle(BTC)
    await world.settle(ETH)
    await assert_conserved(world)
    await assert_audit_is_clean(world)


async def collateral(world: World, user_id: int = ALICE) -> Collateral:
    async with world.pool.acquire() as conn:
        return (await read_collateral(conn, [user_id]))[user_id, "USDT"]


async def free(world: World, user_id: int = ALICE) -> Decimal:
    async with world.pool.acquire() as conn:
        return (await free_collateral(conn, [user_id]))[user_id, "USDT"]


async def withdraw(world: World, amount: Decimal, reference: str = "w", user_id: int = ALICE) -> str | None:
    """The refusal, if there is one."""
    try:
        async with world.pool.acquire() as conn, conn.transaction():
            await transfer_external(conn, "WITHDRAWAL", reference, user_id, "USDT", -amount)
    except Problem as problem:
        return problem.code
    return None


async def cross(world: World, instrument: Instrument = BTC, user_id: int = ALICE) -> None:
    async with world.pool.acquire() as conn, conn.transaction():
        await set_margin_mode(conn, user_id, instrument, "CROSS")


async def order_of(world: World, amount: Decimal) -> str | None:
    """Place a SOL order that needs `amount` or a little less; why it failed, if it did."""
    price = D(150)
    # A tenth, and the taker's fee.
    quantity = ((amount / (price * D("0.1005"))) / SOL.lot_size).to_integral_value("ROUND_FLOOR") * SOL.lot_size
    (order_id,) = await world.place(limit(ALICE, "BUY", str(quantity), price, SOL))
    _, reason = await world.status(order_id)
    await world.cancel(order_id)
    await world.settle(SOL)
    return reason


async def margin_of(world: World, amount: Decimal) -> str | None:
    return await world.change(world.margin_change(ALICE, "MARGIN", str(amount), ETH))


WAYS_OUT: dict[str, Callable[[World, Decimal], Awaitable[str | None]]] = {
    "withdrawal": withdraw,
    "order": order_of,
    "margin": margin_of,
}


async def database_time(world: World) -> datetime:
    moment: datetime = await world.pool.fetchval("SELECT clock_timestamp()")
    return moment


async def open_four(world: World, side: str = "long") -> None:
    """Alice has 4 BTC and 0.1 ETH, long or short, at leverage 10; all that is left of 26,000 is available."""
    await world.deposit(26_000, ALICE)
    for quantity, price, instrument in (("4", 60_000, BTC), ("0.1", 3_000, ETH)):
        buyer, seller = (ALICE, BOB) if side == "long" else (BOB, ALICE)
        await world.trade(buyer, seller, quantity, price, instrument)


async def close_four(world: World, side: str = "long") -> None:
    buyer, seller = (CAROL, ALICE) if side == "long" else (ALICE, CAROL)
    await world.trade(buyer, seller, "4", 60_000)
    await world.mark(3_000, ETH)


async def pass_funding_time(world: World) -> datetime:
    """A funding time that everything before it precedes and everything after it follows."""
    moment = await database_time(world) + timedelta(milliseconds=2)
    await wait_for(world, moment)
    return moment


async def wait_for(world: World, moment: datetime) -> None:
    """Until what happens next is at least a millisecond after `moment`."""
    left = moment + timedelta(milliseconds=2) - await database_time(world)
    await world.pool.execute("SELECT pg_sleep($1)", max(0.0, left.total_seconds()))


async def pass_scheduled_time(world: World, cap: str) -> datetime:
    """The same, of a time that the market process has announced once, and has no rate of yet."""
    # Its multiples are this second and one in half a century.
    seconds = math.ceil((await database_time(world)).timestamp() + 0.05)
    await world.schedule_funding(seconds, cap)
    moment = datetime.fromtimestamp(seconds, UTC)
    assert (await collateral(world)).funding_owed == 0
    await wait_for(world, moment)
    return moment


async def assert_alice_pays(world: World, moment: datetime) -> None:
    await world.settle(BTC)
    before = sum(await world.balance(ALICE))
    await finish(world.funding(FundingRun(BTC.instrument_id, moment.isoformat())))
    assert before - sum(await world.balance(ALICE)) == OWED
    assert not await world.pool.fetchval(
        "SELECT count(*) FROM ledger.ledger_entries WHERE account = 'exchange:insurance_fund'"
    )
    # From here on it may leave.
    assert (await collateral(world)).funding_owed == 0
    assert await free(world) == (await world.balance(ALICE))[0]


@pytest.mark.parametrize("way", WAYS_OUT)
@pytest.mark.parametrize("mode", ["ISOLATED", "CROSS"])
@pytest.mark.parametrize(("side", "rate"), [("long", RATE), ("short", "-" + RATE)])
async def test_what_is_due_of_funding_cannot_leave_before_it_is_collected(
    world: World, way: str, mode: str, side: str, rate: str
) -> None:
    if mode == "CROSS":
        await cross(world)
    await open_four(world, side)
    moment = await pass_funding_time(world)
    await close_four(world, side)
    await world.publish_rate(moment, rate, 60_000)
    available, _ = await world.balance(ALICE)
    assert await collateral(world) == Collateral(available, D(0), OWED)
    assert await WAYS_OUT[way](world, available) in ("INSUFFICIENT_FUNDS", "INSUFFICIENT_MARGIN")
    assert await WAYS_OUT[way](world, available - OWED) is None
    assert (await world.balance(ALICE))[0] >= OWED
    await assert_alice_pays(world, moment)


@pytest.mark.parametrize("way", WAYS_OUT)
@pytest.mark.parametrize("side", ["long", "short"])
async def test_before_the_rate_is_known_its_cap_stays(world: World, way: str, side: str) -> None:
    await open_four(world, side)
    moment = await pass_scheduled_time(world, "0.0045")
    await close_four(world, side)
    available, _ = await world.balance(ALICE)
    assert (await collateral(world)).funding_owed == D(240_000) * D("0.0045")
    assert await WAYS_OUT[way](world, available) in ("INSUFFICIENT_FUNDS", "INSUFFICIENT_MARGIN")
    assert await WAYS_OUT[way](world, available - 1_080) is None
    await world.publish_rate(moment, RATE if side == "long" else "-" + RATE, 60_000)
    assert (await collateral(world)).funding_owed == OWED
    await assert_alice_pays(world, moment)


async def test_who_gets_the_payment_owes_nothing_and_gets_nothing_in_advance(world: World) -> None:
    await open_four(world, "short")
    moment = await pass_funding_time(world)
    await world.publish_rate(moment, RATE, 60_000)
    assert (await collateral(world)).funding_owed == 0
    assert await free(world) == (await world.balance(ALICE))[0]
    assert (await collateral(world, BOB)).funding_owed == OWED
    await finish(world.funding(FundingRun(BTC.instrument_id, moment.isoformat())))


async def test_who_opens_after_the_funding_time_owes_nothing(world: World) -> None:
    await open_four(world)
    moment = await pass_scheduled_time(world, "0.0045")
    await world.trade(CAROL, BOB, "4", 60_000)
    assert (await collateral(world, CAROL)).funding_owed == 0
    await world.publish_rate(moment, RATE, 60_000)
    assert (await collateral(world, CAROL)).funding_owed == 0
    await finish(world.funding(FundingRun(BTC.instrument_id, moment.isoformat())))


async def test_a_rate_of_the_future_is_not_due(world: World) -> None:
    await open_four(world)
    await world.publish_rate(await database_time(world) + timedelta(hours=1), RATE, 60_000)
    assert (await collateral(world)).funding_owed == 0


async def test_several_times_that_are_not_collected_add_up_and_a_missed_one_is_not_forgotten(world: World) -> None:
    await open_four(world)
    moments = [await pass_funding_time(world) for _ in range(3)]
    for moment in moments:
        await world.publish_rate(moment, RATE, 60_000)
    runs = [FundingRun(BTC.instrument_id, moment.isoformat()) for moment in moments]
    assert (await collateral(world)).funding_owed == 3 * OWED
    for run, owed in ((runs[0], 2 * OWED), (runs[2], OWED), (runs[1], D(0))):
        await finish(world.funding(run))
        assert (await collateral(world)).funding_owed == owed
    settled = await world.pool.fetchval("SELECT collected_at FROM ledger.funding_cursors")
    assert settled == moments[2]


async def test_what_an_open_run_has_booked_is_not_owed_as_well(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "FUNDING_PAGE", 1)
    monkeypatch.setattr(positions, "FUNDING_PAGE", 1)
    await open_four(world)
    await world.trade(CAROL, BOB, "1", 60_000)
    moment = await pass_funding_time(world)
    await world.publish_rate(moment, RATE, 60_000)
    before = {user_id: await free(world, user_id) for user_id in (ALICE, CAROL)}
    paid = 0
    async for step in world.funding(FundingRun(BTC.instrument_id, moment.isoformat())):
        paid += step == "paid"
        assert {user_id: await free(world, user_id) for user_id in (ALICE, CAROL)} == before
    assert paid == 4
    assert await world.balance(ALICE) == (before[ALICE], D(24_000) + 30)


async def test_a_payer_whose_money_is_elsewhere_pays_with_it_and_the_orders_that_lose_their_cover_are_cancelled(
    world: World,
) -> None:
    await open_four(world)
    await world.mark(3_000, ETH)
    orders = await world.place(limit(ALICE, "BUY", "0.2", 2_900, ETH), limit(ALICE, "BUY", "0.001", 58_000))
    await world.settle(ETH)
    await world.settle()
    await close_four(world)
    # What leaves before the funding time may leave; the position is opened anew with all that is left.
    await world.trade(ALICE, CAROL, "0.01", 60_000)
    assert await withdraw(world, await free(world)) is None
    assert (await world.balance(ALICE))[0] == 0
    holds = {
        row["instrument_id"]: row
        for row in await world.pool.fetch(
            "SELECT * FROM ledger.margin_holds WHERE user_id = $1 ORDER BY instrument_id", ALICE
        )
    }
    btc, eth = holds[BTC.instrument_id], holds[ETH.instrument_id]
    assert min(btc["order_margin"], btc["position_margin"], eth["order_margin"], eth["position_margin"]) > 0
    everything = btc["order_margin"] + btc["position_margin"] + eth["order_margin"] + eth["position_margin"]
    moment = await pass_funding_time(world)
    # All but one unit of everything.
    owed = everything - D(1)
    await world.publish_rate(moment, str(owed / 600), 60_000)
    await finish(world.funding(FundingRun(BTC.instrument_id, moment.isoformat())))
    assert sum(await world.balance(ALICE)) == 1
    assert (
        await world.pool.fetchval(
            "SELECT sum(delta_available) FROM ledger.ledger_entries WHERE account = 'exchange:insurance_fund'"
        )
        is None
    )
    assert [(await world.status(order))[0] for order in orders] == ["CANCEL_REQUESTED", "CANCEL_REQUESTED"]
    margins = await world.pool.fetch(
        "SELECT p.margin, h.position_margin FROM positions.positions p JOIN ledger.margin_holds h"
        " USING (user_id, instrument_id) WHERE user_id = $1",
        ALICE,
    )
    assert all(row[0] == row[1] for row in margins)
    await world.settle()
    await world.settle(ETH)
    assert [(await world.status(order))[0] for order in orders] == ["CANCELLED", "CANCELLED"]
    assert not await world.pool.fetchval("SELECT count(*) FROM ledger.margin_holds WHERE order_short <> 0")


@pytest_asyncio.fixture
async def loser(world: World) -> World:
    """Alice is long 1 BTC (cross, leverage 10) and 0.1 ETH (isolated): of 3,939.82 available, 3,000 are lost."""
    await world.deposit(10_000, ALICE)
    await cross(world)
    await world.trade(ALICE, BOB, "1", 60_000)
    await world.trade(ALICE, BOB, "0.1", 3_000, ETH)
    await world.mark(57_000)
    await world.mark(3_000, ETH)
    assert await free(world) == D("939.85")
    return world


async def assert_the_loss_is_covered(world: World) -> None:
    (available, _), owed = await world.balance(ALICE), await collateral(world)
    assert owed.cross_loss == 3_000
    assert available >= 3_000


@pytest.mark.parametrize("way", WAYS_OUT)
async def test_what_a_cross_position_has_lost_cannot_leave(loser: World, way: str) -> None:
    assert await WAYS_OUT[way](loser, D(970)) in ("INSUFFICIENT_FUNDS", "INSUFFICIENT_MARGIN")
    assert await WAYS_OUT[way](loser, D("939.85")) is None
    await assert_the_loss_is_covered(loser)


async def test_a_lower_leverage_does_not_take_what_a_cross_position_has_lost(loser: World) -> None:
    # 0.1 ETH at leverage 1 would take 270 more.
    assert await withdraw(loser, D("669.86")) is None
    assert await loser.lever(ALICE, 1, ETH) == "INSUFFICIENT_MARGIN"
    assert await loser.lever(ALICE, 2, ETH) is None
    await assert_the_loss_is_covered(loser)


async def test_a_leverage_that_was_decided_on_before_the_money_left_takes_no_more_than_is_free(loser: World) -> None:
    steps = loser.change_margin(loser.margin_change(ALICE, "LEVERAGE", 1, ETH))
    await advance(steps, "planned")
    assert await withdraw(loser, D("839.85")) is None
    await finish(steps)
    assert await free(loser) == 0
    await assert_the_loss_is_covered(loser)


async def test_a_loss_that_is_realised_stays_until_it_is_booked(loser: World) -> None:
    await loser.place(limit(CAROL, "BUY", "1", 57_000))
    await loser.place(limit(ALICE, "SELL", "1", 57_000))
    await loser.match()
    events = loser.unsettled()
    assert events is not None
    frees = [await free(loser)]
    async for step in loser.settlement(events):
        frees.append(await free(loser))
        if step == "exposed":
            assert await withdraw(loser, D(970)) == "INSUFFICIENT_FUNDS"
    # Applied, exposed: as before. Booked: the margin comes back, the loss and the fee are paid.
    after = D("3939.85") + 6_000 - 3_000 - D("28.5")
    assert frees == [D("939.85")] * 3 + [after] * (len(frees) - 3)


@pytest.mark.parametrize("attempt", range(5))
async def test_withdrawals_at_once_do_not_share_what_covers_no_loss(loser: World, attempt: int) -> None:
    refusals = await asyncio.gather(*(withdraw(loser, D(400), f"{attempt}-{number}") for number in range(6)))
    assert sorted(refusals, key=str) == ["INSUFFICIENT_FUNDS"] * 4 + [None] * 2
    await assert_the_loss_is_covered(loser)


async def checked(world: World, quantity: str, price: object, instrument: Instrument) -> StepRequest:
    """An order that risk has passed and the ledger has not frozen."""
    batch = await world.take_in(limit(ALICE, "BUY", quantity, price, instrument))
    step = StepRequest(batch.saga_id, 1, batch.order_ids)
    assert (await world.risk.check_orders(step)).passed == batch.order_ids
    return step


async def planned(world: World, amount: str) -> MarginChange:
    change = world.margin_change(ALICE, "MARGIN", amount, ETH)
    assert (await world.risk.plan_margin_change(change)).refusal is None
    return change


async def release(world: World, *steps: StepRequest) -> None:
    """Give back what orders hold, or never held."""
    for step in steps:
        await world.risk.release_orders(step)
        await world.ledger.unfreeze_funds(step)
        await world.pool.execute("UPDATE orders.orders SET status = 'FAILED' WHERE order_id = ANY($1)", step.order_ids)


async def test_two_orders_that_were_checked_at_once_do_not_share_what_covers_no_loss(loser: World) -> None:
    await loser.mark(150, SOL)
    # 603 each.
    one, two = await checked(loser, "40", 150, SOL), await checked(loser, "2", 3_000, ETH)
    outcomes = await asyncio.gather(loser.ledger.freeze_funds(one), loser.ledger.freeze_funds(two))
    assert sorted(len(outcome.passed) for outcome in outcomes) == [0, 1]
    await assert_the_loss_is_covered(loser)
    await release(loser, one, two)


async def test_an_order_and_a_withdrawal_do_not_share_what_covers_no_loss(loser: World) -> None:
    await loser.mark(150, SOL)
    step = await checked(loser, "40", 150, SOL)
    outcome, refusal = await asyncio.gather(loser.ledger.freeze_funds(step), withdraw(loser, D(600)))
    assert bool(outcome.passed) == (refusal is not None)
    await assert_the_loss_is_covered(loser)
    await release(loser, step)


async def test_a_margin_move_and_a_withdrawal_do_not_share_what_covers_no_loss(loser: World) -> None:
    change = await planned(loser, "600")
    moved, refusal = await asyncio.gather(loser.ledger.move_margin(change), withdraw(loser, D(600)))
    assert bool(moved.refused) == (refusal is None)
    await assert_the_loss_is_covered(loser)
    await loser.positions.adopt_margin(change)


@pytest.mark.parametrize("first", ["withdrawal", "order", "margin"])
async def test_whoever_waits_for_the_lock_sees_what_the_one_before_has_taken(loser: World, first: str) -> None:
    """The first has done its work but not committed when the second comes."""
    await loser.mark(150, SOL)
    step, change = await checked(loser, "40", 150, SOL), await planned(loser, "600")
    actions: dict[str, Callable[[], Awaitable[object]]] = {
        "withdrawal": lambda: withdraw(loser, D(600)),
        "order": lambda: loser.ledger.freeze_funds(step),
        "margin": lambda: loser.ledger.move_margin(change),
    }
    async with loser.pool.acquire() as conn:
        # The lock keeps all three waiting at the same place, in the order in which they came.
        transaction = conn.transaction()
        await transaction.start()
        await conn.execute("SELECT FROM ledger.ledger_balances WHERE user_id = $1 FOR UPDATE", ALICE)
        tasks = []
        for name in (first, *(other for other in actions if other != first)):
            tasks.append(asyncio.ensure_future(actions[name]()))
            await asyncio.sleep(0.05)
        assert not any(task.done() for task in tasks)
        await transaction.commit()
        await asyncio.gather(*tasks)
    await assert_the_loss_is_covered(loser)
    assert await free(loser) < 600
    await release(loser, step)
    await loser.positions.adopt_margin(change)

"""What the engine has told a client counts in what that client does next, also while settlement has not got there."""

import asyncio
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import pytest
import pytest_asyncio
from redis.asyncio import Redis

from activities.matching.engine_log import EngineLog
from activities.risk import unfinished
from activities.risk.check import pre_check
from activities.risk.events import users_of
from activities.risk.exposures import set_margin_mode
from activities.risk.steps import RiskActivities
from activities.risk.unfinished import patiently, read_unfinished, refused_with
from domain.margin_changes import MarginVerdict
from domain.matching import (
    Amended,
    AmendRejected,
    AnyEvent,
    Cancelled,
    Deleveraged,
    Expired,
    Filled,
    Placed,
    Rejected,
    StateChanged,
    StopPlaced,
    Trade,
    Triggered,
    encode,
)
from domain.order_entry import NewOrder
from domain.problems import Problem
from domain.sagas import Backing, OrderBatch, Outcome, Refusal, StepRequest
from storage.db import Connection, Pool
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
    market,
)

D = Decimal
SIDES = [("BUY", "SELL"), ("SELL", "BUY")]
MODES = ["ISOLATED", "CROSS"]


@pytest_asyncio.fixture
async def world(pool: Pool, redis: Redis) -> Any:
    world = World(pool, redis)
    # What waits is seen to wait.
    world.risk = RiskActivities(pool, EngineLog(), patience_seconds=0)
    await world.mark(60_000)
    await world.mark(3_000, ETH)
    await world.deposit(1_000_000, 2)
    yield world
    await settle_all(world)
    for row in await pool.fetch("SELECT workflow_id, order_ids FROM orders.v_open_sagas ORDER BY created_at"):
        # Its rounds so far answer as they did.
        await finish(world.placement(OrderBatch(*row)))
    await settle_all(world)
    await assert_conserved(world)
    await assert_audit_is_clean(world)


async def settle_all(world: World) -> None:
    for instrument in (BTC, ETH, SOL):
        await world.settle(instrument)


def reduce_only(user_id: int, side: Any, quantity: str) -> NewOrder:
    return limit(user_id, side, quantity, 66_000 if side == "SELL" else 54_000, reduce_only=True)


class Checks:
    """The rounds of one saga's check, asked for one at a time."""

    def __init__(self, world: World, batch: OrderBatch) -> None:
        self._world, self._batch, self._round = world, batch, 0

    async def next(self, order_ids: Sequence[int] | None = None) -> Outcome:
        self._round += 1
        return await self._world.risk.check_orders(
            StepRequest(self._batch.saga_id, self._round, list(order_ids or self._batch.order_ids))
        )


async def ask(world: World, *orders: NewOrder) -> tuple[Checks, Outcome, list[int]]:
    batch = await world.take_in(*orders)
    checks = Checks(world, batch)
    return checks, await checks.next(), batch.order_ids


async def unsettled_trade(world: World, user_id: int, side: Any, quantity: str = "1", price: int = 60_000) -> None:
    """The user is told FILLED; nothing of it is settled."""
    other = "SELL" if side == "BUY" else "BUY"
    await world.place(limit(2, other, quantity, price))
    await world.place(limit(user_id, side, quantity, price))
    events = await world.match()
    assert any(isinstance(event, Filled) and event.user_id == user_id for event in events)


async def set_mode(world: World, user_id: int, mode: str) -> None:
    async with world.pool.acquire() as conn, conn.transaction():
        await set_margin_mode(conn, user_id, BTC, mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("side", "other"), SIDES)
async def test_a_reduce_only_order_after_filled_waits_for_settlement_and_passes(
    world: World, side: Any, other: Any, mode: str
) -> None:
    await set_mode(world, 1, mode)
    await world.deposit(10_000, 1)
    await unsettled_trade(world, 1, side)
    checks, checked, ids = await ask(world, reduce_only(1, other, "1"))
    assert checked == Outcome(busy=ids)
    await world.settle()
    assert await checks.next() == Outcome(passed=ids)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("side", "other"), SIDES)
async def test_a_market_close_after_filled_needs_no_new_money(world: World, side: Any, other: Any, mode: str) -> None:
    await set_mode(world, 1, mode)
    await world.deposit(6_030, 1)
    await unsettled_trade(world, 1, side)
    bound = 59_700 if other == "SELL" else 60_300
    checks, checked, ids = await ask(world, market(1, other, "1", bound))
    assert checked == Outcome(busy=ids)
    await world.settle()
    assert await checks.next() == Outcome(passed=ids, backed=[Backing(ids[0], 0)])


@pytest.mark.parametrize(("side", "price"), [("BUY", 59_990), ("SELL", 60_010)])
async def test_the_same_order_after_expired_has_the_money_of_the_first(world: World, side: Any, price: int) -> None:
    await world.deposit(6_100, 1)
    order = limit(1, side, "1", price, time_in_force="IOC")
    await world.place(order)
    assert any(isinstance(event, Expired) for event in await world.match())
    checks, checked, ids = await ask(world, order)
    assert checked == Outcome(busy=ids)
    await world.settle()
    assert await checks.next() == Outcome(passed=ids)


async def test_the_same_money_after_cancelled_buys_in_another_instrument(world: World) -> None:
    await world.deposit(6_100, 1)
    (resting,) = await world.place(limit(1, "BUY", "1", 59_000))
    await world.settle()
    await world.cancel(resting)
    assert any(isinstance(event, Cancelled) for event in await world.match())
    checks, checked, ids = await ask(world, limit(1, "BUY", "20", 3_000, ETH))
    assert checked == Outcome(busy=ids)
    await world.settle()
    assert await checks.next() == Outcome(passed=ids)


@pytest.mark.parametrize("until", ["applied", "exposed", "booked"])
async def test_it_waits_until_risk_and_the_ledger_are_through(world: World, until: str) -> None:
    await world.deposit(6_100, 1)
    order = limit(1, "BUY", "1", 59_000, time_in_force="IOC")
    await world.place(order)
    await world.match()
    events = world.unsettled()
    assert events is not None
    settling = world.settlement(events)
    await advance(settling, until)
    checks, checked, ids = await ask(world, order)
    assert checked == (Outcome(passed=ids) if until == "booked" else Outcome(busy=ids))
    await finish(settling)
    assert (await checks.next()).passed == ids if until != "booked" else True


async def test_a_refusal_that_is_right_stands_once_all_is_settled(world: World) -> None:
    await world.deposit(10_000, 1)
    await unsettled_trade(world, 1, "BUY", "0.1")
    checks, checked, ids = await ask(world, reduce_only(1, "BUY", "1"), limit(1, "BUY", "5", 60_000))
    assert checked == Outcome(busy=ids)
    await world.settle()
    assert await checks.next() == Outcome(
        refused=[Refusal(ids[0], "REDUCE_ONLY_REJECTED"), Refusal(ids[1], "INSUFFICIENT_MARGIN")]
    )


async def test_who_has_no_unfinished_events_is_refused_at_once_beside_others_who_have(world: World) -> None:
    await world.deposit(6_400, 1, 3)
    await unsettled_trade(world, 1, "BUY")
    _, checked, ids = await ask(
        world,
        reduce_only(1, "SELL", "1"),
        reduce_only(3, "SELL", "1"),
        limit(3, "BUY", "2", 60_000),
        limit(3, "BUY", "0.1", 60_000),
    )
    assert checked == Outcome(
        passed=[ids[3]],
        refused=[Refusal(ids[1], "REDUCE_ONLY_REJECTED"), Refusal(ids[2], "INSUFFICIENT_MARGIN")],
        busy=[ids[0]],
    )


async def test_a_users_later_orders_of_the_batch_wait_behind_the_one_that_waits(world: World) -> None:
    """Or the second would have the money that is due to the first."""
    await world.deposit(6_100, 1)
    await world.place(limit(1, "BUY", "1", 59_000, time_in_force="IOC"))
    await world.match()
    first, second = limit(1, "BUY", "1", 60_000), limit(1, "BUY", "0.5", 3_000, ETH)
    checks, checked, ids = await ask(world, first, second)
    assert checked == Outcome(busy=ids)
    await world.settle()
    assert (await checks.next()) == Outcome(passed=ids[:1], refused=[Refusal(ids[1], "INSUFFICIENT_MARGIN")])


async def test_commands_that_the_engine_has_not_carried_out_are_not_waited_for(world: World) -> None:
    await world.deposit(6_100, 1)
    await world.place(limit(1, "BUY", "1", 59_000, time_in_force="IOC"))
    _, checked, ids = await ask(world, limit(1, "BUY", "1", 59_000))
    assert checked == Outcome(refused=[Refusal(ids[0], "INSUFFICIENT_MARGIN")])


async def test_what_came_after_the_order_is_not_waited_for(world: World) -> None:
    """Else who trades all the time would never hear that there is no money."""
    await world.deposit(10_000, 1)
    await unsettled_trade(world, 1, "BUY", "0.01")
    events = world.unsettled()
    checks, checked, ids = await ask(world, reduce_only(1, "BUY", "1"))
    assert checked == Outcome(busy=ids)
    await unsettled_trade(world, 1, "BUY", "0.01")
    assert await checks.next() == Outcome(busy=ids)
    assert events is not None
    await finish(world.settlement(events))
    assert await checks.next() == Outcome(refused=[Refusal(ids[0], "REDUCE_ONLY_REJECTED")])


async def test_a_maker_was_told_too(world: World) -> None:
    await world.deposit(6_400, 1)
    await world.place(limit(1, "BUY", "1", 60_000))
    await world.settle()
    await world.place(limit(2, "SELL", "1", 60_000))
    await world.match()
    checks, checked, ids = await ask(world, reduce_only(1, "SELL", "1"))
    assert checked == Outcome(busy=ids)
    await world.settle()
    assert (await checks.next()).passed == ids


async def test_what_the_ledger_refuses_is_judged_again_and_then_waits(world: World) -> None:
    await world.deposit(12_130, 1)
    await world.place(limit(1, "BUY", "20", 2_990, ETH, time_in_force="IOC"))
    assert any(isinstance(event, Expired) for event in await world.match(ETH))
    batch = await world.take_in(limit(1, "BUY", "1", 60_000))
    placing = world.placement(batch)
    await advance(placing, "checked")
    # Another saga of the user has the money before it can be frozen.
    await world.place(limit(1, "BUY", "10", 150, SOL))
    await advance(placing, "unfrozen")
    again, last = (StepRequest(batch.saga_id, number, batch.order_ids) for number in (2, 3))
    assert await world.risk.check_orders(again) == Outcome(busy=batch.order_ids)
    await world.settle(ETH)
    assert await world.risk.check_orders(last) == Outcome(passed=batch.order_ids)
    assert await world.ledger.freeze_funds(last) == Outcome(passed=batch.order_ids)


async def test_a_check_answers_as_soon_as_settlement_is_there(world: World) -> None:
    """No workflow has to ask again: its timers may be a second late."""
    await world.deposit(6_100, 1)
    await unsettled_trade(world, 1, "BUY")
    batch = await world.take_in(reduce_only(1, "SELL", "1"), reduce_only(3, "SELL", "1"))
    patient = RiskActivities(world.pool, EngineLog(), patience_seconds=20)
    checking = asyncio.create_task(patient.check_orders(StepRequest(batch.saga_id, 1, batch.order_ids)))
    await asyncio.sleep(0.1)
    assert not checking.done()
    # Nothing is locked meanwhile.
    await world.settle()
    checked = await asyncio.wait_for(checking, 5)
    assert checked == Outcome(passed=batch.order_ids[:1], refused=[Refusal(batch.order_ids[1], "REDUCE_ONLY_REJECTED")])


async def test_a_check_run_twice_answers_what_it_answered_first(world: World) -> None:
    await world.deposit(6_100, 1)
    await unsettled_trade(world, 1, "BUY")
    batch = await world.take_in(reduce_only(1, "SELL", "1"))
    step = StepRequest(batch.saga_id, 1, batch.order_ids)
    assert await world.risk.check_orders(step) == Outcome(busy=batch.order_ids)
    await world.settle()
    assert await world.risk.check_orders(step) == Outcome(busy=batch.order_ids)


async def test_margin_of_a_position_that_was_told_of_can_be_changed(world: World) -> None:
    await world.deposit(10_000, 1)
    await unsettled_trade(world, 1, "BUY")
    more, less = world.margin_change(1, "MARGIN", "100"), world.margin_change(1, "MARGIN", "-7000")
    for change in (more, less):
        assert (await world.risk.plan_margin_change(change)).is_busy
    await world.settle()
    assert await world.risk.plan_margin_change(more) == await world.risk.plan_margin_change(more)
    assert (await world.risk.plan_margin_change(more)).refusal is None
    assert (await world.ledger.move_margin(more)).refused == []
    await world.positions.adopt_margin(more)
    assert (await world.risk.plan_margin_change(less)).refusal == "INSUFFICIENT_MARGIN"


async def test_margin_is_not_taken_from_the_position_as_it_was_before_what_was_told(world: World) -> None:
    await world.deposit(20_000, 1)
    await world.trade(1, 2, "1", 60_000)
    assert await world.change(world.margin_change(1, "MARGIN", "1000")) is None
    await unsettled_trade(world, 1, "BUY", "0.1")
    less = world.margin_change(1, "MARGIN", "-500")
    assert (await world.risk.plan_margin_change(less)).is_busy
    await world.settle()
    assert await world.risk.plan_margin_change(less) == MarginVerdict()
    await world.settle()
    assert await world.change(less) is None


async def test_a_leverage_that_money_told_of_can_back_waits_for_it(world: World) -> None:
    await world.deposit(12_200, 1)
    await world.place(limit(1, "BUY", "1", 59_000))
    await world.settle()
    (other,) = await world.place(limit(1, "BUY", "20", 2_990, ETH))
    await world.settle(ETH)
    await world.cancel(other)
    await world.match(ETH)
    change = world.margin_change(1, "LEVERAGE", 5)
    assert (await world.risk.plan_margin_change(change)).is_busy
    await world.settle(ETH)
    assert await world.change(change) is None
    assert await world.lever(1, 1) == "INSUFFICIENT_MARGIN"


async def test_a_margin_change_does_not_wait_for_what_came_after_it(world: World) -> None:
    await world.deposit(10_000, 1)
    await unsettled_trade(world, 1, "BUY", "0.01")
    events = world.unsettled()
    change = world.margin_change(1, "LEVERAGE", 125)
    await world.pool.execute("UPDATE risk.risk_limits SET max_leverage = 20")
    assert (await world.risk.plan_margin_change(change)).is_busy
    await unsettled_trade(world, 1, "BUY", "0.01")
    assert events is not None
    await finish(world.settlement(events))
    assert (await world.risk.plan_margin_change(change)).refusal == "RISK_LIMIT_EXCEEDED"


async def test_the_margin_mode_can_be_changed_once_the_end_of_all_was_told(world: World) -> None:
    await world.deposit(10_000, 1)
    (order,) = await world.place(limit(1, "BUY", "0.1", 59_000))
    await world.settle()

    async def to_cross(conn: Connection) -> None:
        await set_margin_mode(conn, 1, BTC, "CROSS")

    async def change() -> None:
        await patiently(world.pool, 1, to_cross, refused_with("MARGIN_MODE_NOT_CHANGEABLE"))

    with pytest.raises(Problem, match="MARGIN_MODE_NOT_CHANGEABLE"):
        await asyncio.wait_for(change(), 1)
    await world.cancel(order)
    await world.match()
    changing = asyncio.create_task(change())
    await asyncio.sleep(0.1)
    assert not changing.done()
    await world.settle()
    await asyncio.wait_for(changing, 5)


async def test_patience_ends(world: World) -> None:
    await world.deposit(10_000, 1)
    await unsettled_trade(world, 1, "BUY", "0.1")
    attempts = 0

    async def refuse(_: Connection) -> None:
        nonlocal attempts
        attempts += 1
        raise Problem("INSUFFICIENT_FUNDS", "Not yet")

    with pytest.raises(Problem, match="INSUFFICIENT_FUNDS"):
        await patiently(world.pool, 1, refuse, refused_with("INSUFFICIENT_FUNDS"), seconds=0.2)
    assert attempts == 2
    attempts = 0
    # Another problem, or another user: at once.
    for user_id, code in ((1, "NOT_FOUND"), (3, "INSUFFICIENT_FUNDS")):
        with pytest.raises(Problem, match="INSUFFICIENT_FUNDS"):
            await patiently(world.pool, user_id, refuse, refused_with(code))
    assert attempts == 2


async def test_the_pre_check_waits_as_placement_does(world: World) -> None:
    await world.deposit(6_030, 1)
    await unsettled_trade(world, 1, "BUY")
    close = market(1, "SELL", "1", 59_700)

    async def ask_now(conn: Connection) -> tuple[Decimal, str | None]:
        return await pre_check(conn, close)

    def is_refused(outcome: tuple[Decimal, str | None] | Problem) -> bool:
        return not isinstance(outcome, Problem) and outcome[1] is not None

    asked = asyncio.create_task(patiently(world.pool, 1, ask_now, is_refused))
    await asyncio.sleep(0.1)
    assert not asked.done()
    await world.settle()
    assert await asyncio.wait_for(asked, 5) == (D(0), None)


EVERY_KIND: list[AnyEvent] = [
    Placed(1, 1, 11, "BUY", 1, 1),
    Trade(1, 1, 1, 1, "BUY", 1, 12, 0, 0, 2, 13, 0, 0, 1, taker_liquidation=False),
    Filled(1, 1, 14),
    Cancelled(1, 1, 15, "BUY", 1, 1, "USER_REQUEST"),
    Expired(1, 1, 16, "BUY", 1, 1, "USER_REQUEST"),
    Rejected(1, 1, 17, "BUY", 1, 1, "USER_REQUEST"),
    StopPlaced(at=1, order_id=1, user_id=18, side="BUY", price=1, quantity=1, stop_price=1, working_type="MARK"),
    Triggered(at=1, order_id=1, user_id=19, side="BUY", price=1, quantity=1),
    Amended(
        at=1, order_id=1, user_id=20, side="BUY", price=1, quantity=1, old_price=1, old_quantity=1, reason="REDUCE_ONLY"
    ),
    AmendRejected(at=1, order_id=1, user_id=21, reason="ORDER_NOT_FOUND"),
    Deleveraged(at=1, trade_id=1, price=1, quantity=1, side="BUY", user_id=22, counterparty_user_id=23),
    StateChanged(at=1, state="HALTED"),
]


async def test_events_of_every_kind_are_found_by_all_their_users(pool: Pool) -> None:
    assert {type(event) for event in EVERY_KIND} == set(AnyEvent.__args__)
    for seq, event in enumerate(EVERY_KIND, 1):
        await pool.execute(
            "INSERT INTO matching.events (instrument_id, seq, command_seq, payload) VALUES ($1, $2, $2, $3)",
            BTC.instrument_id,
            seq,
            encode(event).decode(),
        )
    await pool.execute(
        "UPDATE matching.cursors SET event_seq = $2 WHERE instrument_id = $1", BTC.instrument_id, len(EVERY_KIND)
    )
    everybody = range(30)
    async with pool.acquire() as conn:
        look = await read_unfinished(conn, everybody)
        found = {user_id for user_id in everybody if await look.has(conn, user_id)}
        assert found == users_of(list(enumerate(EVERY_KIND, 1))) == set(range(11, 24))
        # What is applied by both is finished; by one alone it is not.
        for schema, first in (("risk", 11), ("ledger", 12)):
            await pool.execute(
                f"UPDATE {schema}.cursors SET applied_seq = 1 WHERE instrument_id = '{BTC.instrument_id}'"
            )
            look = await read_unfinished(conn, everybody)
            assert {user_id for user_id in everybody if await look.has(conn, user_id)} == set(range(first, 24))


async def test_with_too_much_behind_settlement_whoever_is_to_be_refused_waits(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.deposit(10_000, 1)
    await unsettled_trade(world, 1, "BUY", "0.1")
    _, checked, ids = await ask(world, reduce_only(3, "SELL", "1"))
    assert checked == Outcome(refused=[Refusal(ids[0], "REDUCE_ONLY_REJECTED")])
    monkeypatch.setattr(unfinished, "EVENTS_SEARCHED_MAX", 1)
    _, checked, ids = await ask(world, reduce_only(3, "SELL", "1"))
    assert checked == Outcome(busy=ids)

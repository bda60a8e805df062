"""Sagas that wait for others for very long: they neither fail nor lose what they have done, also in another run."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import timedelta
from decimal import Decimal
from typing import Any

import pytest
from redis.asyncio import Redis
from temporalio.client import Client, WorkflowHandle

from activities.orders.sagas import Saga
from clients import OPERATIONS_QUEUE
from domain.instruments import SHIPPED
from domain.margin_changes import MARGIN_CHANGE, PLAN_MARGIN_CHANGE, MarginChange, MarginVerdict
from domain.sagas import CHECK_ORDERS, FREEZE_FUNDS, REQUEST_CANCELS, Carried, Outcome
from storage.db import Pool
from tests.marks import say_mark
from tests.sagas import BTC, Activity, Change, Desk, Gate, order, workers
from tests.waiting import until
from workflows import steps

D = Decimal
ALICE, BOB = 1, 2
# More than a double can be doubled.
WAITS = 1_150
CANCELLED_BY_OPERATOR = ("FAILED", "CANCELLED_BY_OPERATOR")


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sagas that ask again after a millisecond."""
    monkeypatch.setattr(steps, "BUSY_PAUSE_MAX", timedelta(milliseconds=1))


async def nothing() -> None:
    """Happens before the work."""


def busy(times: int, answer: Callable[[Any], object], before: Callable[[], Awaitable[None]] = nothing) -> Change:
    """The step answers that it is busy so many times, then (after `before`) does its work."""
    left = times

    def change(real: Activity) -> Activity:
        async def step(arg: Any) -> Any:
            nonlocal left
            left -= 1
            if left >= 0:
                return answer(arg)
            await before()
            return await real(arg)

        return step

    return change


def all_busy(asked: Any) -> Outcome:
    return Outcome(busy=asked.order_ids)


async def until_continued(handle: WorkflowHandle[Any, Any]) -> None:
    """Returns when the workflow is in its second run, or a later one."""
    first = (await handle.describe()).run_id

    async def in_another_run() -> bool:
        return (await handle.describe()).run_id != first

    await until(in_another_run, 60, "another run")


async def change_margin(temporal: Client, waits: int = 0) -> WorkflowHandle[Any, Any]:
    return await temporal.start_workflow(
        MARGIN_CHANGE,
        MarginChange("change", ALICE, BTC, "LEVERAGE", "5", waits),
        id="change",
        task_queue=OPERATIONS_QUEUE,
    )


async def leverage(pool: Pool) -> int | None:
    return await pool.fetchval("SELECT leverage FROM risk.exposures WHERE user_id = $1", ALICE)  # type: ignore[no-any-return]  # untyped driver


@pytest.mark.usefixtures("impatient")
async def test_a_placement_that_is_busy_for_more_than_a_thousand_waits_is_placed(
    pool: Pool, temporal: Client, redis: Redis
) -> None:
    desk = Desk(pool, temporal)
    await desk.deposit(ALICE, "1000")
    saga = await desk.take_in(order(ALICE, "BUY", "0.01", "60000"))

    async def live_mark() -> None:
        await say_mark(pool, SHIPPED[0], D(60_000))

    async with workers(temporal, pool, redis, {CHECK_ORDERS: busy(WAITS, all_busy, live_mark)}):
        assert await (await desk.start(saga)).result() == {"accepted": 1, "refused": []}
    assert await desk.balance(ALICE) == (D("939.7"), D("60.3"))
    await desk.assert_clean()


@pytest.mark.usefixtures("impatient")
async def test_a_cancellation_that_is_busy_for_more_than_a_thousand_waits_is_asked_for(
    pool: Pool, temporal: Client, redis: Redis
) -> None:
    desk = Desk(pool, temporal)
    await desk.deposit(ALICE, "1000")
    async with workers(temporal, pool, redis, {REQUEST_CANCELS: busy(5, all_busy)}):
        saga = await desk.take_in_cancellation(*await desk.place(order(ALICE, "BUY", "0.01", "60000")))
        begun = replace(saga, batch=replace(saga.batch, carried=Carried(waits=WAITS)))
        assert await (await desk.start(begun)).result() == 1
    assert (await desk.commands())[-1] == "CANCEL"


@pytest.mark.usefixtures("impatient")
async def test_a_margin_change_that_is_busy_for_more_than_a_thousand_waits_is_done(
    pool: Pool, temporal: Client, redis: Redis
) -> None:
    await Desk(pool, temporal).deposit(ALICE, "1000")
    changed = {PLAN_MARGIN_CHANGE: busy(5, lambda _: MarginVerdict(is_busy=True))}
    async with workers(temporal, pool, redis, changed):
        assert await (await change_margin(temporal, WAITS)).result() is None
    assert await leverage(pool) == 5


async def half_held(desk: Desk) -> tuple[Saga, Saga, Gate]:
    """A saga of ALICE that the gate holds before its freeze; one of ALICE, BOB and a beggar that has to wait for it."""
    await desk.deposit(ALICE, "1000")
    await desk.deposit(BOB, "100")
    one = await desk.take_in(order(ALICE, "BUY", "0.01", "60000"))
    two = await desk.take_in(
        order(ALICE, "BUY", "0.02", "50000"), order(BOB, "SELL", "0.01", "60000"), order(BOB, "SELL", "1", "60000")
    )
    return one, two, Gate(open_for=lambda request: request.saga_id == two.batch.saga_id)


@pytest.mark.usefixtures("impatient")
async def test_a_placement_that_continues_as_new_keeps_what_it_has_passed_and_refused(
    pool: Pool, short_history: Client, redis: Redis
) -> None:
    desk = Desk(pool, short_history)
    one, two, gate = await half_held(desk)
    async with workers(short_history, pool, redis, {FREEZE_FUNDS: gate}):
        holding = await desk.start(one)
        await gate.knocked.wait()
        waiting = await desk.start(two)
        await until_continued(waiting)
        await until_continued(waiting)
        assert await desk.balance(BOB) == (D("39.7"), D("60.3"))
        gate.is_open = True
        await asyncio.gather(holding.result(), waiting.result())
    assert await desk.states(two.batch.order_ids) == [
        ("ACCEPTED", None),
        ("ACCEPTED", None),
        ("FAILED", "INSUFFICIENT_MARGIN"),
    ]
    assert await desk.balance(ALICE) == (D("839.2"), D("160.8"))
    assert await desk.balance(BOB) == (D("39.7"), D("60.3"))
    await desk.assert_clean()


@pytest.mark.usefixtures("impatient")
async def test_cancelling_a_placement_that_has_continued_as_new_gives_back_what_its_first_run_took(
    pool: Pool, short_history: Client, redis: Redis
) -> None:
    desk = Desk(pool, short_history)
    one, two, gate = await half_held(desk)
    async with workers(short_history, pool, redis, {FREEZE_FUNDS: gate}):
        holding = await desk.start(one)
        await gate.knocked.wait()
        waiting = short_history.get_workflow_handle((await desk.start(two)).id)
        await until_continued(waiting)
        await until_continued(waiting)
        assert await desk.balance(BOB) == (D("39.7"), D("60.3"))
        await waiting.cancel()
        await waiting.result()
        gate.is_open = True
        await holding.result()
    assert await desk.states(two.batch.order_ids) == [
        CANCELLED_BY_OPERATOR,
        CANCELLED_BY_OPERATOR,
        ("FAILED", "INSUFFICIENT_MARGIN"),
    ]
    assert await desk.states(one.batch.order_ids) == [("ACCEPTED", None)]
    assert await desk.balance(ALICE) == (D("939.7"), D("60.3"))
    assert await desk.balance(BOB) == (D("100"), D("0"))
    await desk.assert_clean()


@pytest.mark.usefixtures("impatient")
async def test_a_cancellation_and_a_margin_change_that_continue_as_new_are_finished(
    pool: Pool, short_history: Client, redis: Redis
) -> None:
    desk = Desk(pool, short_history)
    await desk.deposit(ALICE, "1000")
    changed: dict[str, Change] = {
        REQUEST_CANCELS: busy(40, all_busy),
        PLAN_MARGIN_CHANGE: busy(40, lambda _: MarginVerdict(is_busy=True)),
    }
    async with workers(short_history, pool, redis, changed):
        order_ids = await desk.place(order(ALICE, "BUY", "0.01", "60000"))
        cancelling, changing = await desk.cancel(*order_ids), await change_margin(short_history)
        assert await cancelling.result() == 1
        assert await changing.result() is None
        for name in (cancelling.id, changing.id):
            last = await short_history.get_workflow_handle(name).describe()
            assert last.raw_description.workflow_execution_info.first_run_id != last.run_id
    assert (await desk.commands()).count("CANCEL") == 1
    assert await leverage(pool) == 5

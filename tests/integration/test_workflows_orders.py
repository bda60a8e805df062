"""The placement and cancellation workflows: every way through them, with real activities on real servers."""

import asyncio
from decimal import Decimal

import pytest
from redis.asyncio import Redis
from temporalio.client import Client, WorkflowExecutionStatus, WorkflowFailureError
from temporalio.exceptions import CancelledError

from activities.orders.sagas import Saga
from domain.sagas import ACCEPT_ORDERS, CHECK_ORDERS, FREEZE_FUNDS, REQUEST_CANCELS, StepRequest, Verdict
from monitors.sweeper import sweep
from storage.db import Pool
from tests.replay import save_history
from tests.sagas import (
    ETH,
    Change,
    Desk,
    Gate,
    StepwiseEngine,
    details,
    fails,
    first,
    order,
    regular_attempts,
    start_settlement,
    until_said,
    until_settled,
    workers,
)
from tests.waiting import until

D = Decimal
ALICE, BOB = 1, 2
CANCELLED_BY_OPERATOR = ("FAILED", "CANCELLED_BY_OPERATOR")


@pytest.fixture
def desk(pool: Pool, temporal: Client) -> Desk:
    return Desk(pool, temporal)


async def rounds(pool: Pool, saga: Saga) -> int:
    """How often the orders of a saga were checked."""
    count: int = await pool.fetchval(
        "SELECT count(*) FROM risk.steps WHERE step_id LIKE $1", f"check:{saga.batch.saga_id}:%"
    )
    return count


async def age_sagas(pool: Pool) -> None:
    await pool.execute("UPDATE orders.sagas SET created_at = created_at - interval '1 minute'")


async def test_orders_that_pass_go_to_the_engine_in_order(desk: Desk, pool: Pool, redis: Redis) -> None:
    await desk.deposit(ALICE, "1000")
    saga = await desk.take_in(order(ALICE, "BUY", "0.01", "60000"), order(ALICE, "BUY", "0.02", "50000"))
    async with workers(desk.temporal, pool, redis):
        handle = await desk.start(saga)
        assert await handle.result() == {"accepted": 2, "refused": []}
    assert await desk.states(saga.batch.order_ids) == [("ACCEPTED", None)] * 2
    # 1600 / 10 + 1600 * 0.0005
    assert await desk.balance(ALICE) == (D("839.2"), D("160.8"))
    rows = await pool.fetch(
        "SELECT payload::json ->> 'order_id' FROM matching.commands WHERE payload::json ->> 'kind' = 'NEW' ORDER BY seq"
    )
    assert [int(row[0]) for row in rows] == saga.batch.order_ids
    assert regular_attempts(await handle.fetch_history()) == []
    await desk.assert_clean()
    await save_history(handle, "placement")


async def test_an_order_refused_by_risk_leaves_its_neighbours_alone(desk: Desk, pool: Pool, redis: Redis) -> None:
    await desk.deposit(ALICE, "100")
    await desk.deposit(BOB, "100")
    saga = await desk.take_in(
        order(ALICE, "BUY", "0.01", "60000"),
        order(ALICE, "BUY", "0.02", "60000"),
        order(BOB, "BUY", "1000.001", "60000"),
        order(BOB, "SELL", "0.01", "60000"),
    )
    async with workers(desk.temporal, pool, redis):
        handle = await desk.start(saga)
        await handle.result()
    assert await desk.states(saga.batch.order_ids) == [
        ("ACCEPTED", None),
        ("FAILED", "INSUFFICIENT_MARGIN"),
        ("FAILED", "RISK_LIMIT_EXCEEDED"),
        ("ACCEPTED", None),
    ]
    assert await desk.balance(ALICE) == (D("39.7"), D("60.3"))
    assert await desk.balance(BOB) == (D("39.7"), D("60.3"))
    await desk.assert_clean()
    await save_history(handle, "placement_refused")


@pytest.mark.parametrize("comes_back", [True, False])
async def test_money_spent_between_check_and_freeze_gives_the_orders_a_second_round(
    desk: Desk, pool: Pool, redis: Redis, *, comes_back: bool
) -> None:
    await desk.deposit(ALICE, "100")
    await desk.deposit(BOB, "100")
    saga = await desk.take_in(order(ALICE, "BUY", "0.01", "60000"), order(BOB, "BUY", "0.01", "60000"))

    async def spend() -> None:
        await desk.deposit(BOB, "-50")

    async def earn() -> None:
        if comes_back:
            await desk.deposit(BOB, "50")

    async with workers(desk.temporal, pool, redis, {FREEZE_FUNDS: first(spend), "ledger.unfreeze_funds": first(earn)}):
        handle = await desk.start(saga)
        await handle.result()
    expected = ("ACCEPTED", None) if comes_back else ("FAILED", "INSUFFICIENT_MARGIN")
    assert await desk.states(saga.batch.order_ids) == [("ACCEPTED", None), expected]
    assert await desk.balance(ALICE) == (D("39.7"), D("60.3"))
    assert await desk.balance(BOB) == ((D("39.7"), D("60.3")) if comes_back else (D("50"), D("0")))
    await desk.assert_clean()
    if comes_back:
        await save_history(handle, "placement_second_round")


async def test_an_order_waits_while_another_saga_of_its_user_is_between_check_and_freeze(
    desk: Desk, pool: Pool, redis: Redis
) -> None:
    await desk.deposit(ALICE, "1000")
    await desk.deposit(BOB, "1000")
    one = await desk.take_in(order(ALICE, "BUY", "0.01", "60000"))
    two = await desk.take_in(order(ALICE, "BUY", "0.02", "50000"), order(BOB, "SELL", "0.01", "70000"))
    gate = Gate(open_for=lambda request: request.saga_id == two.batch.saga_id)
    async with workers(desk.temporal, pool, redis, {FREEZE_FUNDS: gate}):
        handles = [await desk.start(one)]
        await gate.knocked.wait()
        handles.append(await desk.start(two))

        async def has_waited() -> bool:
            return await rounds(pool, two) > 2

        await until(has_waited, 10, "the second saga to wait")
        await until_said(handles[1], "^1 orders wait for another saga of their user$")
        assert await desk.states(two.batch.order_ids) == [("PENDING", None)] * 2
        gate.is_open = True
        for handle in handles:
            await handle.result()
    assert await desk.states(one.batch.order_ids + two.batch.order_ids) == [("ACCEPTED", None)] * 3
    assert await desk.balance(ALICE) == (D("839.2"), D("160.8"))
    await desk.assert_clean()
    await save_history(handles[1], "placement_busy")


async def test_a_step_that_fails_locally_is_retried_where_operators_see_it(
    desk: Desk, pool: Pool, redis: Redis
) -> None:
    await desk.deposit(ALICE, "1000")
    saga = await desk.take_in(order(ALICE, "BUY", "0.01", "60000"))
    async with workers(desk.temporal, pool, redis, {FREEZE_FUNDS: fails(5), ACCEPT_ORDERS: fails(2)}):
        handle = await desk.start(saga)
        await until_said(handle, f"^Reserves the money of 1 orders: {FREEZE_FUNDS} is tried again after .*to come")
        await handle.result()
        assert await details(handle) == "1 orders to the engine, 0 refused"
    # Four attempts as a local activity, one that failed as a regular one, and the one that did it.
    assert regular_attempts(await handle.fetch_history()) == [(FREEZE_FUNDS, 2)]
    assert await desk.states(saga.batch.order_ids) == [("ACCEPTED", None)]
    await desk.assert_clean()
    await save_history(handle, "placement_retried")


async def test_a_step_that_ran_but_was_not_heard_of_changes_nothing_when_repeated(
    desk: Desk, pool: Pool, redis: Redis
) -> None:
    await desk.deposit(ALICE, "1000")

    def unheard(real):  # type: ignore[no-untyped-def]  # any activity
        heard = False

        async def step(arg):  # type: ignore[no-untyped-def]  # any activity
            nonlocal heard
            result = await real(arg)
            if not heard:
                heard = True
                raise ConnectionError("The answer was lost")
            return result

        return step

    saga = await desk.take_in(order(ALICE, "BUY", "0.01", "60000"))
    steps = {CHECK_ORDERS: unheard, FREEZE_FUNDS: unheard, ACCEPT_ORDERS: unheard, REQUEST_CANCELS: unheard}
    async with workers(desk.temporal, pool, redis, steps):
        await (await desk.start(saga)).result()
        assert await desk.balance(ALICE) == (D("939.7"), D("60.3"))
        assert await desk.commands() == ["NEW"]
        await (await desk.cancel(*saga.batch.order_ids)).result()
    assert await desk.commands() == ["NEW", "CANCEL"]


async def test_cancelling_the_workflow_fails_its_orders_and_gives_their_money_back(
    desk: Desk, pool: Pool, redis: Redis
) -> None:
    await desk.deposit(ALICE, "100")
    await desk.deposit(BOB, "100")
    saga = await desk.take_in(
        order(ALICE, "BUY", "0.01", "60000"),
        order(ALICE, "BUY", "1", "60000"),
        order(BOB, "SELL", "0.01", "60000", ETH),
    )
    gate = Gate()
    async with workers(desk.temporal, pool, redis, {FREEZE_FUNDS: gate}):
        handle = await desk.start(saga)
        await gate.visible.wait()
        await handle.cancel()
        gate.is_open = True
        await handle.result()
    assert await desk.states(saga.batch.order_ids) == [
        CANCELLED_BY_OPERATOR,
        ("FAILED", "INSUFFICIENT_MARGIN"),
        CANCELLED_BY_OPERATOR,
    ]
    assert await desk.balance(ALICE) == (D("100"), D("0"))
    assert await desk.balance(BOB) == (D("100"), D("0"))
    assert await desk.commands() == []
    await desk.assert_clean()
    await save_history(handle, "placement_cancelled")


@pytest.mark.parametrize("step", [CHECK_ORDERS, FREEZE_FUNDS])
async def test_cancelling_in_the_second_round_gives_back_the_money_of_both_rounds(
    desk: Desk, pool: Pool, redis: Redis, step: str
) -> None:
    await desk.deposit(ALICE, "100")
    await desk.deposit(BOB, "100")
    saga = await desk.take_in(order(ALICE, "BUY", "0.01", "60000"), order(BOB, "BUY", "0.01", "60000"))

    async def spend() -> None:
        await desk.deposit(BOB, "-50")

    async def earn() -> None:
        await desk.deposit(BOB, "50")

    def is_first_round(request: StepRequest) -> bool:
        return request.round == 1

    gate = Gate(open_for=is_first_round)
    spending = first(spend)
    changed: dict[str, Change] = {"ledger.unfreeze_funds": first(earn), FREEZE_FUNDS: spending, step: gate}
    if step == FREEZE_FUNDS:
        changed[step] = lambda real: gate(spending(real))
    async with workers(desk.temporal, pool, redis, changed):
        handle = await desk.start(saga)
        await gate.visible.wait()
        assert await desk.balance(ALICE) == (D("39.7"), D("60.3"))
        await handle.cancel()
        gate.is_open = True
        await handle.result()
    assert await desk.states(saga.batch.order_ids) == [CANCELLED_BY_OPERATOR] * 2
    assert await desk.balance(ALICE) == (D("100"), D("0"))
    assert await desk.balance(BOB) == (D("100"), D("0"))
    await desk.assert_clean()
    if step == CHECK_ORDERS:
        await save_history(handle, "placement_cancelled_second_round")


async def test_an_amendment_is_placed_like_an_order_and_settled_by_the_engine(
    desk: Desk, pool: Pool, redis: Redis
) -> None:
    await desk.deposit(ALICE, "1000")
    engine = StepwiseEngine(pool)
    async with workers(desk.temporal, pool, redis):
        (order_id,) = await desk.place(order(ALICE, "BUY", "0.01", "60000"))
        settlement = await start_settlement(desk.temporal)
        saga = await desk.take_in_amendment(ALICE, order_id, "0.02")
        handle = await desk.start(saga)
        assert await handle.result() == {"accepted": 1, "refused": []}
        assert await desk.amendment(saga) == ("ACCEPTED", None)
        seq = await engine.match()
        await settlement.signal("advance", seq)
        await until_settled(settlement, seq)
    assert await desk.commands() == ["NEW", "AMEND"]
    assert await desk.amendment(saga) == ("AMENDED", None)
    # 1200 / 10 + 1200 * 0.0005
    assert await desk.balance(ALICE) == (D("879.4"), D("120.6"))
    await desk.assert_clean()
    await save_history(handle, "placement_amendment")


@pytest.mark.parametrize("step", [CHECK_ORDERS, FREEZE_FUNDS])
async def test_cancelling_the_saga_of_an_amendment_leaves_the_order_and_its_money_as_they_were(
    desk: Desk, pool: Pool, redis: Redis, step: str
) -> None:
    await desk.deposit(ALICE, "1000")
    gate = Gate()
    async with workers(desk.temporal, pool, redis):
        (order_id,) = await desk.place(order(ALICE, "BUY", "0.01", "60000"))
    saga = await desk.take_in_amendment(ALICE, order_id, "0.02")
    async with workers(desk.temporal, pool, redis, {step: gate}):
        handle = await desk.start(saga)
        await gate.visible.wait()
        await handle.cancel()
        gate.is_open = True
        await handle.result()
    assert await desk.amendment(saga) == CANCELLED_BY_OPERATOR
    assert await desk.states([order_id]) == [("ACCEPTED", None)]
    assert await desk.balance(ALICE) == (D("939.7"), D("60.3"))
    assert await desk.commands() == ["NEW"]
    await desk.assert_clean()
    if step == FREEZE_FUNDS:
        await save_history(handle, "placement_amendment_cancelled")


async def test_an_amendment_whose_start_was_lost_is_swept_up(desk: Desk, pool: Pool, redis: Redis) -> None:
    await desk.deposit(ALICE, "1000")
    async with workers(desk.temporal, pool, redis):
        (order_id,) = await desk.place(order(ALICE, "BUY", "0.01", "60000"))
        saga = await desk.take_in_amendment(ALICE, order_id, "0.005")
        await age_sagas(pool)
        assert await sweep(pool, desk.temporal) == 1
        await desk.temporal.get_workflow_handle(saga.batch.saga_id).result()
    assert await desk.amendment(saga) == ("ACCEPTED", None)
    await desk.assert_clean()


async def test_cancelling_while_the_orders_wait_for_another_saga_fails_them(
    desk: Desk, pool: Pool, redis: Redis
) -> None:
    await desk.deposit(ALICE, "1000")
    one = await desk.take_in(order(ALICE, "BUY", "0.01", "60000"))
    two = await desk.take_in(order(ALICE, "BUY", "0.02", "50000"))
    gate = Gate(open_for=lambda request: request.saga_id == two.batch.saga_id)
    async with workers(desk.temporal, pool, redis, {FREEZE_FUNDS: gate}):
        holding = await desk.start(one)
        await gate.knocked.wait()
        waiting = await desk.start(two)

        async def has_waited() -> bool:
            return await rounds(pool, two) > 1

        await until(has_waited, 10, "the second saga to wait")
        await waiting.cancel()
        await waiting.result()
        gate.is_open = True
        await holding.result()
    assert await desk.states(two.batch.order_ids) == [CANCELLED_BY_OPERATOR]
    assert await desk.states(one.batch.order_ids) == [("ACCEPTED", None)]
    assert await desk.balance(ALICE) == (D("939.7"), D("60.3"))
    await desk.assert_clean()


async def test_orders_whose_money_is_held_are_placed_although_their_workflow_was_cancelled(
    desk: Desk, pool: Pool, redis: Redis
) -> None:
    await desk.deposit(ALICE, "1000")
    saga = await desk.take_in(order(ALICE, "BUY", "0.01", "60000"))
    gate = Gate()
    async with workers(desk.temporal, pool, redis, {ACCEPT_ORDERS: gate}):
        handle = await desk.start(saga)
        await gate.knocked.wait()
        await handle.cancel()
        with pytest.raises(WorkflowFailureError) as failure:
            await handle.result()
        assert isinstance(failure.value.cause, CancelledError)
        gate.is_open = True
        await age_sagas(pool)
        assert await sweep(pool, desk.temporal) == 1
        await desk.temporal.get_workflow_handle(saga.batch.saga_id).result()
    assert await desk.states(saga.batch.order_ids) == [("ACCEPTED", None)]
    await desk.assert_clean()


@pytest.mark.parametrize("step", [CHECK_ORDERS, FREEZE_FUNDS, ACCEPT_ORDERS])
async def test_a_terminated_placement_is_started_again_by_the_sweeper_under_the_same_id(
    desk: Desk, pool: Pool, redis: Redis, step: str
) -> None:
    await desk.deposit(ALICE, "1000")
    saga = await desk.take_in(order(ALICE, "BUY", "0.01", "60000"), order(ALICE, "BUY", "1", "60000"))
    gate = Gate()
    async with workers(desk.temporal, pool, redis, {step: gate}):
        handle = await desk.start(saga)
        await gate.knocked.wait()
        assert await sweep(pool, desk.temporal) == 0
        await age_sagas(pool)
        # It runs, however slowly: nothing to start.
        assert await sweep(pool, desk.temporal) == 0
        await handle.terminate("by an operator")
        gate.is_open = True
        assert await sweep(pool, desk.temporal) == 1
        again = desk.temporal.get_workflow_handle(saga.batch.saga_id, result_type=Verdict)
        assert (await again.result()).accepted == 1
        assert await sweep(pool, desk.temporal) == 0
    assert await desk.states(saga.batch.order_ids) == [("ACCEPTED", None), ("FAILED", "INSUFFICIENT_MARGIN")]
    assert await desk.balance(ALICE) == (D("939.7"), D("60.3"))
    assert await desk.commands() == ["NEW"]
    await desk.assert_clean()


async def test_a_cancellation_waits_for_orders_that_are_not_with_the_engine_yet(
    desk: Desk, pool: Pool, redis: Redis
) -> None:
    await desk.deposit(ALICE, "100")
    saga = await desk.take_in(
        order(ALICE, "BUY", "0.01", "60000"), order(ALICE, "BUY", "1", "60000"), order(ALICE, "BUY", "0.001", "50000")
    )
    engine = StepwiseEngine(pool)
    async with workers(desk.temporal, pool, redis):
        cancellation = await desk.cancel(*saga.batch.order_ids)
        await asyncio.sleep(0.3)
        assert (await cancellation.describe()).status == WorkflowExecutionStatus.RUNNING
        assert await details(cancellation) == "3 orders are not with the engine yet"
        assert await desk.commands() == []
        await (await desk.start(saga)).result()
        assert await cancellation.result() == 2
        assert await details(cancellation) == "2 orders asked to end"
        # Matched first: no signal tells a settlement that runs already.
        last = await engine.match()
        await until_settled(await start_settlement(desk.temporal), last)
    assert await desk.commands() == ["NEW", "NEW", "CANCEL", "CANCEL"]
    assert await desk.states(saga.batch.order_ids) == [
        ("CANCELLED", "USER_REQUEST"),
        ("FAILED", "INSUFFICIENT_MARGIN"),
        ("CANCELLED", "USER_REQUEST"),
    ]
    assert await desk.balance(ALICE) == (D("100"), D("0"))
    await desk.assert_clean()
    await save_history(cancellation, "cancellation")


async def test_a_cancelled_cancellation_is_taken_up_by_the_sweeper(desk: Desk, pool: Pool, redis: Redis) -> None:
    await desk.deposit(ALICE, "100")
    gate = Gate()
    async with workers(desk.temporal, pool, redis, {REQUEST_CANCELS: gate}):
        ids = await desk.place(order(ALICE, "BUY", "0.001", "50000"))
        cancellation = await desk.cancel(*ids)
        await gate.knocked.wait()
        await cancellation.cancel()
        with pytest.raises(WorkflowFailureError):
            await cancellation.result()
        gate.is_open = True
        await age_sagas(pool)
        assert await sweep(pool, desk.temporal) == 1
        assert await desk.temporal.get_workflow_handle(cancellation.id).result() == 1
    assert await desk.commands() == ["NEW", "CANCEL"]

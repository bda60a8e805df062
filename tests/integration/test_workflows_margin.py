"""The margin change workflow: every way through it, with real activities on real servers."""

import asyncio
import uuid
from decimal import Decimal
from typing import Any, Literal

import pytest
from redis.asyncio import Redis
from temporalio.client import Client, WorkflowFailureError, WorkflowHandle
from temporalio.exceptions import CancelledError

from domain.contracts.margin import MARGIN_CHANGE, MOVE_MARGIN, PLAN_MARGIN_CHANGE, MarginChange
from domain.contracts.orders import FREEZE_FUNDS
from domain.contracts.queues import OPERATIONS_QUEUE
from storage.db import Pool
from tests.replay import save_history
from tests.sagas import (
    BTC,
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
    until_settled,
    workers,
)
from tests.waiting import until

D = Decimal
ALICE, BOB = 1, 2


@pytest.fixture
async def desk(pool: Pool, temporal: Client) -> Desk:
    desk = Desk(pool, temporal)
    await desk.deposit(ALICE, "1000")
    await desk.deposit(BOB, "1000")
    await pool.execute(
        "INSERT INTO market.mark_prices (instrument_id, calculated_at, index_price, mark_price, fair_price,"
        " premium_index, funding_basis, source) VALUES ($1, clock_timestamp(), 60000, 60000, 60000, 0, 0, 'simulated')",
        BTC,
    )
    return desk


async def start(desk: Desk, kind: Literal["LEVERAGE", "MARGIN"], value: str) -> WorkflowHandle[Any, Any]:
    change_id = f"margin-{ALICE}-{BTC}-{uuid.uuid4().hex[:12]}"
    return await desk.temporal.start_workflow(
        MARGIN_CHANGE,
        MarginChange(change_id, ALICE, BTC, kind, value),
        id=change_id,
        task_queue=OPERATIONS_QUEUE,
    )


async def trade(desk: Desk) -> None:
    """Alice buys 0.01 at 60,000 from Bob: 60 of margin and 0.30 of fee."""
    await desk.place(order(BOB, "SELL", "0.01", "60000"))
    await desk.place(order(ALICE, "BUY", "0.01", "60000"))
    seq = await StepwiseEngine(desk.pool).match()
    await until_settled(await start_settlement(desk.temporal), seq)


async def test_margin_is_put_behind_a_position(desk: Desk, pool: Pool, redis: Redis) -> None:
    async with workers(desk.temporal, pool, redis):
        await trade(desk)
        handle = await start(desk, "MARGIN", "100")
        assert await handle.result() is None
    assert await desk.balance(ALICE) == (D("839.7"), D(160))
    assert await pool.fetchval("SELECT margin FROM positions.positions WHERE user_id = $1", ALICE) == 160
    assert regular_attempts(await handle.fetch_history()) == []
    await desk.assert_clean()
    await save_history(handle, "margin_added")


async def test_a_refusal_changes_nothing_and_says_why(desk: Desk, pool: Pool, redis: Redis) -> None:
    async with workers(desk.temporal, pool, redis):
        await trade(desk)
        refused = await start(desk, "MARGIN", "-1")
        assert await refused.result() == "INSUFFICIENT_MARGIN"
        broke = await start(desk, "MARGIN", "5000")
        assert await broke.result() == "INSUFFICIENT_FUNDS"
        assert await details(broke) == "Refused: INSUFFICIENT_FUNDS"
    assert await desk.balance(ALICE) == (D("939.7"), D(60))
    await desk.assert_clean()
    await save_history(refused, "margin_refused")
    await save_history(broke, "margin_refused_by_ledger")


async def test_a_change_waits_for_an_order_of_the_user_that_is_not_frozen_yet(
    desk: Desk, pool: Pool, redis: Redis
) -> None:
    gate = Gate()
    async with workers(desk.temporal, pool, redis, {FREEZE_FUNDS: gate}):
        saga = await desk.take_in(order(ALICE, "BUY", "0.01", "60000"))
        placing = await desk.start(saga)
        await gate.knocked.wait()
        handle = await start(desk, "LEVERAGE", "5")

        await until(lambda: _is_waiting(handle), 15, "the change to wait")
        assert await details(handle) == "Waits for another saga of the user"
        assert await pool.fetchval("SELECT leverage FROM risk.exposures WHERE user_id = $1", ALICE) == 10
        gate.is_open = True
        await placing.result()
        assert await handle.result() is None
        assert await details(handle) == "Done"
    assert await pool.fetchval("SELECT leverage FROM risk.exposures WHERE user_id = $1", ALICE) == 5
    # 600 / 5 + 0.30
    assert await desk.balance(ALICE) == (D("879.7"), D("120.3"))
    await desk.assert_clean()
    await save_history(handle, "margin_busy")


async def _is_waiting(handle: WorkflowHandle[Any, Any]) -> bool:
    history = await handle.fetch_history()
    return any(event.HasField("timer_started_event_attributes") for event in history.events)


async def test_steps_that_fail_are_tried_again_in_sight_of_the_operator(desk: Desk, pool: Pool, redis: Redis) -> None:
    changed: dict[str, Change] = {PLAN_MARGIN_CHANGE: fails(2), MOVE_MARGIN: fails(5)}
    async with workers(desk.temporal, pool, redis, changed):
        handle = await start(desk, "LEVERAGE", "20")
        assert await asyncio.wait_for(handle.result(), 30) is None
    assert MOVE_MARGIN in {name for name, _ in regular_attempts(await handle.fetch_history())}
    await desk.assert_clean()
    await save_history(handle, "margin_retried")


async def test_orders_that_the_change_leaves_without_money_are_cancelled(desk: Desk, pool: Pool, redis: Redis) -> None:
    async def spend() -> None:
        await desk.deposit(ALICE, "-870")

    async with workers(desk.temporal, pool, redis, {MOVE_MARGIN: first(spend)}):
        await trade(desk)
        (rest,) = await desk.place(order(ALICE, "BUY", "0.01", "50000"))
        handle = await start(desk, "LEVERAGE", "5")
        assert await handle.result() is None
    assert (await desk.states([rest])) == [("CANCEL_REQUESTED", None)]
    await save_history(handle, "margin_uncovered")


async def test_a_cancelled_change_that_risk_has_decided_on_is_carried_out_so_that_later_orders_are_not_barred(
    desk: Desk, pool: Pool, redis: Redis
) -> None:
    gate = Gate()
    async with workers(desk.temporal, pool, redis, {MOVE_MARGIN: gate}):
        await trade(desk)
        handle = await start(desk, "LEVERAGE", "5")
        await gate.visible.wait()
        await handle.cancel()
        gate.is_open = True
        assert await handle.result() is None
        # 600 / 5, after 0.30 of fee; then an order's 600 / 5 + 0.30
        assert await desk.balance(ALICE) == (D("879.7"), D(120))
        await desk.place(order(ALICE, "BUY", "0.01", "60000"))
    assert await desk.balance(ALICE) == (D("759.4"), D("240.3"))
    await desk.assert_clean()
    await save_history(handle, "margin_cancelled")


async def test_a_cancelled_change_that_still_waits_ends_and_changes_nothing(
    desk: Desk, pool: Pool, redis: Redis
) -> None:
    gate = Gate()
    async with workers(desk.temporal, pool, redis, {FREEZE_FUNDS: gate}):
        placing = await desk.start(await desk.take_in(order(ALICE, "BUY", "0.01", "60000")))
        await gate.knocked.wait()
        handle = await start(desk, "LEVERAGE", "5")
        await until(lambda: _is_waiting(handle), 15, "the change to wait")
        await handle.cancel()
        with pytest.raises(WorkflowFailureError) as ended:
            await handle.result()
        assert isinstance(ended.value.cause, CancelledError)
        gate.is_open = True
        await placing.result()
    assert await pool.fetchval("SELECT leverage FROM risk.exposures WHERE user_id = $1", ALICE) == 10
    await desk.assert_clean()
    await save_history(handle, "margin_cancelled_waiting")

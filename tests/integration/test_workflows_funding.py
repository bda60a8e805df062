"""The funding workflow and its schedule: what it waits for, that it pays once, and three days of it with outages."""

import asyncio
import sys
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis
from temporalio.client import Client, WorkflowFailureError, WorkflowHandle
from temporalio.exceptions import CancelledError
from temporalio.service import RPCError, RPCStatusCode
from temporalio.testing import WorkflowEnvironment

from activities.registry import funding_schedule, funding_schedule_id
from domain.contracts.funding import (
    CLOSE_FUNDING,
    CONFIRM_FUNDING,
    EVENTS_OF,
    FIX_FUNDING_POSITIONS,
    FUNDING_SETTLEMENT,
    FUNDING_UNCOVERED,
    LAST_COMMAND,
    OPEN_FUNDING,
    SETTLE_FUNDING,
    FundingInput,
    FundingTotals,
)
from domain.contracts.queues import SETTLEMENT_QUEUE
from domain.contracts.settlement import EventRange
from domain.mark_price import next_funding_time
from stack.servers import SEARCH_ATTRIBUTES
from storage.db import Pool
from tests.integration.ledger_world import publish_rate
from tests.replay import save_history
from tests.sagas import (
    BTC,
    ETH,
    Desk,
    Gate,
    StepwiseEngine,
    details,
    fails,
    order,
    regular_attempts,
    settlement_steps,
    workers,
)
from tests.waiting import until

D = Decimal
ALICE, BOB = 1, 2
HOURS_8 = timedelta(hours=8)
PAID = FundingTotals(2, "0.006", "0.006", "0")
STEPS = [
    OPEN_FUNDING,
    LAST_COMMAND,
    EVENTS_OF,
    FIX_FUNDING_POSITIONS,
    SETTLE_FUNDING,
    CONFIRM_FUNDING,
    FUNDING_UNCOVERED,
    CLOSE_FUNDING,
]


class Exchange:
    """A desk with an engine, whose trades are settled without a workflow."""

    def __init__(self, pool: Pool, redis: Redis, temporal: Client) -> None:
        self.desk = Desk(pool, temporal)
        self.pool = pool
        self.redis = redis
        self.engine = StepwiseEngine(pool)
        self.settled_seq = 0

    async def open(self) -> None:
        """Alice sells 0.001 at 60000 to Bob, settled."""
        for user_id in (ALICE, BOB):
            await self.desk.deposit(user_id, "1000")
        async with workers(self.desk.temporal, self.pool, self.redis):
            await self.place_trade()
        await self.settle(await self.engine.match())

    async def place_trade(self) -> None:
        """Orders of Alice and Bob that match, for as much again."""
        await self.desk.place(order(ALICE, "SELL", "0.001", "60000"))
        await self.desk.place(order(BOB, "BUY", "0.001", "60000"))

    async def settle(self, to_seq: int) -> None:
        await settlement_steps(self.pool, self.redis, EventRange(BTC, self.settled_seq, to_seq))
        self.settled_seq = to_seq

    async def publish_rate(self, moment: datetime, rate: str = "0.0001") -> None:
        await publish_rate(self.pool, BTC, moment, rate, 60_000)

    async def start(self, moment: datetime, name: str = "by-hand") -> WorkflowHandle[Any, Any]:
        return await self.desk.temporal.start_workflow(
            FUNDING_SETTLEMENT,
            FundingInput(BTC, moment.isoformat()),
            id=name,
            task_queue=SETTLEMENT_QUEUE,
            result_type=FundingTotals,
        )

    async def payments(self, user_id: int = ALICE) -> dict[datetime, Decimal]:
        """What a user got and paid, by funding time."""
        rows = await self.pool.fetch(
            "SELECT funding_time, realized_pnl FROM positions.position_events"
            " WHERE type = 'FUNDING' AND user_id = $1 ORDER BY funding_time",
            user_id,
        )
        return {row[0]: row[1] for row in rows}


@pytest.fixture
async def exchange(pool: Pool, redis: Redis, temporal: Client) -> Exchange:
    """Alice has been short 0.001 against Bob for a minute."""
    exchange = Exchange(pool, redis, temporal)
    await exchange.open()
    await pool.execute("UPDATE positions.position_events SET created_at = created_at - interval '1 minute'")
    return exchange


def past() -> datetime:
    """A funding time after the first trade, and long enough ago that a run need not wait."""
    return datetime.now(UTC) - timedelta(seconds=10)


async def test_a_run_started_by_hand_settles_its_time_and_a_second_one_pays_nothing_more(exchange: Exchange) -> None:
    moment = past()
    await exchange.publish_rate(moment)
    async with workers(exchange.desk.temporal, exchange.pool, exchange.redis):
        handle = await exchange.start(moment)
        assert await handle.result() == PAID
        assert await (await exchange.start(moment, "again")).result() == PAID
    assert await exchange.payments() == {moment: D("0.006")}
    await exchange.desk.assert_clean()
    await save_history(handle, "funding")


async def test_orders_whose_money_pays_for_funding_are_cancelled(exchange: Exchange) -> None:
    desk = exchange.desk
    async with workers(desk.temporal, exchange.pool, exchange.redis):
        orders = await desk.place(order(BOB, "BUY", "0.001", "50000"), order(BOB, "BUY", "0.01", "3000", ETH))
        await exchange.settle(await exchange.engine.match())
        available, reserved = await desk.balance(BOB)
        await desk.deposit(BOB, str(-available))
        moment = past()
        # Of what is held behind the position and for two orders, Bob keeps 1.
        await exchange.publish_rate(moment, str((reserved - 1) / 60))
        handle = await exchange.start(moment)
        # What is taken of the margin, the engine has to hear first.
        await until_pending(handle, SETTLE_FUNDING, "the engine is at")
        assert await desk.balance(BOB) == (D(0), reserved)
        await exchange.engine.match()
        totals = await handle.result()
    assert (D(totals.paid), totals.insurance) == (reserved - 1, "0")
    assert await desk.balance(BOB) == (D(0), D(1))
    assert await desk.states(orders) == [("CANCEL_REQUESTED", None)] * 2
    await save_history(handle, "funding_uncovered")


async def test_runs_of_one_time_at_the_same_time_pay_once(exchange: Exchange) -> None:
    moment = past()
    await exchange.publish_rate(moment)
    async with workers(exchange.desk.temporal, exchange.pool, exchange.redis):
        handles = [await exchange.start(moment, f"run-{number}") for number in range(5)]
        assert [await handle.result() for handle in handles] == [PAID] * 5
    assert await exchange.payments() == {moment: D("0.006")}
    await exchange.desk.assert_clean()


async def test_a_run_waits_visibly_for_the_rate(exchange: Exchange) -> None:
    moment = past()
    async with workers(exchange.desk.temporal, exchange.pool, exchange.redis):
        handle = await exchange.start(moment)
        await until_pending(handle, OPEN_FUNDING, "no funding rate")
        assert "Waiting for the rate of" in await details(handle)
        assert "no funding rate" in await details(handle)
        await exchange.publish_rate(moment)
        assert await handle.result() == PAID
    await save_history(handle, "funding_without_rate")


async def test_a_run_waits_visibly_for_the_engine_and_for_settlement(exchange: Exchange) -> None:
    async with workers(exchange.desk.temporal, exchange.pool, exchange.redis):
        await exchange.place_trade()
        moment = past()
        await exchange.publish_rate(moment)
        handle = await exchange.start(moment)
        await until_pending(handle, EVENTS_OF, "The engine is at command")
        last = await exchange.engine.match()
        await until_pending(handle, FIX_FUNDING_POSITIONS, "Positions are at event")
        await exchange.settle(last)
        # What was traded meanwhile does not count.
        assert await handle.result() == PAID
    await exchange.desk.assert_clean()
    await save_history(handle, "funding_behind")


async def until_pending(handle: WorkflowHandle[Any, Any], step: str, failure: str) -> None:
    """An operator sees the step, and why it is not done."""

    async def is_pending() -> bool:
        described = (await handle.describe()).raw_description.pending_activities
        return any(found.activity_type.name == step and failure in found.last_failure.message for found in described)

    await until(is_pending, 20, f"{step} pending")


@pytest.mark.parametrize("step", STEPS)
async def test_a_step_that_fails_is_retried_until_it_succeeds(exchange: Exchange, step: str) -> None:
    moment = past()
    await exchange.publish_rate(moment)
    async with workers(exchange.desk.temporal, exchange.pool, exchange.redis, {step: fails(5)}):
        handle = await exchange.start(moment)
        assert await handle.result() == PAID
        assert regular_attempts(await handle.fetch_history()) == [(step, 2)]
    assert await exchange.payments() == {moment: D("0.006")}
    await exchange.desk.assert_clean()
    if step == CONFIRM_FUNDING:
        await save_history(handle, "funding_retried")


async def test_a_run_terminated_between_ledger_and_positions_is_finished_by_the_next(exchange: Exchange) -> None:
    moment = past()
    await exchange.publish_rate(moment)
    gate = Gate()
    async with workers(exchange.desk.temporal, exchange.pool, exchange.redis, {CONFIRM_FUNDING: gate}):
        handle = await exchange.start(moment)
        await asyncio.wait_for(gate.visible.wait(), 20)
        await handle.terminate("killed by the test")
        gate.is_open = True
        assert await (await exchange.start(moment, "next")).result() == PAID
    assert await exchange.payments() == {moment: D("0.006")}
    await exchange.desk.assert_clean()


async def test_a_waiting_run_can_be_aborted_by_an_operator_and_made_up_for_later(exchange: Exchange) -> None:
    moment = past()
    async with workers(exchange.desk.temporal, exchange.pool, exchange.redis):
        handle = await exchange.start(moment)
        await until_pending(handle, OPEN_FUNDING, "no funding rate")
        await handle.cancel()
        with pytest.raises(WorkflowFailureError) as failure:
            await handle.result()
        assert isinstance(failure.value.cause, CancelledError)
        assert await exchange.payments() == {}
        await exchange.publish_rate(moment)
        assert await (await exchange.start(moment, "later")).result() == PAID
    await exchange.desk.assert_clean()
    await save_history(handle, "funding_cancelled")


async def test_a_run_without_schedule_and_time_fails(exchange: Exchange) -> None:
    async with workers(exchange.desk.temporal, exchange.pool, exchange.redis):
        handle = await exchange.desk.temporal.start_workflow(
            FUNDING_SETTLEMENT, FundingInput(BTC), id="no-time", task_queue=SETTLEMENT_QUEUE
        )
        with pytest.raises(WorkflowFailureError):
            await handle.result()


@pytest.fixture(scope="module")
async def skipping() -> AsyncIterator[WorkflowEnvironment]:
    """A Temporal in which workflows, schedules among them, have a clock that can be wound forward."""
    environment = await WorkflowEnvironment.start_time_skipping_v2(
        dev_server_existing_path=str(Path(sys.executable).with_name("temporal")),
        dev_server_log_level="error",
        dev_server_extra_args=[
            *("--dynamic-config-value", "frontend.WorkflowTimeSkippingEnabled=true"),
            *(part for name, kind in SEARCH_ATTRIBUTES.items() for part in ("--search-attribute", f"{name}={kind}")),
        ],
    )
    async with environment:
        yield environment


async def test_three_days_of_scheduled_funding_with_outages_pay_every_time_once_at_its_own_rate(
    skipping: WorkflowEnvironment, pool: Pool, redis: Redis
) -> None:
    temporal = skipping.client
    exchange = Exchange(pool, redis, temporal)
    await exchange.open()
    schedule_id = funding_schedule_id(BTC)
    await temporal.create_schedule(schedule_id, funding_schedule(BTC, HOURS_8))
    clock = temporal.get_workflow_handle(f"temporal-sys-scheduler:{schedule_id}")
    first = next_funding_time(datetime.now(UTC), HOURS_8)
    times = [first + number * HOURS_8 for number in range(9)]
    rates = {moment: f"0.000{number}" for number, moment in enumerate(times, 1)}
    missing = times[4]
    for moment, rate in rates.items():
        if moment != missing:
            await exchange.publish_rate(moment, rate)

    async def run_of(moment: datetime) -> WorkflowHandle[Any, Any]:
        name = f"{schedule_id}-{moment:%Y-%m-%dT%H:%M:%SZ}"
        await until(lambda: has_started(temporal, name), 20, name)
        return temporal.get_workflow_handle(name)

    winding = asyncio.create_task(skipping.fast_forward(clock, timedelta(days=3)))
    # Day 1: all is well.
    async with workers(temporal, pool, redis):
        for moment in times[:3]:
            await skipping.fast_forward(await run_of(moment))
    # Day 2: no worker at first, then no rate.
    await run_of(times[3])
    await asyncio.sleep(0.5)
    assert list(await exchange.payments()) == times[:3]
    async with workers(temporal, pool, redis):
        await skipping.fast_forward(await run_of(times[3]))
        late = asyncio.create_task(skipping.fast_forward(waiting := await run_of(missing)))
        await until_pending(waiting, OPEN_FUNDING, "no funding rate")
        await exchange.publish_rate(missing, rates[missing])
        await late
        # Day 3, and what is left.
        for moment in times[5:]:
            await skipping.fast_forward(await run_of(moment))
    await winding
    await save_history(waiting, "funding_scheduled")

    assert await exchange.payments() == {moment: D(rate) * 60 for moment, rate in rates.items()}
    assert sum((await exchange.payments(BOB)).values()) == -60 * sum(map(D, rates.values()))
    await exchange.desk.assert_clean()


async def has_started(temporal: Client, name: str) -> bool:
    """A schedule starts its workflows when it gets to it."""
    try:
        await temporal.get_workflow_handle(name).describe()
    except RPCError as error:
        if error.status != RPCStatusCode.NOT_FOUND:
            raise
        return False
    return True

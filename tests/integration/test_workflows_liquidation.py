"""The liquidation workflow on real servers: fills that come late, failing steps, operators, lost signals."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from redis.asyncio import Redis
from temporalio.client import Client, WorkflowHandle

from activities.ledger.insurance import deposit_to_fund
from activities.liquidation.triggering import stalled
from domain.liquidation_saga import CLAIM_INSURANCE, SUBMIT
from domain.sagas import EventRange
from monitors.liquidations import LiquidationMonitor
from storage.db import Pool
from tests.integration.liquidation_world import publish_mark
from tests.replay import save_history
from tests.sagas import (
    BTC,
    Change,
    Desk,
    Gate,
    StepwiseEngine,
    fails,
    order,
    regular_attempts,
    settlement_steps,
    start_settlement,
    workers,
)
from tests.waiting import until
from workflows import liquidation

D = Decimal
LOSER, WINNER, MAKER = 1, 2, 3


@dataclass
class Scene:
    """LOSER is long 1 BTC at 60 000 with 10x against WINNER, all settled; workers run."""

    desk: Desk
    engine: StepwiseEngine
    redis: Redis
    monitor: LiquidationMonitor
    settlement: WorkflowHandle[Any, Any]

    async def settle(self) -> None:
        """Let the engine match what it got, and tell settlement."""
        await self.settlement.signal("advance", await self.engine.match())

    async def settle_all(self) -> None:
        """Match, and return when it is settled."""
        last = await self.engine.match()
        await self.settlement.signal("advance", last)

        async def settled() -> bool:
            return bool((await self.settlement.query("progress"))["settled_seq"] >= last)

        await until(settled, 15, "settlement")

    async def mark(self, price: object) -> WorkflowHandle[Any, Any]:
        """A new mark price that liquidates LOSER; the workflow."""
        await publish_mark(self.redis, price)
        async with self.desk.pool.acquire() as conn:
            [opened] = await self.monitor.look(conn, datetime.now(UTC))
        await self.monitor.start([opened])
        return self.desk.temporal.get_workflow_handle(opened.workflow_id)

    async def submitted(self, count: int = 1) -> None:
        """Returns when so many liquidation orders have been sent to the engine."""
        await self.until_rows("SELECT count(*) FROM orders.orders WHERE is_liquidation", count)

    async def until_rows(self, query: str, count: int) -> None:
        async def there() -> bool:
            return bool(await self.desk.pool.fetchval(query) >= count)

        await until(there, 15, query)

    async def position(self, user_id: int) -> tuple[Decimal, str]:
        row = await self.desk.pool.fetchrow(
            "SELECT signed_quantity, status FROM positions.positions WHERE user_id = $1", user_id
        )
        assert row is not None
        return row[0], row[1]

    async def status(self) -> str:
        status: str = await self.desk.pool.fetchval("SELECT status FROM risk.liquidation_queue")
        return status


@asynccontextmanager
async def scene(
    pool: Pool, temporal: Client, redis: Redis, changed: dict[str, Change] | None = None, fund: str = "1000000"
) -> AsyncIterator[Scene]:
    desk, engine = Desk(pool, temporal), StepwiseEngine(pool)
    for user_id in (LOSER, WINNER, MAKER):
        await desk.deposit(user_id, "100000")
    if D(fund):
        async with pool.acquire() as conn, conn.transaction():
            await deposit_to_fund(conn, "seed", "USDT", D(fund))
    async with workers(temporal, pool, redis, changed):
        await desk.place(order(WINNER, "SELL", "1", "60000"))
        await desk.place(order(LOSER, "BUY", "1", "60000"))
        await engine.match()
        made = Scene(desk, engine, redis, LiquidationMonitor(redis, temporal), await start_settlement(temporal))
        await made.settle_all()
        yield made


async def test_a_position_is_sold_to_the_book_and_its_user_told(pool: Pool, temporal: Client, redis: Redis) -> None:
    async with scene(pool, temporal, redis) as it:
        [resting] = await it.desk.place(order(LOSER, "BUY", "0.1", "50000"))
        await it.desk.place(order(MAKER, "BUY", "2", "54200"))
        await it.settle_all()
        handle = await it.mark("54200")
        await it.until_rows("SELECT count(*) FROM matching.commands WHERE payload->>'reason' = 'LIQUIDATION'", 1)
        await it.settle()
        await it.submitted()
        await it.settle()
        assert await handle.result() == "PROCESSED"
        await it.settle_all()
        assert await it.position(LOSER) == (D(0), "CLOSED")
        assert await it.desk.states([resting]) == [("CANCELLED", "LIQUIDATION")]
        # It ran on signals: no timer fired.
        history = await handle.fetch_history()
        assert any(e.HasField("workflow_execution_signaled_event_attributes") for e in history.events)
        await it.desk.assert_clean()
        await save_history(handle, "liquidation")
        await save_history(it.settlement, "settlement_liquidating")


async def test_fills_that_come_late_are_waited_for(pool: Pool, temporal: Client, redis: Redis) -> None:
    async with scene(pool, temporal, redis) as it:
        await it.desk.place(order(MAKER, "BUY", "2", "54200"))
        await it.settle_all()
        handle = await it.mark("54200")
        await it.submitted()
        # Longer than a look takes: the engine is slow, and nothing is submitted twice.
        await asyncio.sleep(liquidation.LOOK_INTERVAL.total_seconds() * 1.5)
        assert await it.status() == "PROCESSING"
        # And it has no signal to go by: somebody else settles.
        settled = (await it.settlement.query("progress"))["settled_seq"]
        await settlement_steps(pool, redis, EventRange(BTC, settled, await it.engine.match()))
        assert await handle.result() == "PROCESSED"
        assert await pool.fetchval("SELECT count(*) FROM orders.orders WHERE is_liquidation") == 1
        await it.desk.assert_clean()
        await save_history(handle, "liquidation_late")


async def test_without_book_and_fund_the_winner_is_deleveraged(pool: Pool, temporal: Client, redis: Redis) -> None:
    async with scene(pool, temporal, redis, fund="0") as it:
        handle = await it.mark("54000")
        await it.submitted()
        await it.settle()
        await it.until_rows("SELECT count(*) FROM matching.commands WHERE payload->>'kind' = 'DELEVERAGE'", 1)
        await it.settle()
        assert await handle.result() == "PROCESSED"
        assert await it.position(WINNER) == (D(0), "CLOSED")
        assert await it.desk.balance(WINNER) == (D("105988"), D(0))
        await it.desk.assert_clean()
        await save_history(handle, "liquidation_deleveraged")


async def test_a_price_that_recovers_ends_it(pool: Pool, temporal: Client, redis: Redis) -> None:
    gate = Gate()
    async with scene(pool, temporal, redis, {CLAIM_INSURANCE: gate}) as it:
        [bid] = await it.desk.place(order(LOSER, "BUY", "0.1", "50000"))
        await it.settle_all()
        handle = await it.mark("54200")
        await it.until_rows("SELECT count(*) FROM matching.commands WHERE payload->>'reason' = 'LIQUIDATION'", 1)
        await publish_mark(redis, "60000")
        await it.settle()
        assert await handle.result() == "PROCESSED"
        assert await it.position(LOSER) == (D(1), "OPEN")
        assert await it.desk.states([bid]) == [("CANCELLED", "LIQUIDATION")]
        await it.desk.assert_clean()
        await save_history(handle, "liquidation_recovered")


async def test_an_operator_aborts_it_and_the_order_in_flight_is_finished(
    pool: Pool, temporal: Client, redis: Redis
) -> None:
    async with scene(pool, temporal, redis) as it:
        await it.desk.place(order(MAKER, "BUY", "0.4", "54200"))
        await it.settle_all()
        handle = await it.mark("54200")
        await it.submitted()
        await handle.cancel()
        await it.until_rows("SELECT count(*) FROM risk.liquidation_queue WHERE stopping", 1)
        assert await it.status() == "PROCESSING"
        await it.settle()
        assert await handle.result() == "ABORTED"
        assert await it.status() == "ABORTED"
        assert await it.position(LOSER) == (D("0.6"), "OPEN")
        # Claims are given back, and the same price does not liquidate it again.
        assert not await pool.fetchval("SELECT EXISTS (SELECT FROM ledger.insurance_claims WHERE is_open)")
        await publish_mark(redis, "54000")
        async with pool.acquire() as conn:
            assert await it.monitor.look(conn, datetime.now(UTC)) == []
        await it.desk.assert_clean()
        await save_history(handle, "liquidation_aborted")


async def test_one_that_is_aborted_and_waits_for_long_continues_as_new_and_is_still_aborted(
    pool: Pool, short_history: Client, redis: Redis
) -> None:
    async with scene(pool, short_history, redis) as it:
        await it.desk.place(order(MAKER, "BUY", "0.4", "54200"))
        await it.settle_all()
        handle = await it.mark("54200")
        await it.submitted()
        await handle.cancel()
        started = (await handle.describe()).run_id

        async def continued() -> bool:
            return (await handle.describe()).run_id != started

        await until(continued, 60, "another run")
        assert await it.status() == "PROCESSING"
        await it.settle()
        assert await handle.result() == "ABORTED"
        assert await it.status() == "ABORTED"
        assert await it.position(LOSER) == (D("0.6"), "OPEN")
        assert not await pool.fetchval("SELECT EXISTS (SELECT FROM ledger.insurance_claims WHERE is_open)")
        await it.desk.assert_clean()


@pytest.mark.parametrize("times", [2, 5])
async def test_a_failing_step_is_retried_where_operators_see_it(
    pool: Pool, temporal: Client, redis: Redis, times: int
) -> None:
    async with scene(pool, temporal, redis, {SUBMIT: fails(times)}) as it:
        await it.desk.place(order(MAKER, "BUY", "2", "54200"))
        await it.settle_all()
        handle = await it.mark("54200")
        await it.submitted()
        await it.settle()
        assert await handle.result() == "PROCESSED"
        attempts = regular_attempts(await handle.fetch_history())
        assert attempts == ([(SUBMIT, 2)] if times == 5 else [])
        await it.desk.assert_clean()


async def test_a_liquidation_whose_workflow_was_never_started_or_terminated_is_swept_up(
    pool: Pool, temporal: Client, redis: Redis
) -> None:
    async with scene(pool, temporal, redis) as it:
        await it.desk.place(order(MAKER, "BUY", "2", "54200"))
        await it.settle_all()
        handle = await it.mark("54200")
        await it.submitted()
        await handle.terminate("by mistake")
        # Settlement tells a workflow that is gone, and goes on.
        await it.settle_all()
        async with pool.acquire() as conn:
            assert await stalled(conn, timedelta(minutes=1), 10) == []
            opened = await stalled(conn, timedelta(0), 10)
        assert len(opened) == 1
        await it.monitor.start(opened)
        await it.monitor.start(opened)
        assert await temporal.get_workflow_handle(handle.id).result() == "PROCESSED"
        # What the first one submitted was found, and nothing is submitted twice.
        assert await pool.fetchval("SELECT count(*) FROM orders.orders WHERE is_liquidation") == 1
        await it.desk.assert_clean()

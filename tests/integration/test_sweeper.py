"""The sweeper: a saga that was written down and never started is started within seconds, and only once."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from decimal import Decimal

import pytest
from redis.asyncio import Redis
from temporalio.client import Client
from temporalio.service import RPCError

from activities.orders.sagas import Saga, merge_sagas
from monitors.sweeper import STALLED_AFTER, SWEEP_SECONDS, run_sweeper, sweep
from stack.ports import free_port
from storage.db import Pool
from tests.sagas import Desk, order, workers
from tests.waiting import until

D = Decimal
ALICE = 1


@pytest.fixture
async def desk(pool: Pool, temporal: Client) -> Desk:
    desk = Desk(pool, temporal)
    await desk.deposit(ALICE, "1000")
    return desk


@asynccontextmanager
async def sweeping(pool: Pool, temporal: Client) -> AsyncIterator[None]:
    stop = asyncio.Event()
    task = asyncio.create_task(run_sweeper(pool, temporal, stop))
    yield
    stop.set()
    await asyncio.wait_for(task, 10)


async def until_done(pool: Pool, seconds: float) -> None:
    async def done() -> bool:
        return not await pool.fetchval("SELECT EXISTS (SELECT FROM orders.sagas WHERE NOT done)")

    await until(done, seconds, "all sagas to be done")


async def age(pool: Pool) -> None:
    await pool.execute("UPDATE orders.sagas SET created_at = created_at - interval '1 minute'")


async def workflows(temporal: Client) -> list[str]:
    return sorted([execution.id async for execution in temporal.list_workflows()])


async def test_orders_whose_api_died_before_the_start_are_placed_within_seconds(
    desk: Desk, pool: Pool, redis: Redis
) -> None:
    lost = [await desk.take_in(order(ALICE, "BUY", "0.001", "60000")) for _ in range(3)]
    ids = [order_id for saga in lost for order_id in saga.batch.order_ids]
    assert await desk.states(ids) == [("PENDING", None)] * 3
    limit = STALLED_AFTER.total_seconds() + 2 * SWEEP_SECONDS + 2
    async with workers(desk.temporal, pool, redis), sweeping(pool, desk.temporal), sweeping(pool, desk.temporal):
        await until_done(pool, limit)
    assert await desk.states(ids) == [("ACCEPTED", None)] * 3
    assert await desk.balance(ALICE) == (D("981.91"), D("18.09"))
    await desk.assert_clean()


async def test_a_lost_cancellation_is_started(desk: Desk, pool: Pool, redis: Redis) -> None:
    async with workers(desk.temporal, pool, redis):
        ids = await desk.place(order(ALICE, "BUY", "0.001", "60000"))
        await desk.take_in_cancellation(*ids)
        await age(pool)
        assert await sweep(pool, desk.temporal) == 1
        await until_done(pool, 10)
    assert await desk.states(ids) == [("CANCEL_REQUESTED", None)]
    assert await desk.commands() == ["NEW", "CANCEL"]


async def test_young_and_finished_sagas_are_left_alone(desk: Desk, pool: Pool, redis: Redis) -> None:
    async with workers(desk.temporal, pool, redis):
        await desk.place(order(ALICE, "BUY", "0.001", "60000"))
        await age(pool)
        await desk.take_in(order(ALICE, "BUY", "0.001", "60000"))
        assert await sweep(pool, desk.temporal) == 0


async def test_sagas_merged_before_their_api_died_are_started_as_the_one_they_became(
    desk: Desk, pool: Pool, redis: Redis
) -> None:
    sagas = [await desk.take_in(order(ALICE, "BUY", "0.001", "60000")) for _ in range(3)]
    merged = await merge_sagas(pool, sagas)
    assert merged is not None
    await age(pool)
    async with workers(desk.temporal, pool, redis):
        assert await sweep(pool, desk.temporal) == 1
        await until_done(pool, 10)
        # The api lives after all and starts what it has merged: it runs, or has run, already.
        assert await sweep(pool, desk.temporal) == 0
    assert await desk.states(merged.batch.order_ids) == [("ACCEPTED", None)] * 3
    assert await desk.commands() == ["NEW"] * 3
    await desk.assert_clean()


async def test_a_saga_that_was_swept_up_is_not_merged_into_another(desk: Desk, pool: Pool, redis: Redis) -> None:
    slow = await desk.take_in(order(ALICE, "BUY", "0.001", "60000"))
    await age(pool)
    others = [await desk.take_in(order(ALICE, "BUY", "0.001", "60000")) for _ in range(2)]
    async with workers(desk.temporal, pool, redis):
        assert await sweep(pool, desk.temporal) == 1
        merged = await merge_sagas(pool, [slow, *others])
        assert merged is not None
        assert merged.batch.order_ids == [order_id for saga in others for order_id in saga.batch.order_ids]
        await (await desk.start(merged)).result()
        await until_done(pool, 10)
    assert await desk.commands() == ["NEW"] * 3
    await desk.assert_clean()


async def test_when_all_were_swept_up_there_is_nothing_to_merge(desk: Desk, pool: Pool, redis: Redis) -> None:
    sagas: list[Saga] = [await desk.take_in(order(ALICE, "BUY", "0.001", "60000")) for _ in range(2)]
    await age(pool)
    async with workers(desk.temporal, pool, redis):
        assert await sweep(pool, desk.temporal) == 2
        assert await merge_sagas(pool, sagas) is None
        await until_done(pool, 10)
    await desk.assert_clean()


async def test_what_could_not_be_swept_while_temporal_was_away_is_swept_later(
    desk: Desk, pool: Pool, redis: Redis
) -> None:
    away = await Client.connect(f"127.0.0.1:{free_port()}", namespace=desk.temporal.namespace, lazy=True)
    saga = await desk.take_in(order(ALICE, "BUY", "0.001", "60000"))
    await age(pool)
    with pytest.raises((RPCError, RuntimeError)):
        await sweep(pool, away)
    async with workers(desk.temporal, pool, redis):
        assert await sweep(pool, desk.temporal) == 1
        await until_done(pool, 10)
    assert await workflows(desk.temporal) == [saga.batch.saga_id]

"""The dead-man switch: whoever is not heard of again has nothing open."""

import asyncio
from datetime import timedelta

import pytest
from redis.asyncio import Redis

from activities.orders.countdowns import fire_countdowns, set_countdown, stop_countdown
from activities.orders.sagas import Saga
from storage.db import Pool
from tests.integration.ledger_world import World, limit

NOW = timedelta(0)
LATER = timedelta(minutes=1)


@pytest.fixture
async def world(pool: Pool, redis: Redis) -> World:
    world = World(pool, redis)
    await world.deposit(100_000, 1, 2)
    return world


async def fire(pool: Pool) -> list[Saga]:
    async with pool.acquire() as conn, conn.transaction():
        return await fire_countdowns(conn, "t")


async def countdown(pool: Pool, user_id: int, wait: timedelta) -> None:
    async with pool.acquire() as conn:
        await set_countdown(conn, user_id, wait)


async def test_when_the_time_is_over_everything_open_is_cancelled_once(world: World, pool: Pool) -> None:
    mine = await world.place(limit(1, "BUY", "0.1", 50_000), limit(1, "BUY", "0.1", 51_000))
    await world.place(limit(2, "BUY", "0.1", 50_000))
    waiting = (await world.take_in(limit(1, "BUY", "0.1", 52_000))).order_ids
    await countdown(pool, 1, NOW)
    (saga,) = await fire(pool)
    assert (saga.kind, saga.batch.order_ids) == ("CANCEL", [*mine, *waiting])
    recorded = await pool.fetchval("SELECT order_ids FROM orders.sagas WHERE workflow_id = $1", saga.batch.saga_id)
    assert recorded == saga.batch.order_ids
    assert await fire(pool) == []


async def test_a_sign_of_life_puts_it_off(world: World, pool: Pool) -> None:
    await world.place(limit(1, "BUY", "0.1", 50_000))
    await countdown(pool, 1, NOW)
    await countdown(pool, 1, LATER)
    assert await fire(pool) == []


async def test_a_stopped_switch_does_not_fire(world: World, pool: Pool) -> None:
    await world.place(limit(1, "BUY", "0.1", 50_000))
    await countdown(pool, 1, NOW)
    async with pool.acquire() as conn:
        await stop_countdown(conn, 1)
    assert await fire(pool) == []


@pytest.mark.usefixtures("world")
async def test_who_has_nothing_open_is_left_alone(pool: Pool) -> None:
    await countdown(pool, 1, NOW)
    assert await fire(pool) == []


async def test_two_that_fire_at_the_same_time_fire_once(world: World, pool: Pool) -> None:
    await world.place(limit(1, "BUY", "0.1", 50_000), limit(2, "BUY", "0.1", 50_000))
    await countdown(pool, 1, NOW)
    await countdown(pool, 2, NOW)
    fired = await asyncio.gather(*(fire(pool) for _ in range(4)))
    assert sum(len(sagas) for sagas in fired) == 2

"""Who waits out outages ends when told to, also when told in the moment in which the connection breaks."""

import asyncio
from collections.abc import Callable, Coroutine
from datetime import timedelta
from typing import Any

import pytest
from redis.asyncio import Redis

from api.desk.batcher import Lane
from domain.instruments import SHIPPED
from market.checkpoints import Checkpointer
from market.funding import FundingRates
from market.instrument_market import InstrumentMarket
from market.kline_feed import KlineFeed
from market.marks import MarkPrices
from market.simulated_index import SimulatedIndex
from storage.db import Pool, open_pool
from storage.leadership import RELAY_LOCK, run_as_leader
from storage.territory import Claims, run_territory
from tests.integration.market_app import BTC, EngineLog, placed, trade
from tests.waiting import until
from worker import keep_running

MINUTE = timedelta(minutes=1)
Loop = Coroutine[Any, Any, None]


def checkpoints(pool: Pool, _: Redis) -> Loop:
    market = InstrumentMarket(SHIPPED[0])
    checkpointer = Checkpointer(pool, {BTC: market})
    market.apply(1, [placed(1, "BUY", 600_000, 1)])
    return checkpointer.run()


def funding(pool: Pool, _: Redis) -> Loop:
    return FundingRates(pool, {BTC: InstrumentMarket(SHIPPED[0])}, MINUTE).run()


def klines(pool: Pool, redis: Redis) -> Loop:
    return KlineFeed(pool, redis, [BTC]).run()


def marks(pool: Pool, redis: Redis) -> Loop:
    index = SimulatedIndex(SHIPPED[:1], {}, 1)
    return MarkPrices(pool, redis, {BTC: InstrumentMarket(SHIPPED[0])}, index, MINUTE, asyncio.Event()).run(0.1)


def monitor(pool: Pool, _: Redis) -> Loop:
    stop = asyncio.Event()
    return keep_running("one", lambda: run_as_leader(pool, RELAY_LOCK, stop, lambda _: write(pool)), stop)


def territory(pool: Pool, _: Redis) -> Loop:
    return run_territory(pool, Claims({"one": 1}, ["one"], 0), asyncio.Event(), lambda _: write(pool))


async def batches(pool: Pool, _: Redis) -> None:
    lane: Lane[int, int] = Lane(lambda *_: write(pool), batch_max=1, waiting_max=1)
    answer = asyncio.create_task(lane.submit([1]))
    try:
        await lane.run()
    finally:
        await asyncio.wait([answer])


async def write(pool: Pool) -> None:
    async with pool.acquire() as conn, conn.transaction():
        await conn.execute("DELETE FROM market.mark_prices")


LOCKED = (
    "LOCK TABLE market.checkpoints, market.funding_rates, market.kline_buckets, market.mark_prices IN EXCLUSIVE MODE"
)
WAITING = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"


@pytest.mark.parametrize("loop", [batches, checkpoints, funding, klines, marks, monitor, territory])
async def test_a_cancellation_that_meets_a_breaking_connection_ends_the_loop(
    pool: Pool, redis: Redis, database_url: str, loop: Callable[[Pool, Redis], Loop]
) -> None:
    await EngineLog(pool, redis).append(BTC, [placed(1, "BUY", 600_000, 1), trade(1, 1, 600_000, 1, 0)])
    await pool.execute(
        "INSERT INTO market.mark_prices SELECT $1, now() - n * interval '1 minute', 1, 1, 1, 0, 0, 'simulated'"
        " FROM generate_series(1, 3) AS n",
        BTC,
    )
    async with await open_pool(database_url) as own, own.acquire() as other, other.transaction():
        await other.execute(LOCKED)
        task = asyncio.create_task(loop(pool, redis))

        async def is_writing() -> bool:
            return bool(await own.fetchval(WAITING))

        await until(is_writing, 10, "the loop to write")
        task.cancel()
        pool.terminate()
        done, _ = await asyncio.wait([task], timeout=5)
    task.cancel()
    assert done == {task}

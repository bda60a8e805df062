"""The reports' read model is the same from the streams, from the tables, and computed slowly, whatever goes wrong."""

import asyncio
from dataclasses import replace

import asyncpg
import pytest
from redis.asyncio import Redis

from domain.contracts.funding import FundingRun
from domain.events import LedgerEntryCreated, LiquidationTriggered
from monitors import relay as relay_module
from reporting import consumer, streams
from reporting.build import (
    TrimmedStreamError,
    read_build,
    read_positions,
    rebuild,
    restart_from_streams,
)
from reporting.consumer import OvertakenError, run_reporting
from reporting.counting import TOPICS, UnreadableEventError
from storage import outbox
from storage.db import Pool
from tests.integration.ledger_world import BTC, ETH, World, finish, limit
from tests.integration.liquidation_world import LiquidationWorld
from tests.integration.market_app import eventually
from tests.integration.reporting_world import (
    Reader,
    read_model,
    recompute,
    relay,
    repeat_entries,
)
from tests.integration.test_steps_funding_random import FundedTrading
from tests.integration.test_steps_liquidation_random import CROSS, Liquidating
from tests.integration.test_steps_random import INSTRUMENTS, USERS

TRADES, ENTRIES = "matching.trade-executed", "ledger.entry-created"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "READ_BLOCK_MS", 20)
    for pause in ("PAUSE_SECONDS", "RETRY_SECONDS", "UNREADABLE_PAUSE_SECONDS"):
        monkeypatch.setattr(consumer, pause, 0.02)


async def traded(pool: Pool, redis: Redis) -> World:
    """A few trades on two instruments, profit, fees and a funding payment."""
    world = World(pool, redis, settles_by_itself=False)
    await world.deposit(100_000, 1, 2, 3)
    await world.trade(1, 2, "0.5", 60_000)
    await world.trade(3, 1, "0.2", 60_500)
    await world.trade(2, 3, "1.5", 3_000, ETH)
    moment = await pool.fetchval("SELECT clock_timestamp()")
    await world.publish_rate(moment, "0.0001", 60_000)
    await finish(world.funding(FundingRun(BTC.instrument_id, moment.isoformat())))
    return world


async def assert_same_every_way(pool: Pool, redis: Redis) -> None:
    """What the streams led to, what the tables lead to, and the slow computation."""
    from_streams, slowly = await read_model(pool), await recompute(pool)
    assert from_streams == slowly
    async with pool.acquire() as conn:
        await rebuild(conn, redis)
    assert await read_model(pool) == slowly


class Reported(Liquidating, FundedTrading):
    """Everything that moves money, at random, with a relay and a reader that stop, die and repeat themselves."""

    reader: Reader

    async def act(self) -> None:
        roll, pool, redis = self.dice.random(), self.world.pool, self.world.redis
        if roll < 0.03:
            await relay(pool, redis)
        elif roll < 0.04:
            await repeat_entries(redis, self.dice.choice([TRADES, ENTRIES]), self.dice.randint(1, 300))
        elif roll < 0.07:
            await self.read()
        elif roll < 0.075:
            await rebuild(self.reader.conn, redis)
            self.reader = await Reader.start(self.reader.conn, redis)
        else:
            await super().act()

    async def read(self) -> None:
        """Read and count; now and then the reader dies before that, before it commits, or before it acknowledges."""
        entries, fate = await self.reader.read(), self.dice.random()
        if fate < 0.2 or not entries:
            pass
        elif fate < 0.4:
            transaction = self.reader.conn.transaction()
            await transaction.start()
            await self.reader.apply(entries)
            await transaction.rollback()
        else:
            await self.reader.apply(entries)
            if fate < 0.6:
                await self.reader.apply(entries)
            if fate < 0.8:
                return
        self.reader = await Reader.start(self.reader.conn, self.world.redis)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("seed", range(1, 4))
async def test_streams_tables_and_slow_computation_agree_whatever_dies_in_between(
    pool: Pool, redis: Redis, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(streams, "READ_ENTRIES_MAX", 37)
    monkeypatch.setattr(streams, "READ_BLOCK_MS", 1)
    world = LiquidationWorld(pool, redis, settles_by_itself=False)
    await world.fund(5_000)
    for user in USERS:
        await world.deposit((100, 1_000, 4_000, 20_000)[(user + seed) % 4], user)
    for user in CROSS:
        await world.make_cross(user, INSTRUMENTS)
    async with pool.acquire() as conn:
        await rebuild(conn, redis)
        trading = Reported(world, seed)
        trading.reader = await Reader.start(conn, redis)
        for number in range(900):
            await trading.act()
            if number % 300 == 299:
                await trading.come_to_rest()
        await relay(pool, redis)
        trading.reader = await Reader.start(conn, redis)
        await trading.reader.finish()
        first = await read_model(pool)
        await assert_same_every_way(pool, redis)
        # And all of it from the streams' first entries on.
        await restart_from_streams(conn, redis)
        assert not any((await read_model(pool)).values())
        await (await Reader.start(conn, redis)).finish()
    assert await read_model(pool) == first
    assert first["liquidations"]
    assert any(sums[2] for sums in first["pnl_days"].values())


async def test_open_interest_counts_what_was_deleveraged(pool: Pool, redis: Redis) -> None:
    world = LiquidationWorld(pool, redis, settles_by_itself=False)
    await world.fund(0.01)
    await world.deposit(6_100, 1)
    await world.deposit(100_000, 2)
    await world.trade(1, 2, "1", 60_000)
    [opened] = await world.marked(54_000)
    assert "deleveraged" in await world.liquidate(opened.liquidation_id)
    await relay(pool, redis)
    async with pool.acquire() as conn:
        await restart_from_streams(conn, redis)
        await (await Reader.start(conn, redis)).finish()
    model = await read_model(pool)
    assert [sums[-1] for sums in model["trade_days"].values()] == [0, 0]
    assert [sums[4:6] for sums in model["trade_days"].values()].count((0, 1)) == 1
    await assert_same_every_way(pool, redis)


async def test_trades_that_are_not_settled_are_counted_once_by_a_rebuild(pool: Pool, redis: Redis) -> None:
    world = await traded(pool, redis)
    await world.place(limit(1, "SELL", "0.3", 60_000), limit(2, "BUY", "0.3", 60_000))
    await world.match()
    await relay(pool, redis)
    async with pool.acquire() as conn:
        await rebuild(conn, redis)
        assert await read_model(pool) == await recompute(pool)
        reader = await Reader.start(conn, redis)
        await world.settle()
        await relay(pool, redis)
        await reader.finish()
    await assert_same_every_way(pool, redis)


async def test_a_rebuild_waits_for_who_is_writing_and_counts_each_event_once(pool: Pool, redis: Redis) -> None:
    await traded(pool, redis)
    async with pool.acquire() as conn, pool.acquire() as writer:
        # A lower id that is committed after the rebuild has begun.
        transaction = writer.transaction()
        await transaction.start()
        entry = ("7", BTC.instrument_id, "USDT", "5", "0", "5", "FEE", "TRADE", "999")
        await outbox.emit(writer, [LedgerEntryCreated(*entry)])
        await writer.execute(
            "INSERT INTO ledger.ledger_entries (reference_type, reference_id, entry_type, account, user_id, asset,"
            " instrument_id, delta_available) VALUES ('TRADE', '999', 'FEE', 'user:7', 7, 'USDT', $1, 5)",
            BTC.instrument_id,
        )
        building = asyncio.create_task(rebuild(conn, redis))
        await asyncio.sleep(0.2)
        assert not building.done()
        await transaction.commit()
        await building
        await relay(pool, redis)
        await (await Reader.start(conn, redis)).finish()
    await assert_same_every_way(pool, redis)
    assert await pool.fetchval("SELECT fees FROM reporting.pnl_days WHERE user_id = 7") == 5


async def test_a_rebuild_that_cannot_get_its_snapshot_leaves_all_as_it_is(
    pool: Pool, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "WATERMARK_LOCK", outbox.WATERMARK_LOCK.replace("2s", "50ms"))
    monkeypatch.setattr(outbox, "WATERMARK_ATTEMPTS", 2)
    await traded(pool, redis)
    async with pool.acquire() as conn, pool.acquire() as writer:
        await rebuild(conn, redis)
        before, build = await read_model(pool), await read_build(conn)
        async with writer.transaction():
            await outbox.emit(writer, [LiquidationTriggered("1", "1", BTC.instrument_id, "MARGIN", 1)])
            with pytest.raises(asyncpg.LockNotAvailableError):
                await rebuild(conn, redis)
        assert (await read_model(pool), await read_build(conn)) == (before, build)
        assert (await rebuild(conn, redis)).generation == 2


async def test_a_reader_of_a_former_build_counts_nothing_more(pool: Pool, redis: Redis) -> None:
    await traded(pool, redis)
    async with pool.acquire() as conn, pool.acquire() as other:
        await restart_from_streams(conn, redis)
        await relay(pool, redis)
        reader = await Reader.start(conn, redis)
        entries = await reader.read()
        await rebuild(other, redis)
        with pytest.raises(OvertakenError):
            await reader.apply(entries)
    assert await read_model(pool) == await recompute(pool)


async def test_an_event_that_cannot_be_read_is_not_half_counted(pool: Pool, redis: Redis) -> None:
    await traded(pool, redis)
    await relay(pool, redis)
    async with pool.acquire() as conn:
        await restart_from_streams(conn, redis)
        reader = await Reader.start(conn, redis)
        entries = await reader.read()
        for spoilt in (replace(entries[-1], data=b"{}"), replace(entries[-1], version="2")):
            with pytest.raises(UnreadableEventError):
                await reader.apply([*entries[:-1], spoilt])
        assert not any((await read_model(pool)).values())
        await reader.apply(entries)
        assert await pool.fetchval("SELECT count(*) FROM reporting.applied_events") == len(entries)


async def test_streams_that_were_trimmed_cannot_be_read_from_their_beginning(pool: Pool, redis: Redis) -> None:
    await traded(pool, redis)
    await relay(pool, redis)
    async with pool.acquire() as conn:
        await rebuild(conn, redis)
        before = await read_model(pool)
        await redis.xtrim(ENTRIES, maxlen=1, approximate=False)
        with pytest.raises(TrimmedStreamError, match=ENTRIES):
            await restart_from_streams(conn, redis)
    assert await read_model(pool) == before


@pytest.mark.timeout(60)
async def test_the_monitor_survives_trimming_a_lost_redis_unreadable_events_and_rebuilds(
    pool: Pool, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = await traded(pool, redis)
    stop = asyncio.Event()

    async def agrees() -> bool:
        return await read_model(pool) == await recompute(pool)

    async def generation() -> int:
        return await pool.fetchval("SELECT generation FROM reporting.builds") or 0

    async def at(number: int) -> bool:
        return await generation() == number and await agrees()

    await relay(pool, redis)
    monitor = asyncio.create_task(run_reporting(pool, redis, stop))
    try:
        # The first build is from the tables: earlier events may be gone.
        await eventually(lambda: at(1))
        await world.trade(2, 1, "0.1", 59_000)
        await relay(pool, redis)
        await eventually(agrees)
        assert await generation() == 1

        # While nobody reads, more comes than the stream keeps.
        stop.set()
        await monitor
        await world.trade(1, 3, "0.1", 61_000)
        await relay(pool, redis)
        await redis.xtrim(TRADES, maxlen=0, approximate=False)
        await redis.xtrim(ENTRIES, maxlen=1, approximate=False)
        assert not await agrees()
        stop.clear()
        monitor = asyncio.create_task(run_reporting(pool, redis, stop))
        await eventually(lambda: at(2))

        # Redis loses everything, also what was relayed and never read.
        await world.trade(1, 3, "0.1", 61_000)
        await redis.flushall()
        await pool.execute("DELETE FROM outbox.messages")
        await eventually(lambda: at(3))
        await world.trade(3, 1, "0.1", 61_500)
        await relay(pool, redis)
        await eventually(agrees)
        assert await generation() == 3

        # An older process writes an event without what is needed.
        with monkeypatch.context() as patch:
            patch.setattr(relay_module, "SCHEMA_VERSION", 2)
            await world.trade(3, 1, "0.1", 61_500)
            await relay(pool, redis)
        await eventually(agrees)
        assert await generation() > 3

        # Somebody rebuilds by hand.
        async with pool.acquire() as conn:
            await rebuild(conn, redis)
        await world.trade(3, 1, "0.1", 61_500)
        await relay(pool, redis)
        await eventually(agrees)
        assert set(await read_positions_of(pool)) == set(TOPICS)
    finally:
        stop.set()
        await monitor


async def read_positions_of(pool: Pool) -> list[str]:
    async with pool.acquire() as conn:
        return list(await read_positions(conn))

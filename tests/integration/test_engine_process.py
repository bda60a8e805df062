"""The engine on real servers: what it writes, how it survives, and who may write."""

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from decimal import Decimal
from pathlib import Path

import pytest
from redis.asyncio import Redis
from temporalio.client import Client

from activities.matching.steps import SETTLEMENT_CONSUMER
from domain.matching import AnyCommand, Cancel, encode
from engine import lease as leases
from engine.lease import LEASE_SECONDS, LeaseLostError
from engine.log import Batch, write_batch
from engine.main import Engine
from engine.matcher import Matcher
from settings import Settings
from storage.db import Pool
from tests.engine_commands import AT, new, random_commands
from tests.engine_log import BTC, append, assert_log_is, owner_of, until_matched
from tests.waiting import until

ID = BTC.instrument_id
ROOT = Path(__file__).parents[2]
NOWHERE = "127.0.0.1:1"


@pytest.fixture
def without_temporal(database_url: str, redis_url: str) -> Settings:
    """Temporal is away, as it may be: matching does not need it."""
    return Settings(database_url=database_url, redis_url=redis_url, temporal_address=NOWHERE)


@contextlib.asynccontextmanager
async def running(pool: Pool, redis: Redis, settings: Settings, owner: str = "a") -> AsyncIterator[asyncio.Task[None]]:
    """An engine for BTC; stopped in good order at the end, unless the test has killed it."""
    engine = Engine(pool, redis, settings, [BTC], owner)
    task = asyncio.create_task(engine.run())
    try:
        yield task
    finally:
        engine.stop()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait_for(task, 10)


async def kill(task: asyncio.Task[None]) -> None:
    """End an engine as a crash would: no lease is released."""
    task.cancel()
    await asyncio.wait([task])


async def count(pool: Pool, table: str) -> int:
    number: int = await pool.fetchval(f"SELECT count(*) FROM {table}")
    return number


async def outbox(pool: Pool) -> list[tuple[str, int]]:
    """(event name, order or trade) of every business event, in order of writing."""
    rows = await pool.fetch("SELECT name, payload FROM outbox.messages ORDER BY message_id")
    lines = [(row["name"], json.loads(line)) for row in rows for line in row["payload"].splitlines()]
    return [(name, line.get("orderId") or line["tradeId"]) for name, line in lines]


async def test_commands_become_events_trades_and_business_events(
    pool: Pool, redis: Redis, without_temporal: Settings
) -> None:
    commands: list[AnyCommand] = [
        new(1, "SELL", 600_000, 5),
        new(2, "BUY", 600_000, 3),
        Cancel(at=AT, order_id=1, user_id=1),
        new(3, "BUY", 600_000, 1, time_in_force="IOC"),
        new(4, "BUY", 0, 1),
    ]
    async with running(pool, redis, without_temporal):
        await append(pool, commands)
        await until_matched(pool, len(commands))
    await assert_log_is(pool, commands)
    assert sorted(await outbox(pool)) == [
        ("OrderCancelled", 1), ("OrderCancelled", 3), ("OrderFilled", 2), ("OrderPlaced", 1), ("OrderRejected", 4),
        ("TradeExecuted", 2 * 1024 + BTC.number),
    ]  # fmt: skip
    ticker = await pool.fetchrow("SELECT * FROM matching.trade_tickers")
    assert ticker is not None
    assert (ticker["price"], ticker["quantity"], ticker["taker_side"]) == (Decimal(60_000), Decimal("0.003"), "BUY")
    assert (ticker["maker_fee"], ticker["taker_fee"]) == (Decimal("0.036"), Decimal("0.09"))
    assert (ticker["buyer_user_id"], ticker["seller_user_id"]) == (2, 1)


async def test_a_restarted_engine_continues_where_the_log_ends(
    pool: Pool, redis: Redis, without_temporal: Settings
) -> None:
    commands = random_commands(6_000, seed=1)
    for part in (commands[:2_500], commands[2_500:5_500], commands[5_500:]):
        async with running(pool, redis, without_temporal):
            await append(pool, part)
            await until_matched(pool, int(part[-1].at) - AT)
    await assert_log_is(pool, commands)


async def test_commands_without_a_notification_are_found_by_the_poll(
    pool: Pool, redis: Redis, without_temporal: Settings
) -> None:
    commands: list[AnyCommand] = [new(1, "SELL", 600_000, 5)]
    async with running(pool, redis, without_temporal):
        await until_matched(pool, 0)
        async with pool.acquire() as conn, conn.transaction():
            await conn.execute("UPDATE matching.sequencers SET last_seq = 1 WHERE instrument_id = $1", ID)
            await conn.execute("INSERT INTO matching.commands VALUES ($1, 1, $2)", ID, encode(commands[0]).decode())
        await until_matched(pool, 1, seconds=2)
    await assert_log_is(pool, commands)


async def test_a_crash_between_matching_and_commit_loses_and_doubles_nothing(
    pool: Pool, redis: Redis, without_temporal: Settings
) -> None:
    commands = random_commands(1_000, seed=2)
    await append(pool, commands[:500])
    async with running(pool, redis, without_temporal):
        await until_matched(pool, 500)
        settled = [await count(pool, table) for table in ("matching.events", "outbox.messages")]
        # The outbox is written last: by then the book has moved on and events and trades are in the transaction.
        await pool.execute("ALTER TABLE outbox.messages ADD CONSTRAINT broken CHECK (false) NOT VALID")
        await append(pool, commands[500:])
        await asyncio.sleep(0.5)
        assert [await count(pool, table) for table in ("matching.events", "outbox.messages")] == settled
        await pool.execute("ALTER TABLE outbox.messages DROP CONSTRAINT broken")
        await until_matched(pool, 1_000)
    await assert_log_is(pool, commands)


async def test_a_killed_connection_loses_and_doubles_nothing(
    pool: Pool, redis: Redis, without_temporal: Settings
) -> None:
    commands = random_commands(3_000, seed=3)
    async with running(pool, redis, without_temporal):
        for first in range(0, 3_000, 500):
            await append(pool, commands[first : first + 500])
            await pool.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
        await until_matched(pool, 3_000, seconds=20)
    await assert_log_is(pool, commands)


async def test_a_second_engine_waits_for_the_lease_and_takes_over_after_it_expires(
    pool: Pool, redis: Redis, without_temporal: Settings
) -> None:
    commands = random_commands(200, seed=4)
    async with running(pool, redis, without_temporal, "first") as first:
        await append(pool, commands[:100])
        await until_matched(pool, 100)
        async with running(pool, redis, without_temporal, "second"):
            await asyncio.sleep(1)
            assert await owner_of(pool) == "first"
            await kill(first)
            killed_at = time.monotonic()
            await append(pool, commands[100:])
            await until_matched(pool, 200, seconds=LEASE_SECONDS + 3)
            assert await owner_of(pool) == "second"
            assert time.monotonic() - killed_at > LEASE_SECONDS / 2
    await assert_log_is(pool, commands)


async def test_an_idle_engine_keeps_its_lease(pool: Pool, redis: Redis, without_temporal: Settings) -> None:
    async with running(pool, redis, without_temporal):
        await asyncio.sleep(LEASE_SECONDS + 1)
        row = await pool.fetchrow(
            "SELECT epoch, lease_until > now() AS held FROM matching.cursors WHERE instrument_id = $1", ID
        )
        assert row is not None
        assert tuple(row) == (1, True)


async def test_a_stopped_engine_gives_its_lease_to_the_next_at_once(
    pool: Pool, redis: Redis, without_temporal: Settings
) -> None:
    async with running(pool, redis, without_temporal, "first"):
        await append(pool, [new(1, "SELL", 600_000, 5)])
        await until_matched(pool, 1)
    assert await owner_of(pool) is None
    async with running(pool, redis, without_temporal, "second"):
        await append(pool, [new(2, "BUY", 600_000, 5)])
        await until_matched(pool, 2, seconds=2)


async def test_an_engine_with_a_stale_epoch_can_write_nothing(pool: Pool) -> None:
    async with pool.acquire() as conn:
        stale = await leases.take(conn, ID, "a")
        fresh = await leases.take(conn, ID, "a")
        assert stale is not None
        assert fresh is not None
        assert fresh.epoch == stale.epoch + 1
        matcher = Matcher(BTC)
        events = matcher.apply(new(1, "SELL", 600_000, 5)) + matcher.apply(new(2, "BUY", 600_000, 5))
        batch = Batch(command_seq=2, first_seq=1, events=events, causes=[1, 2, 2, 2])
        with pytest.raises(LeaseLostError):
            await write_batch(conn, stale, BTC, batch)
        with pytest.raises(LeaseLostError):
            await leases.renew(conn, stale)
        await leases.release(conn, stale)
        for table in ("matching.events", "matching.trade_tickers", "outbox.messages"):
            assert await count(pool, table) == 0
        await write_batch(conn, fresh, BTC, batch)
    assert await count(pool, "matching.events") == 4
    assert await owner_of(pool) == "a"


async def test_an_engine_that_loses_its_lease_comes_back_only_when_it_is_free(
    pool: Pool, redis: Redis, without_temporal: Settings
) -> None:
    commands = random_commands(200, seed=5)
    async with running(pool, redis, without_temporal):
        await append(pool, commands[:100])
        await until_matched(pool, 100)
        await pool.execute(
            "UPDATE matching.cursors SET owner = 'other', epoch = epoch + 1, lease_until = now() + interval '2 s'"
            " WHERE instrument_id = $1",
            ID,
        )
        await append(pool, commands[100:])
        await asyncio.sleep(1)
        assert await owner_of(pool) == "other"
        await until_matched(pool, 200, seconds=5)
    await assert_log_is(pool, commands)


async def test_subscribers_get_every_event_once_and_in_order(
    pool: Pool, redis: Redis, without_temporal: Settings
) -> None:
    commands = random_commands(500, seed=6)
    async with redis.pubsub() as pubsub:
        await pubsub.subscribe(f"engine:{ID}")
        async with running(pool, redis, without_temporal):
            for first in range(0, 500, 50):
                await append(pool, commands[first : first + 50])
            await until_matched(pool, 500)
            head = await count(pool, "matching.events")
            events: list[object] = []
            while len(events) < head:
                received = await pubsub.get_message(ignore_subscribe_messages=True, timeout=5)
                if received is None:
                    continue
                told = json.loads(received["data"])
                assert (told["instrumentId"], told["firstSeq"]) == (ID, len(events) + 1)
                events += told["events"]
                assert told["lastSeq"] == len(events)
    rows = await pool.fetch("SELECT payload FROM matching.events ORDER BY seq")
    assert events == [json.loads(row["payload"]) for row in rows]


async def test_matching_goes_on_without_redis_and_temporal(pool: Pool, database_url: str) -> None:
    commands = random_commands(500, seed=7)
    nowhere = Settings(database_url=database_url, redis_url=f"redis://{NOWHERE}", temporal_address=NOWHERE)
    async with Redis.from_url(f"redis://{NOWHERE}") as redis, running(pool, redis, nowhere):
        for first in range(0, 500, 100):
            await append(pool, commands[first : first + 100])
            await until_matched(pool, first + 100, seconds=2)
    await assert_log_is(pool, commands)


async def test_settlement_is_signalled_again_only_when_it_may_be_idle_or_lags(
    pool: Pool, redis: Redis, settings: Settings, temporal: Client
) -> None:
    async def signals() -> list[int]:
        history = await temporal.get_workflow_handle(f"settlement-{ID}").fetch_history()
        inputs = [
            event.workflow_execution_signaled_event_attributes.input.payloads[0].data
            for event in history.events
            if event.HasField("workflow_execution_signaled_event_attributes")
        ]
        return [int(data) for data in inputs]

    async def acknowledge(seq: int) -> None:
        await pool.execute(
            "INSERT INTO matching.consumers VALUES ($1, $2, $3)"
            " ON CONFLICT (instrument_id, consumer) DO UPDATE SET acked_seq = excluded.acked_seq",
            ID,
            SETTLEMENT_CONSUMER,
            seq,
        )

    async with running(pool, redis, settings):
        await append(pool, [new(1, "SELL", 600_000, 5)])
        await until_matched(pool, 1)
        await asyncio.sleep(0.4)
        assert await signals() == [1]
        # Settlement has not acknowledged: it will see this event by itself.
        await append(pool, [new(2, "SELL", 600_000, 5)])
        await until_matched(pool, 2)
        await asyncio.sleep(0.2)
        assert await signals() == [1]
        # But it may have died, so it is told again.
        await asyncio.sleep(1)
        assert await signals() == [1, 2]
        await acknowledge(2)
        await asyncio.sleep(1.5)
        assert await signals() == [1, 2]
        await append(pool, [new(3, "SELL", 600_000, 5)])
        await until_matched(pool, 3)
        await asyncio.sleep(0.4)
        assert await signals() == [1, 2, 3]


async def test_a_starting_engine_signals_what_was_left_unsettled(
    pool: Pool, redis: Redis, settings: Settings, without_temporal: Settings, temporal: Client
) -> None:
    async with running(pool, redis, without_temporal):
        await append(pool, [new(1, "SELL", 600_000, 5)])
        await until_matched(pool, 1)
    async with running(pool, redis, settings):

        async def started() -> bool:
            return [w.id async for w in temporal.list_workflows()] == [f"settlement-{ID}"]

        await until(started, 10, "a settlement workflow")


async def test_the_process_matches_its_instruments_and_releases_them_on_sigterm(
    pool: Pool, without_temporal: Settings
) -> None:
    environment = {
        **os.environ,
        "EXCHANGE_DATABASE_URL": without_temporal.require_database_url(),
        "EXCHANGE_REDIS_URL": without_temporal.require_redis_url(),
        "EXCHANGE_TEMPORAL_ADDRESS": without_temporal.require_temporal_address(),
        "EXCHANGE_ENGINE_INSTRUMENTS": f"{ID},SOL-USDT-PERP",
    }
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "engine", cwd=ROOT, env=environment)
    try:
        commands = random_commands(300, seed=8)
        await append(pool, commands)
        await until_matched(pool, 300, seconds=20)
        owned = "SELECT instrument_id FROM matching.cursors WHERE owner IS NOT NULL ORDER BY 1"
        assert [row[0] for row in await pool.fetch(owned)] == [ID, "SOL-USDT-PERP"]
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 10) == 0
        assert await pool.fetch(owned) == []
        await assert_log_is(pool, commands)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()

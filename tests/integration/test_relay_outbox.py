"""The relay on real servers: every committed message reaches its stream, in order, under an id that stays the same."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from pathlib import Path
from typing import cast

import msgspec
import pytest
from redis.asyncio import Redis

from clients import open_redis
from domain.events import FundsFrozen, OrderSubmitted
from monitors import relay
from monitors.relay import run_relay
from settings import Settings
from stack import servers
from storage.db import Pool
from storage.leadership import RELAY_LOCK, STANDBY_SECONDS
from storage.outbox import UserPush, emit
from tests.integration.market_app import eventually
from tests.servers import running

Entry = dict[str, str]


def submitted(order_id: int) -> OrderSubmitted:
    return OrderSubmitted(
        order_id=order_id,
        user_id="7",
        instrument_id="BTC-USDT-PERP",
        side="BUY",
        type="LIMIT",
        price="60000",
        quantity="1",
    )


async def write(pool: Pool, order_ids: Sequence[int]) -> None:
    async with pool.acquire() as conn, conn.transaction():
        await emit(conn, [submitted(order_id) for order_id in order_ids])


async def entries(redis: Redis, topic: str = "order.submitted") -> list[Entry]:
    found = cast(list[tuple[bytes, dict[bytes, bytes]]], await redis.xrange(topic))
    return [{key.decode(): value.decode() for key, value in fields.items()} for _, fields in found]


async def order_ids(redis: Redis) -> list[int]:
    return [msgspec.json.decode(entry["data"])["orderId"] for entry in await entries(redis)]


@asynccontextmanager
async def running_relay(pool: Pool, redis: Redis) -> AsyncIterator[None]:
    stop = asyncio.Event()
    task = asyncio.create_task(run_relay(pool, redis, stop))
    try:
        yield
    finally:
        stop.set()
        await task


async def is_empty(pool: Pool) -> bool:
    return await pool.fetchval("SELECT count(*) = 0 FROM outbox.messages") is True


async def test_each_line_becomes_an_entry_with_its_id_name_time_and_version(pool: Pool, redis: Redis) -> None:
    async with pool.acquire() as conn, conn.transaction():
        frozen = FundsFrozen(order_id=1, user_id="7", asset="USDT", amount="1.5")
        await emit(conn, [submitted(1), submitted(2), frozen], [UserPush(7, "order", {"orderId": 1})])
    rows = {row["topic"]: row for row in await pool.fetch("SELECT * FROM outbox.messages")}
    async with running_relay(pool, redis):
        await eventually(lambda: is_empty(pool))
    first, second = await entries(redis)
    row = rows["order.submitted"]
    assert [first["id"], second["id"]] == [f"{row['message_id']}-0", f"{row['message_id']}-1"]
    assert (first["event"], first["version"]) == ("OrderSubmitted", "1")
    assert abs((datetime.fromisoformat(first["time"]) - row["created_at"]).total_seconds()) < 0.001
    assert msgspec.json.decode(first["data"], type=OrderSubmitted) == submitted(1)
    assert len(await entries(redis, "ledger.funds-frozen")) == 1
    (push,) = await entries(redis, "gateway.user-push")
    assert msgspec.json.decode(push["data"]) == [{"userId": 7, "channel": "order", "data": {"orderId": 1}}]


async def test_a_topic_keeps_its_order_over_many_batches(
    pool: Pool, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay, "BATCH_ROWS_MAX", 7)
    monkeypatch.setattr(relay, "CALL_BYTES_MAX", 1000)
    for start in range(0, 300, 3):
        await write(pool, range(start, start + 3))
    async with running_relay(pool, redis):
        await eventually(lambda: is_empty(pool))
    assert await order_ids(redis) == list(range(300))


async def test_messages_written_while_it_runs_are_relayed_at_once(pool: Pool, redis: Redis) -> None:
    async with running_relay(pool, redis):
        await write(pool, [1])
        await eventually(lambda: is_empty(pool))
        started = asyncio.get_running_loop().time()
        for order_id in range(2, 12):
            await write(pool, [order_id])
            await eventually(lambda: is_empty(pool))
        assert asyncio.get_running_loop().time() - started < 10 * relay.POLL_SECONDS
    assert await order_ids(redis) == list(range(1, 12))


async def test_a_message_without_a_notification_is_found_by_the_poll(pool: Pool, redis: Redis) -> None:
    async with running_relay(pool, redis):
        await asyncio.sleep(0.2)
        await pool.execute("INSERT INTO outbox.messages (topic, name, payload) VALUES ('quiet', 'Quiet', '{}')")
        await eventually(lambda: is_empty(pool))
    assert [entry["data"] for entry in await entries(redis, "quiet")] == ["{}"]


async def test_a_crash_before_the_delete_repeats_the_same_ids(
    pool: Pool, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    await write(pool, [1, 2])
    with monkeypatch.context() as patch:
        patch.setattr(relay, "_DELETE", "SELECT $1::bigint[], 1 / 0")
        with pytest.raises(Exception, match="division by zero"):
            await run_relay(pool, redis, asyncio.Event())
    async with running_relay(pool, redis):
        await eventually(lambda: is_empty(pool))
    ids = [entry["id"] for entry in await entries(redis)]
    assert len(ids) == 4
    assert ids[:2] == ids[2:]
    assert await order_ids(redis) == [1, 2, 1, 2]


async def test_one_relay_works_and_another_takes_over_when_it_goes(pool: Pool, redis: Redis) -> None:
    async with running_relay(pool, redis):
        async with running_relay(pool, redis):
            for order_id in range(50):
                await write(pool, [order_id])
            await eventually(lambda: is_empty(pool))
        assert await order_ids(redis) == list(range(50))
        await write(pool, [50])
        await eventually(lambda: is_empty(pool))
    assert await order_ids(redis) == list(range(51))


async def test_a_relay_that_lost_its_lock_sends_nothing_more(pool: Pool, redis: Redis) -> None:
    async with running_relay(pool, redis):
        holder = await eventually(lambda: _lock_holder(pool))
        async with pool.acquire() as rival:
            await pool.execute("SELECT pg_terminate_backend($1)", holder)
            await rival.execute("SELECT pg_advisory_lock($1)", RELAY_LOCK)
            await write(pool, [1])
            await asyncio.sleep(2 * STANDBY_SECONDS)
            assert await order_ids(redis) == []
            await rival.execute("SELECT pg_advisory_unlock($1)", RELAY_LOCK)
        await eventually(lambda: is_empty(pool))
    assert await order_ids(redis) == [1]


async def test_a_batch_whose_relay_lost_its_lock_is_sent_by_the_next_leader(pool: Pool, redis: Redis) -> None:
    # Redis takes no writes, so the relay hangs in the middle of the batch when its connection is killed.
    async with running_relay(pool, redis):
        await eventually(lambda: _lock_holder(pool))
        await redis.client_pause(60_000, all=False)
        await write(pool, [1])
        await asyncio.sleep(0.3)
        holder = await _lock_holder(pool)
        await pool.execute("SELECT pg_terminate_backend($1)", holder)
        await asyncio.sleep(0.3)
        assert await _lock_holder(pool) != holder
        await redis.client_unpause()
        await eventually(lambda: is_empty(pool))
    assert set(await order_ids(redis)) == {1}


async def _lock_holder(pool: Pool) -> int | None:
    """The backend that holds the relay's lock."""
    pid: int | None = await pool.fetchval(
        "SELECT l.pid FROM pg_locks l JOIN pg_database d ON d.oid = l.database"
        " WHERE l.locktype = 'advisory' AND l.granted AND d.datname = current_database()"
    )
    return pid


async def test_a_redis_outage_delays_and_loses_nothing(pool: Pool, tmp_path: Path) -> None:
    valkey = servers.valkey(tmp_path)
    async with open_redis(Settings(redis_url=valkey.endpoint.url)) as redis, running_relay(pool, redis):
        async with running([valkey], tmp_path):
            await write(pool, [1])
            await eventually(lambda: is_empty(pool))
        await write(pool, [2, 3])
        await asyncio.sleep(0.5)
        assert not await is_empty(pool)
        async with running([valkey], tmp_path):
            await eventually(lambda: is_empty(pool))
            assert await order_ids(redis) == [1, 2, 3]


async def test_a_paused_redis_delays_and_loses_nothing(
    pool: Pool, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay, "REDIS_TIMEOUT_SECONDS", 0.3)
    async with running_relay(pool, redis):
        await redis.client_pause(1_000, all=False)
        await write(pool, range(20))
        await eventually(lambda: is_empty(pool))
    # Attempts that timed out may have arrived: the ids tell which entries are repeats.
    by_id = {entry["id"]: msgspec.json.decode(entry["data"])["orderId"] for entry in await entries(redis)}
    assert list(by_id.values()) == list(range(20))


async def test_a_stream_is_trimmed(pool: Pool, redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "STREAM_LENGTH", 1000)
    for start in range(0, 5000, 500):
        await write(pool, range(start, start + 500))
    async with running_relay(pool, redis):
        await eventually(lambda: is_empty(pool))
    assert 1000 <= await redis.xlen("order.submitted") < 1200
    assert (await order_ids(redis))[-1] == 4999

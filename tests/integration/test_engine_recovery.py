"""What a restarted engine begins with, and what it may forget."""

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis

from domain.matching import AnyCommand, encode
from engine import lease as leases
from engine import snapshots
from engine.main import Engine
from engine.matcher import Matcher
from engine.retention import SNAPSHOTS_KEPT, prune
from engine.snapshots import Snapshot
from settings import Settings
from storage.db import Pool
from tests.engine_commands import random_commands
from tests.engine_log import BTC, append, assert_log_is, until_matched
from tests.waiting import until

ID = BTC.instrument_id
COMMANDS = random_commands(1_000, seed=11)
POSITIONS = "SELECT command_seq FROM matching.snapshots ORDER BY command_seq"


@contextlib.asynccontextmanager
async def engine(pool: Pool, redis: Redis, database_url: str, every: int = 1_000_000) -> AsyncIterator[None]:
    settings = Settings(
        database_url=database_url,
        temporal_address="127.0.0.1:1",
        engine_snapshot_commands=every,
    )
    running = Engine(pool, redis, settings, [BTC], "test")
    task = asyncio.create_task(running.run())
    try:
        yield
    finally:
        running.stop()
        await asyncio.wait_for(task, 10)


async def run_in_parts(pool: Pool, redis: Redis, database_url: str, ends: list[int]) -> None:
    """Match COMMANDS in as many lives of an engine as there are `ends`; each leaves a snapshot behind."""
    start = 0
    for end in ends:
        async with engine(pool, redis, database_url):
            await append(pool, COMMANDS[start:end])
            await until_matched(pool, end)
        start = end


async def test_an_engine_that_stops_leaves_a_snapshot_so_that_the_next_has_nothing_to_replay(
    pool: Pool, redis: Redis, database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    await run_in_parts(pool, redis, database_url, [600])
    await pool.execute("DELETE FROM matching.commands")
    caplog.set_level("INFO")
    async with engine(pool, redis, database_url):
        await append(pool, COMMANDS[600:])
        await until_matched(pool, 1_000)
    assert "rebuilt from the snapshot at command 600" in caplog.text
    await assert_log_is(pool, COMMANDS)


async def test_an_engine_that_dies_goes_on_from_its_last_periodic_snapshot(
    pool: Pool, redis: Redis, database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    settings = Settings(database_url=database_url, temporal_address="127.0.0.1:1", engine_snapshot_commands=100)
    dying = asyncio.create_task(Engine(pool, redis, settings, [BTC], "test").run())

    async def snapshot_written() -> bool:
        return bool(await pool.fetch(POSITIONS))

    await append(pool, COMMANDS[:150])
    await until(snapshot_written, 5, "a snapshot")
    await append(pool, COMMANDS[150:200])
    await until_matched(pool, 200)
    dying.cancel()
    await asyncio.wait([dying])
    async with engine(pool, redis, database_url):
        await append(pool, COMMANDS[200:])
        await until_matched(pool, 1_000)
    assert "rebuilt from the snapshot at command 150" in caplog.text
    await assert_log_is(pool, COMMANDS)


BAD = {
    "damaged": ("UPDATE matching.snapshots SET payload = payload || '\\x00' WHERE command_seq = 700", ()),
    "of another version": ("UPDATE matching.snapshots SET version = 1000000 WHERE command_seq = 700", ()),
    "undecodable": (
        "UPDATE matching.snapshots SET payload = $1, checksum = $2 WHERE command_seq = 700",
        (b"nonsense", hashlib.sha256(b"nonsense").digest()),
    ),
    "not of the seq it says": ("UPDATE matching.snapshots SET event_seq = event_seq + 1 WHERE command_seq = 700", ()),
    "missing": ("DELETE FROM matching.snapshots WHERE command_seq = 700", ()),
}


@pytest.mark.parametrize("fault", BAD)
async def test_a_bad_snapshot_is_reported_and_an_older_one_used(
    pool: Pool, redis: Redis, database_url: str, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    await run_in_parts(pool, redis, database_url, [400, 700])
    statement, values = BAD[fault]
    await pool.execute(statement, *values)
    caplog.clear()
    caplog.set_level("INFO")
    async with engine(pool, redis, database_url):
        await append(pool, COMMANDS[700:])
        await until_matched(pool, 1_000)
    assert ("snapshot at command 700 is of no use" in caplog.text) == (fault != "missing")
    assert "rebuilt from the snapshot at command 400" in caplog.text
    await assert_log_is(pool, COMMANDS)


async def test_a_snapshot_that_leads_to_other_events_than_those_written_is_not_used(
    pool: Pool, redis: Redis, database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    await run_in_parts(pool, redis, database_url, [400, 700])
    # In good form, at the right event, but of an empty book.
    matcher = Matcher(BTC)
    matcher.event_seq = await pool.fetchval("SELECT event_seq FROM matching.snapshots WHERE command_seq = 400")
    payload = matcher.dump()
    await pool.execute("DELETE FROM matching.snapshots WHERE command_seq = 700")
    await pool.execute(
        "UPDATE matching.snapshots SET payload = $1, checksum = $2", payload, hashlib.sha256(payload).digest()
    )
    caplog.set_level("INFO")
    async with engine(pool, redis, database_url):
        await append(pool, COMMANDS[700:])
        await until_matched(pool, 1_000)
    assert "snapshot at command 400 is of no use: Expected" in caplog.text
    assert "rebuilt from the whole log" in caplog.text
    await assert_log_is(pool, COMMANDS)


async def test_without_a_good_snapshot_the_whole_log_is_replayed(
    pool: Pool, redis: Redis, database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    await run_in_parts(pool, redis, database_url, [400, 700])
    await pool.execute("UPDATE matching.snapshots SET checksum = '\\x00'")
    caplog.set_level("INFO")
    async with engine(pool, redis, database_url):
        await append(pool, COMMANDS[700:])
        await until_matched(pool, 1_000)
    assert caplog.text.count("is of no use: Expected checksum") == 2
    assert "rebuilt from the whole log" in caplog.text
    await assert_log_is(pool, COMMANDS)


async def test_an_engine_that_cannot_reproduce_the_events_matches_nothing(
    pool: Pool, redis: Redis, database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    await run_in_parts(pool, redis, database_url, [400])
    await pool.execute("DELETE FROM matching.snapshots")
    await pool.execute("UPDATE matching.events SET payload = replace(payload::text, 'B', 'C')::json WHERE seq = 100")
    async with engine(pool, redis, database_url):
        await append(pool, COMMANDS[400:])

        async def refused() -> bool:
            return "Expected event 100 to be" in caplog.text

        await until(refused, 5, "the refusal")
    assert await pool.fetchval("SELECT command_seq FROM matching.cursors WHERE instrument_id = $1", ID) == 400


async def everything_was_applied(pool: Pool) -> None:
    """All who read the log have read it up to the end, and a market could restart there."""
    head = await pool.fetchval("SELECT event_seq FROM matching.cursors WHERE instrument_id = $1", ID)
    for service in ("risk", "ledger", "orders", "positions"):
        await pool.execute(f"UPDATE {service}.cursors SET applied_seq = $1", head)
    await pool.execute("UPDATE positions.cursors SET confirmed_seq = $1", head)
    await pool.execute("INSERT INTO matching.consumers VALUES ($1, 'settlement', $2)", ID, head)
    await pool.execute(
        "INSERT INTO market.kline_buckets VALUES ($1, '1d', now(), 1, 1, 1, 1, 0, 0, $2, FALSE)", ID, head
    )
    for seq in (head - 1, head):
        await pool.execute(
            "INSERT INTO market.checkpoints VALUES ($1, $2, 1, $3, $4)", ID, seq, hashlib.sha256(b"").digest(), b""
        )


async def pruned_after_three_lives(pool: Pool, redis: Redis, database_url: str) -> int:
    """An engine's log of 700 commands without what nobody needs; up to which event it was deleted."""
    await run_in_parts(pool, redis, database_url, [300, 500, 700])
    await everything_was_applied(pool)
    async with pool.acquire() as conn:
        await prune(conn, leases.Lease(ID, 0, 0, 0), events_kept=0)
    first = await pool.fetchval("SELECT min(seq) FROM matching.events")
    assert first == 1 + await pool.fetchval("SELECT min(event_seq) FROM matching.snapshots") > 100
    assert await pool.fetchval("SELECT min(seq) FROM matching.commands") == 301
    return int(first) - 1


async def test_an_engine_goes_on_with_a_log_whose_beginning_is_gone(
    pool: Pool, redis: Redis, database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    pruned_seq = await pruned_after_three_lives(pool, redis, database_url)
    await pool.execute("UPDATE matching.snapshots SET version = 1000000 WHERE command_seq > 300")
    caplog.set_level("INFO")
    async with engine(pool, redis, database_url):
        await append(pool, COMMANDS[700:])
        await until_matched(pool, 1_000)
    assert "rebuilt from the snapshot at command 300" in caplog.text
    straight = Matcher(BTC)
    expected = [encode(event).decode() for command in COMMANDS for event in straight.apply(command)]
    rows = await pool.fetch("SELECT seq, payload FROM matching.events ORDER BY seq")
    assert [tuple(row) for row in rows] == list(enumerate(expected[pruned_seq:], pruned_seq + 1))


@pytest.mark.parametrize("damage", ["DELETE FROM matching.snapshots", "UPDATE matching.snapshots SET checksum = ''"])
async def test_an_engine_without_snapshots_refuses_a_log_whose_beginning_is_gone(
    pool: Pool, redis: Redis, database_url: str, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    pruned_seq = await pruned_after_three_lives(pool, redis, database_url)
    await pool.execute(damage)
    async with engine(pool, redis, database_url):
        await append(pool, COMMANDS[700:])

        async def refused() -> bool:
            return "stopped by a defect" in caplog.text

        await until(refused, 5, "the refusal")
    assert f"was commands from 301 on and events deleted up to {pruned_seq}" in caplog.text
    assert await pool.fetchval("SELECT command_seq FROM matching.cursors WHERE instrument_id = $1", ID) == 700


async def test_each_snapshot_is_followed_by_pruning(pool: Pool, redis: Redis, database_url: str) -> None:
    await run_in_parts(pool, redis, database_url, [300, 500, 700])
    await everything_was_applied(pool)
    settings = Settings(
        database_url=database_url,
        temporal_address="127.0.0.1:1",
        engine_snapshot_commands=100,
        event_retention_count=100,
    )
    running = Engine(pool, redis, settings, [BTC], "test")
    task = asyncio.create_task(running.run())
    await append(pool, COMMANDS[700:900])

    async def pruned() -> bool:
        return bool(await pool.fetchval("SELECT event_seq FROM matching.pruned WHERE instrument_id = $1", ID))

    await until(pruned, 5, "the pruning")
    running.stop()
    await asyncio.wait_for(task, 10)
    assert await pool.fetchval("SELECT min(seq) FROM matching.commands") == 501


async def save_snapshots(pool: Pool, command_seqs: list[int]) -> leases.Lease:
    """Snapshots of whatever; COMMANDS are in the log."""
    await append(pool, COMMANDS)
    async with pool.acquire() as conn:
        lease = await leases.take(conn, ID, "test")
        assert lease is not None
        for seq in command_seqs:
            await snapshots.save(conn, lease, Snapshot(seq, 0, bytes(seq)))
    return lease


async def seqs(pool: Pool, query: str) -> list[int]:
    return [row[0] for row in await pool.fetch(query)]


async def test_the_newest_snapshots_and_the_commands_after_the_oldest_of_them_are_kept(pool: Pool) -> None:
    lease = await save_snapshots(pool, [100, 200, 300, 400])
    async with pool.acquire() as conn:
        await prune(conn, lease, 0)
    assert await seqs(pool, POSITIONS) == [200, 300, 400]
    assert len([200, 300, 400]) == SNAPSHOTS_KEPT
    assert await seqs(pool, "SELECT seq FROM matching.commands ORDER BY seq") == list(range(201, 1_001))


@pytest.mark.parametrize("damage", ["DELETE FROM matching.snapshots WHERE command_seq = 200", BAD["damaged"][0]])
async def test_no_command_is_deleted_while_snapshots_are_few_or_damaged(pool: Pool, damage: str) -> None:
    lease = await save_snapshots(pool, [200, 400, 700])
    await pool.execute(damage)
    async with pool.acquire() as conn:
        await prune(conn, lease, 0)
    assert await pool.fetchval("SELECT count(*) FROM matching.commands") == len(COMMANDS)


async def test_an_engine_without_the_lease_writes_no_snapshot(pool: Pool) -> None:
    stale = await save_snapshots(pool, [])
    async with pool.acquire() as conn:
        await leases.take(conn, ID, "test")
        await snapshots.save(conn, stale, Snapshot(100, 0, b"late"))
    assert await seqs(pool, POSITIONS) == []


def test_the_test_commands_leave_orders_in_the_book() -> None:
    matcher = Matcher(BTC)
    commands: list[AnyCommand] = COMMANDS[:400]
    for command in commands:
        matcher.apply(command)
    assert len(matcher.book.orders) > 10

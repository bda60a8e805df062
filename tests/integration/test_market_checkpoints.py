"""A market that starts again: from its newest good checkpoint, without the events before it."""

import asyncio
import hashlib
import json
import os
import signal
import sys
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from redis.asyncio import Redis

from domain.instruments import SHIPPED
from domain.matching import AnyEvent
from market import checkpoints
from market.checkpoints import (
    CHECKPOINTS_KEPT,
    SNAPSHOTS_KEPT,
    Checkpointer,
    LogPrunedError,
    record,
    restore,
    restore_markets,
    save,
)
from market.instrument_market import InstrumentMarket
from settings import Settings
from storage.db import Pool
from tests.engine_commands import any_commands
from tests.integration.market_app import BTC, ETH, SOL, EngineLog, eventually, placed, running_market, trade
from tests.reference_book import ReferenceMatcher
from tests.servers import ROOT

INSTRUMENT = SHIPPED[0]
SEQS = "SELECT seq FROM market.checkpoints WHERE instrument_id = $1 ORDER BY seq"


@pytest.fixture
def market_settings(database_url: str, redis_url: str) -> Settings:
    return Settings(database_url=database_url, redis_url=redis_url, mark_price_interval_seconds=60)


@pytest.fixture
def engine(pool: Pool, redis: Redis) -> EngineLog:
    return EngineLog(pool, redis)


@pytest.fixture
def events() -> list[AnyEvent]:
    matcher = ReferenceMatcher(INSTRUMENT)
    return [event for command in any_commands(400, 3) for event in matcher.apply(command)]


async def published(redis: Redis, seq: int) -> dict[str, Any]:
    """Depth and trades of BTC once they include event `seq`."""

    async def read() -> dict[str, Any] | None:
        found = {name: json.loads(await redis.get(f"market:{name}:{BTC}") or "{}") for name in ("depth", "trades")}
        return found if found["depth"].get("seq", -1) >= seq else None

    documents = await eventually(read)
    return {name: document["data"] for name, document in documents.items()}


async def saved_at(pool: Pool, events: list[AnyEvent], *seqs: int) -> None:
    """Checkpoints after each of `seqs`."""
    market = InstrumentMarket(INSTRUMENT)
    async with pool.acquire() as conn:
        for seq in seqs:
            market.apply(market.seq + 1, events[market.seq : seq])
            assert await save(conn, market) == seq


async def test_a_market_that_was_stopped_goes_on_without_the_events_it_had_seen(
    pool: Pool, redis: Redis, engine: EngineLog, market_settings: Settings, events: list[AnyEvent]
) -> None:
    half = len(events) // 2
    await engine.append(BTC, events[:half])
    async with running_market(pool, redis, market_settings):
        await published(redis, half)
    assert [row[0] for row in await pool.fetch(SEQS, BTC)] == [half]
    await pool.execute("DELETE FROM matching.events")
    await redis.flushall()
    await engine.append(BTC, events[half:])
    async with running_market(pool, redis, market_settings):
        restarted = await published(redis, len(events))
    whole = InstrumentMarket(INSTRUMENT)
    whole.apply(1, events)
    keys = whole.take_publication(0).keys
    assert restarted == {name: json.loads(keys[f"market:{name}:{BTC}"])["data"] for name in restarted}
    newest = await pool.fetchval("SELECT payload FROM market.checkpoints ORDER BY seq DESC LIMIT 1")
    assert InstrumentMarket.load(INSTRUMENT, newest).book.orders == whole.book.orders


async def test_a_process_that_was_killed_goes_on_from_the_checkpoint_of_the_one_before(
    pool: Pool, redis: Redis, engine: EngineLog, database_url: str, redis_url: str, events: list[AnyEvent]
) -> None:
    third = len(events) // 3
    ends = [third, 2 * third, len(events)]
    for start, end, last_signal in zip(
        [0, *ends], ends, [signal.SIGTERM, signal.SIGKILL, signal.SIGTERM], strict=False
    ):
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "market",
            cwd=ROOT,
            env=os.environ | {"EXCHANGE_DATABASE_URL": database_url, "EXCHANGE_REDIS_URL": redis_url},
        )
        try:
            await published(redis, start)
            await engine.append(BTC, events[start:end])
            seen = await published(redis, end)
        finally:
            process.send_signal(last_signal)
            await asyncio.wait_for(process.wait(), 10)
        await redis.flushall()
        await pool.execute("DELETE FROM matching.events WHERE seq <= $1", third)
    saved = [row[0] for row in await pool.fetch(SEQS, BTC)]
    assert (saved[0], saved[-1]) == (third, len(events))
    whole = InstrumentMarket(INSTRUMENT)
    whole.apply(1, events)
    keys = whole.take_publication(0).keys
    assert seen == {name: json.loads(keys[f"market:{name}:{BTC}"])["data"] for name in seen}


async def test_an_instrument_that_cannot_be_rebuilt_holds_up_no_other(
    pool: Pool, redis: Redis, engine: EngineLog, market_settings: Settings, events: list[AnyEvent]
) -> None:
    await engine.append(BTC, events)
    await pool.execute("INSERT INTO matching.pruned (instrument_id, event_seq) VALUES ($1, 50)", BTC)
    async with running_market(pool, redis, market_settings):
        await engine.append(BTC, [placed(1, "BUY", 600_000, 5)])
        await engine.append(ETH, [placed(1, "BUY", 300_000, 5)])

        async def depth_of_eth() -> bool:
            return b'["3000","0.005"]' in (await redis.get(f"market:depth:{ETH}") or b"")

        await eventually(depth_of_eth)
        assert await redis.get(f"market:depth:{BTC}") is None
        assert await redis.get(f"market:mark:{BTC}") is None
    assert await pool.fetch(SEQS, BTC) == []


async def test_a_market_that_does_not_move_is_saved_once_and_recorded_each_time(
    pool: Pool, engine: EngineLog, events: list[AnyEvent]
) -> None:
    market = InstrumentMarket(INSTRUMENT)
    checkpointer = Checkpointer(pool, {BTC: market})
    now = datetime(2026, 1, 2, tzinfo=UTC)
    await checkpointer.save(now)
    assert await pool.fetch(SEQS, BTC) == []
    market.apply(1, events)
    await checkpointer.save(now)
    await pool.execute("DELETE FROM market.checkpoints")
    await checkpointer.save(now)
    assert await pool.fetch(SEQS, BTC) == []
    assert await pool.fetchval("SELECT count(*) FROM market.market_snapshots") == 3


async def test_the_newest_checkpoints_are_kept(pool: Pool, events: list[AnyEvent]) -> None:
    await saved_at(pool, events, 10, 20, 30, 40, 50)
    assert [row[0] for row in await pool.fetch(SEQS, BTC)] == [30, 40, 50]
    assert len([30, 40, 50]) == CHECKPOINTS_KEPT


BAD = {
    "damaged": ("UPDATE market.checkpoints SET payload = payload || '\\x00' WHERE seq = 70", ()),
    "of another version": ("UPDATE market.checkpoints SET version = 1000000 WHERE seq = 70", ()),
    "undecodable": (
        "UPDATE market.checkpoints SET payload = $1, checksum = $2 WHERE seq = 70",
        (b"nonsense", hashlib.sha256(b"nonsense").digest()),
    ),
    "not of the seq it says": ("UPDATE market.checkpoints SET seq = 71 WHERE seq = 70", ()),
}


@pytest.mark.parametrize("fault", BAD)
async def test_a_bad_checkpoint_is_reported_and_an_older_one_used(
    pool: Pool, engine: EngineLog, events: list[AnyEvent], caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    await engine.append(BTC, events)
    await saved_at(pool, events, 40, 70)
    statement, values = BAD[fault]
    await pool.execute(statement, *values)
    assert (await restore(pool, INSTRUMENT)).seq == 40
    assert "is of no use: " in caplog.text


async def test_without_a_good_checkpoint_a_whole_log_is_read(
    pool: Pool, engine: EngineLog, events: list[AnyEvent], caplog: pytest.LogCaptureFixture
) -> None:
    await engine.append(BTC, events)
    await saved_at(pool, events, 40, 70)
    await pool.execute("UPDATE market.checkpoints SET checksum = '\\x00'")
    assert (await restore(pool, INSTRUMENT)).seq == 0
    assert caplog.text.count("is of no use: Expected checksum") == 2


async def test_without_a_good_checkpoint_and_the_first_events_there_is_no_market_rather_than_a_wrong_one(
    pool: Pool, engine: EngineLog, events: list[AnyEvent], caplog: pytest.LogCaptureFixture
) -> None:
    await engine.append(BTC, events)
    await saved_at(pool, events, 40, 70)
    await pool.execute("INSERT INTO matching.pruned (instrument_id, event_seq) VALUES ($1, 50)", BTC)
    await pool.execute("UPDATE market.checkpoints SET checksum = '\\x00' WHERE seq = 70")
    with pytest.raises(LogPrunedError, match="events up to 50 are deleted"):
        await restore(pool, INSTRUMENT)
    assert (await restore_markets(pool, SHIPPED)).keys() == {ETH, SOL}
    assert f"ALERT no market data for {BTC}" in caplog.text


async def test_a_checkpoint_ahead_of_the_log_is_not_used(pool: Pool, engine: EngineLog, events: list[AnyEvent]) -> None:
    await engine.append(BTC, events[:50])
    await saved_at(pool, events, 40, 70)
    assert (await restore(pool, INSTRUMENT)).seq == 40


async def test_the_history_has_depth_price_and_volume_and_ends_after_a_while(pool: Pool) -> None:
    market = InstrumentMarket(INSTRUMENT)
    market.apply(1, [placed(1, "BUY", 600_000, 5), placed(2, "SELL", 600_010, 7), trade(1, 1, 600_000, 2, 3)])
    now = datetime.now(UTC)
    async with pool.acquire() as conn:
        await record(conn, {BTC: market}, now - SNAPSHOTS_KEPT - timedelta(seconds=1))
        await record(conn, {BTC: market}, now - SNAPSHOTS_KEPT + timedelta(seconds=1))
        await record(conn, {BTC: market}, now)
    rows = await pool.fetch("SELECT * FROM market.market_snapshots ORDER BY created_at")
    assert [row["created_at"] for row in rows] == [now - SNAPSHOTS_KEPT + timedelta(seconds=1), now]
    assert json.loads(rows[-1]["bid_depth"]) == [["60000", "0.003"]]
    assert json.loads(rows[-1]["ask_depth"]) == [["60001", "0.007"]]
    assert (rows[-1]["instrument_id"], rows[-1]["seq"]) == (BTC, 3)
    assert (rows[-1]["last_price"], rows[-1]["volume_24h"]) == (Decimal(60_000), Decimal("0.002"))


async def test_an_outage_is_waited_out(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    async def away(*_: object) -> None:
        raise ConnectionRefusedError

    monkeypatch.setattr(checkpoints, "record", away)
    await Checkpointer(pool, {}).finish()

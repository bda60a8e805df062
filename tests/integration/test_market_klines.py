"""Klines of the real market process: from the tape into the table, on the event bus, over REST and on sockets."""

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from datetime import datetime
from decimal import Decimal
from typing import Any

import msgspec
import pytest
from redis.asyncio import Redis
from redis.exceptions import RedisError
from websockets.asyncio.client import ClientConnection, connect

from api.routes.market_history import KlineResponse
from domain.clock import from_ms, iso
from domain.money import plain
from domain.periods import PERIODS_MS
from market import kline_feed
from market.kline_feed import RECENT_KLINES, KlineFeed
from market.kline_store import KEPT_MS, delete_old, read_positions, read_trades
from market.klines import CLOSE_GRACE_MS, Kline
from settings import Settings
from storage.db import OUTAGES, Pool
from tests.integration.identity_app import Exchange, complete, running_exchange
from tests.integration.market_app import BTC, ETH, SOL, EngineLog, eventually, now_ms, placed, running_market, trade
from tests.integration.socket_app import running_api
from tests.unit.test_market_klines import recomputed

Document = dict[str, Any]
MINUTE = PERIODS_MS["1m"]


@pytest.fixture
def market_settings(database_url: str, redis_url: str) -> Settings:
    return Settings(database_url=database_url, redis_url=redis_url)


@pytest.fixture
def engine(pool: Pool, redis: Redis) -> EngineLog:
    return EngineLog(pool, redis)


@pytest.fixture
async def exchange(settings: Settings) -> AsyncIterator[Exchange]:
    async with running_exchange(complete(settings, settings.state_dir)) as exchange:
        yield exchange


def trades_at(times: Sequence[int], seed: int = 1) -> list[Any]:
    dice = random.Random(seed)
    return [trade(n, 1, dice.randint(599_000, 601_000), dice.randint(1, 9), 1, at) for n, at in enumerate(times, 1)]


async def stored(pool: Pool, period: str, instrument_id: str = BTC) -> list[Kline]:
    rows = await pool.fetch(
        "SELECT (extract(epoch FROM open_time) * 1000)::bigint AS open_ms, open, high, low, close, volume, trade_count,"
        " last_seq, closed FROM market.kline_buckets WHERE instrument_id = $1 AND period = $2 ORDER BY open_time",
        instrument_id,
        period,
    )
    return [Kline(**dict(row)) for row in rows]


async def assert_klines_are_those_of_the_tape(pool: Pool, instrument_id: str = BTC) -> None:
    async with pool.acquire() as conn:
        tape = (await read_trades(conn, {instrument_id: 0}, 100_000))[instrument_id]
    for period, period_ms in PERIODS_MS.items():
        klines = await stored(pool, period, instrument_id)
        # The clock moves on meanwhile: up to the time at which the table stands.
        now = klines[-1].open_ms
        expected = recomputed(tape, period_ms, now)
        assert [(k.open_ms, k.open, k.high, k.low, k.close, k.volume, k.trade_count, k.last_seq) for k in klines] == [
            (k.open_ms, k.open, k.high, k.low, k.close, k.volume, k.trade_count, k.last_seq) for k in expected
        ]


async def counted(pool: Pool, seq: int, instrument_id: str = BTC) -> None:
    async def done() -> bool:
        async with pool.acquire() as conn:
            return (await read_positions(conn, [instrument_id]))[instrument_id] >= seq

    await eventually(done)


async def announced(pool: Pool) -> list[Document]:
    """All KlineClosed events, in their order."""
    rows = await pool.fetch("SELECT payload FROM outbox.messages WHERE topic = 'market.kline' ORDER BY message_id")
    return [msgspec.json.decode(line) for row in rows for line in row["payload"].split("\n")]


async def test_klines_equal_a_recomputation_from_the_tape_across_restarts(
    pool: Pool, redis: Redis, engine: EngineLog, market_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kline_feed, "PAGE_TRADES_MAX", 7)
    dice, start = random.Random(3), now_ms() - 40 * MINUTE
    # In the order of the log, but not quite of the clock; the last ones now.
    times = [start + n * 24_000 + dice.randint(-90_000, 0) for n in range(100)] + [now_ms()] * 5
    await engine.append(BTC, [placed(1, "BUY", 600_000, 10_000)])
    trades, seq = trades_at(times), 1
    while trades:
        size = dice.randint(1, 40)
        await engine.append(BTC, trades[:size], hint=False)
        seq += len(trades[:size])
        trades = trades[size:]
        async with running_market(pool, redis, market_settings):
            # Stopped anywhere in between, but for the last time.
            await (asyncio.sleep(dice.random() * 0.4) if trades else counted(pool, seq))
    await assert_klines_are_those_of_the_tape(pool)
    closed = [(k.open_ms, period) for period in PERIODS_MS for k in await stored(pool, period) if k.closed]
    events = Counter((event["timestamp"], event["period"]) for event in await announced(pool))
    assert events == Counter((iso(from_ms(open_ms)), period) for open_ms, period in closed)


async def test_two_processes_that_both_believe_to_lead_count_nothing_twice(
    pool: Pool, redis: Redis, engine: EngineLog
) -> None:
    start = now_ms() // MINUTE * MINUTE - 10 * MINUTE
    first, second = (KlineFeed(pool, redis, [BTC]) for _ in range(2))
    for step in range(8):
        now = start + step * 40_000
        await engine.append(BTC, trades_at([now - 70_000, now - 100, now], seed=step), hint=False)
        await asyncio.gather(first.update(now), second.update(now))
        if step % 3:
            await first.update(now + 20_000)
    await assert_klines_are_those_of_the_tape(pool)
    events = Counter((event["timestamp"], event["period"]) for event in await announced(pool))
    assert set(events.values()) == {1}


async def test_a_bucket_closes_once_and_a_late_trade_amends_it_without_closing_it_again(
    pool: Pool, redis: Redis, engine: EngineLog
) -> None:
    start = now_ms() // MINUTE * MINUTE
    klines = KlineFeed(pool, redis, [BTC, ETH])
    await engine.append(BTC, [trade(1, 1, 600_000, 2, 0, start + 5)], hint=False)
    await klines.update(start + 10)
    assert [k.closed for k in await stored(pool, "1m")] == [False]
    await klines.update(start + MINUTE + CLOSE_GRACE_MS)
    assert [(k.trade_count, k.closed) for k in await stored(pool, "1m")] == [(1, True), (0, False)]
    assert [event for event in await announced(pool) if event["period"] == "1m"] == [
        {"instrumentId": BTC, "period": "1m", "open": "60000", "high": "60000", "low": "60000", "close": "60000"}
        | {"volume": "0.002", "timestamp": iso(from_ms(start))}
    ]
    await engine.append(BTC, [trade(2, 1, 610_000, 1, 0, start + 50)], hint=False)
    await klines.update(start + MINUTE + CLOSE_GRACE_MS + 1)
    assert [(plain(k.close), k.trade_count, k.closed) for k in await stored(pool, "1m")] == [
        ("61000", 2, True),
        ("61000", 0, False),
    ]
    assert [event["period"] for event in await announced(pool)].count("1m") == 1


async def test_a_trade_older_than_what_is_at_hand_amends_what_is_stored(
    pool: Pool, redis: Redis, engine: EngineLog
) -> None:
    now = now_ms()
    start = now - (RECENT_KLINES + 30) * MINUTE
    klines = KlineFeed(pool, redis, [BTC])
    await engine.append(BTC, trades_at([start, start + 1, now]), hint=False)
    await klines.update(now)
    await engine.append(BTC, trades_at([start + 2], seed=2), hint=False)
    await klines.update(now)
    await assert_klines_are_those_of_the_tape(pool)


async def test_an_outage_of_redis_does_not_stop_the_table_and_publishes_afterwards(
    pool: Pool, redis: Redis, engine: EngineLog
) -> None:
    klines = KlineFeed(pool, Redis(port=1), [BTC])
    await engine.append(BTC, trades_at([now_ms()]), hint=False)
    with pytest.raises(RedisError):
        await klines.update(now_ms())
    assert len(await stored(pool, "1m")) == 1
    await assert_klines_are_those_of_the_tape(pool)


async def test_lost_connections_and_an_emptied_redis_only_delay(
    pool: Pool, redis: Redis, engine: EngineLog, market_settings: Settings
) -> None:
    await engine.append(BTC, [placed(1, "BUY", 600_000, 10_000), *trades_at([now_ms() - MINUTE])])
    async with running_market(pool, redis, market_settings):
        await counted(pool, 2)
        await eventually(lambda: redis.get(f"market:kline:1m:{BTC}"))
        await pool.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        await redis.flushall()
        await redis.client_kill_filter(_type="pubsub")
        async with asyncio.timeout(10):
            while True:
                with contextlib.suppress(*OUTAGES):
                    await engine.append(BTC, trades_at([now_ms()], seed=2), hint=False)
                    break
        await counted(pool, 3)

        async def published() -> bool:
            return b'"seq":3' in (await redis.get(f"market:kline:1d:{BTC}") or b"")

        await eventually(published)
        await eventually(lambda: redis.get(f"market:kline:1m:{SOL}"))
    await assert_klines_are_those_of_the_tape(pool)


async def test_old_klines_are_deleted_and_days_are_kept(pool: Pool, redis: Redis, engine: EngineLog) -> None:
    now = now_ms()
    old = now - KEPT_MS["4h"] - PERIODS_MS["1d"]
    await engine.append(BTC, trades_at([now - KEPT_MS["1m"] + MINUTE]), hint=False)
    await KlineFeed(pool, redis, [BTC]).update(now)
    await pool.execute(
        "INSERT INTO market.kline_buckets SELECT instrument_id, period, $1, open, high, low, close, volume,"
        " trade_count, 0, TRUE FROM market.kline_buckets WHERE open_time = (SELECT min(open_time)"
        " FROM market.kline_buckets b WHERE b.period = kline_buckets.period)",
        from_ms(old),
    )
    async with pool.acquire() as conn:
        assert await delete_old(conn, [BTC], now) == len(KEPT_MS)
        left = await conn.fetch("SELECT period FROM market.kline_buckets WHERE open_time = $1", from_ms(old))
    assert [row["period"] for row in left] == ["1d"]


@pytest.fixture
async def hour(pool: Pool, redis: Redis, engine: EngineLog) -> int:
    """Three minutes of klines, one of them flat; the beginning of the first."""
    start = now_ms() // MINUTE * MINUTE - 2 * MINUTE
    await engine.append(BTC, [trade(1, 1, 600_000, 2, 0, start + 5), trade(2, 1, 600_010, 1, 0, start + 2 * MINUTE)])
    await KlineFeed(pool, redis, [BTC]).update(start + 2 * MINUTE + 2_000)
    return start


async def get(exchange: Exchange, query: str) -> list[Document]:
    response = await exchange.client.get(f"/api/market/kline?{query}")
    assert response.status_code == 200, response.text
    documents: list[Document] = response.json()
    return documents


async def test_klines_are_listed_oldest_first_with_the_open_one(exchange: Exchange, hour: int) -> None:
    items = await get(exchange, f"symbol={BTC}&period=1m")
    assert items[0] == {
        "openTime": iso(from_ms(hour)),
        "closeTime": iso(from_ms(hour + MINUTE)),
        "open": "60000",
        "high": "60000",
        "low": "60000",
        "close": "60000",
        "volume": "0.002",
        "tradeCount": 1,
        "closed": True,
    }
    klines = [KlineResponse.model_validate(item) for item in items]
    assert [(kline.trade_count, kline.closed) for kline in klines] == [(1, True), (0, True), (1, False)]
    assert await get(exchange, f"instrumentId={BTC}&period=1m") == items
    assert await get(exchange, f"symbol={ETH}&period=1m") == []


async def test_klines_are_found_by_time_in_either_form(exchange: Exchange, hour: int) -> None:
    items = await get(exchange, f"symbol={BTC}&period=1m")
    head = f"symbol={BTC}&period=1m"
    assert await get(exchange, f"{head}&startTime={hour + MINUTE}") == items[1:]
    assert await get(exchange, f"{head}&start_time={iso(from_ms(hour + MINUTE))}") == items[1:]
    assert await get(exchange, f"{head}&endTime={hour + MINUTE}") == items[:2]
    assert await get(exchange, f"{head}&startTime={hour + 1}&endTime={hour + MINUTE}") == items[1:2]
    assert await get(exchange, f"{head}&limit=2") == items[1:]
    assert await get(exchange, f"{head}&limit=2&startTime={hour}") == items[:2]
    naive = datetime.fromisoformat(iso(from_ms(hour))).replace(tzinfo=None).isoformat()
    assert await get(exchange, f"{head}&startTime={naive}") == items


async def test_only_closed_klines_of_a_fixed_time_are_cached_for_longer(exchange: Exchange, hour: int) -> None:
    head = f"/api/market/kline?symbol={BTC}&period=1m"
    past = await exchange.client.get(f"{head}&endTime={hour}")
    assert past.headers["cache-control"] == "public, max-age=60"
    for query in ("", f"&endTime={hour + 2 * MINUTE}", f"&startTime={hour + 99 * MINUTE}"):
        assert (await exchange.client.get(head + query)).headers["cache-control"] == "public, max-age=1"


@pytest.mark.parametrize(
    ("query", "status", "code"),
    [
        ("symbol=DOGE&period=1m", 404, "INSTRUMENT_NOT_FOUND"),
        (f"symbol={BTC}&period=2m", 422, "VALIDATION_FAILED"),
        (f"symbol={BTC}", 422, "VALIDATION_FAILED"),
        ("period=1m", 422, "VALIDATION_FAILED"),
        (f"symbol={BTC}&period=1m&limit=0", 422, "VALIDATION_FAILED"),
        (f"symbol={BTC}&period=1m&limit=1501", 422, "VALIDATION_FAILED"),
        (f"symbol={BTC}&period=1m&startTime=yesterday", 422, "VALIDATION_FAILED"),
        (f"symbol={BTC}&period=1m&startTime=0001-01-01T00:00:00Z", 422, "VALIDATION_FAILED"),
        (f"symbol={BTC}&period=1m&startTime=1700000000000&endTime=1600000000000", 422, "VALIDATION_FAILED"),
        ("symbol=%00&period=1m", 422, "VALIDATION_FAILED"),
    ],
)
async def test_what_cannot_be_answered_is_refused(exchange: Exchange, query: str, status: int, code: str) -> None:
    response = await exchange.client.get(f"/api/market/kline?{query}")
    assert (response.status_code, response.json()["code"]) == (status, code)


async def receive(socket: ClientConnection) -> Document:
    async with asyncio.timeout(10):
        decoded: Document = msgspec.json.decode(await socket.recv())
        return decoded


async def test_a_socket_gets_a_snapshot_then_updates_without_a_hole(
    pool: Pool, redis: Redis, engine: EngineLog, settings: Settings
) -> None:
    async with running_market(pool, redis, settings), running_api(settings) as api:
        await eventually(lambda: redis.get(f"market:kline:1m:{SOL}"))
        async with connect(f"{api.ws}/ws/market/kline?instrumentId={BTC}&period=1m") as socket:
            snapshot = await receive(socket)
            assert (snapshot["type"], snapshot["channel"], snapshot["period"]) == ("snapshot", "kline", "1m")
            assert snapshot["data"] == []
            klines: dict[str, Document] = {}
            seq = snapshot["seq"]
            await engine.append(BTC, [placed(1, "BUY", 600_000, 10_000)])
            for number in range(1, 4):
                await engine.append(BTC, [trade(number, 1, 600_000 + number, number, 1)])
                while seq < number + 1:
                    update = await receive(socket)
                    assert (update["type"], update["prevSeq"]) == ("update", seq)
                    seq = update["seq"]
                    klines |= {kline["openTime"]: kline for kline in update["data"]}
            total = sum(Decimal(kline["volume"]) for kline in klines.values())
            assert (total, sum(kline["tradeCount"] for kline in klines.values())) == (Decimal("0.006"), 3)
            assert list(klines.values()) == [
                KlineResponse(**row).model_dump(mode="json", by_alias=True)
                for row in await _documents(pool, len(klines))
            ]
        async with connect(f"{api.ws}/ws/market") as socket:
            await socket.send(
                msgspec.json.encode({"op": "subscribe", "channel": "kline", "instrumentId": BTC, "period": "1h"})
            )
            snapshot = await receive(socket)
            assert snapshot["period"] == "1h"
            assert snapshot["data"][-1]["volume"] == "0.006"
            for period in ("2h", ""):
                await socket.send(
                    msgspec.json.encode({"op": "subscribe", "channel": "kline", "instrumentId": BTC, "period": period})
                )
                while (refused := await receive(socket))["type"] == "update":
                    pass
                assert refused["code"] == "VALIDATION_FAILED"


async def _documents(pool: Pool, count: int) -> list[Document]:
    rows = await pool.fetch(
        "SELECT open_time, open_time + interval '1 minute' AS close_time, open, high, low, close, volume, trade_count,"
        " closed FROM market.kline_buckets WHERE period = '1m' ORDER BY open_time LIMIT $1",
        count,
    )
    return [dict(row) for row in rows]

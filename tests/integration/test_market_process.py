"""The market process on real servers: rebuilt from the log, kept up to date, healed after every loss."""

import asyncio
import itertools
import os
import signal
import sys
from collections.abc import AsyncIterator
from decimal import Decimal
from typing import Any

import msgspec
import pytest
from redis.asyncio import Redis

from domain.instruments import SHIPPED
from domain.matching import AnyEvent
from market import feed
from settings import Settings
from storage.db import OUTAGES, Pool
from storage.reference_prices import ReferencePrice, read_reference_prices
from tests.engine_commands import random_commands
from tests.integration.market_app import BTC, ETH, SOL, EngineLog, eventually, placed, running_market, trade
from tests.reference_book import ReferenceMatcher
from tests.servers import ROOT

Document = dict[str, Any]


@pytest.fixture
def market_settings(database_url: str, redis_url: str) -> Settings:
    return Settings(database_url=database_url, redis_url=redis_url, mark_price_interval_seconds=0.2)


@pytest.fixture
def engine(pool: Pool, redis: Redis) -> EngineLog:
    return EngineLog(pool, redis)


@pytest.fixture
async def market(pool: Pool, redis: Redis, market_settings: Settings) -> AsyncIterator[None]:
    async with running_market(pool, redis, market_settings):
        await eventually(lambda: redis.get(f"market:mark:{SOL}"))
        yield


async def document(redis: Redis, key: str) -> Document | None:
    payload = await redis.get(key)
    return None if payload is None else msgspec.json.decode(payload)


async def depth_at(redis: Redis, instrument_id: str, seq: int) -> Document:
    """The depth snapshot, once it includes event `seq`."""

    async def read() -> Document | None:
        depth = await document(redis, f"market:depth:{instrument_id}")
        return depth if depth is not None and depth["seq"] >= seq else None

    return await eventually(read)


async def mark_of(redis: Redis, instrument_id: str, **expected: str) -> Document:
    """The mark price document, once it has the expected members."""

    async def read() -> Document | None:
        mark = await document(redis, f"market:mark:{instrument_id}")
        return mark if mark is not None and expected.items() <= mark.items() else None

    return await eventually(read)


@pytest.mark.usefixtures("market")
async def test_published_events_are_seen_at_once(redis: Redis, engine: EngineLog) -> None:
    await engine.append(BTC, [placed(1, "BUY", 600_000, 5), placed(2, "SELL", 600_010, 7)])
    depth = await depth_at(redis, BTC, 2)
    assert depth["data"] == {"bids": [["60000", "0.005"]], "asks": [["60001", "0.007"]]}


@pytest.mark.usefixtures("market")
async def test_a_lost_hint_is_found_in_the_log(redis: Redis, engine: EngineLog) -> None:
    await engine.append(BTC, [placed(1, "BUY", 600_000, 5)], hint=False)
    depth = await depth_at(redis, BTC, 1)
    assert depth["data"]["bids"] == [["60000", "0.005"]]


@pytest.mark.usefixtures("market")
async def test_a_hint_after_a_lost_one_does_not_hide_the_gap(redis: Redis, engine: EngineLog) -> None:
    await engine.append(BTC, [placed(1, "BUY", 600_000, 5)], hint=False)
    await engine.append(BTC, [trade(1, 1, 600_000, 2, maker_remaining=3)])
    depth = await depth_at(redis, BTC, 2)
    assert depth["data"]["bids"] == [["60000", "0.003"]]


async def test_a_start_rebuilds_everything_from_the_log_page_by_page(
    pool: Pool, redis: Redis, engine: EngineLog, market_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "PAGE_EVENTS_MAX", 100)
    matcher = ReferenceMatcher(SHIPPED[0])
    events: list[AnyEvent] = [event for command in random_commands(800, 5) for event in matcher.apply(command)]
    assert len(events) > 500
    await engine.append(BTC, events, hint=False)
    async with running_market(pool, redis, market_settings):
        depth = await depth_at(redis, BTC, len(events))
    for side, name in (("BUY", "bids"), ("SELL", "asks")):
        levels: dict[Decimal, Decimal] = {}
        for order in matcher.queue("BUY" if side == "BUY" else "SELL"):
            price = SHIPPED[0].ticks_to_price(order.price)
            levels[price] = levels.get(price, Decimal(0)) + SHIPPED[0].lots_to_quantity(order.remaining)
        assert [(Decimal(price), Decimal(quantity)) for price, quantity in depth["data"][name]] == list(levels.items())


@pytest.mark.usefixtures("market")
async def test_trades_and_ticker_follow_the_log(redis: Redis, engine: EngineLog) -> None:
    await engine.append(ETH, [placed(1, "BUY", 300_000, 9), trade(11, 1, 300_000, 2, maker_remaining=7)])
    await engine.append(ETH, [trade(12, 1, 300_000, 3, maker_remaining=4)])
    await depth_at(redis, ETH, 3)
    trades = await document(redis, f"market:trades:{ETH}")
    assert trades is not None
    assert [item["tradeId"] for item in trades["data"]] == [11, 12]
    assert trades["data"][0] | {"executedAt": ""} == {
        "tradeId": 11,
        "price": "3000",
        "quantity": "0.002",
        "side": "SELL",
        "executedAt": "",
    }
    ticker = await document(redis, f"market:ticker:{ETH}")
    assert ticker is not None
    assert (ticker["data"]["lastPrice"], ticker["data"]["volume24h"]) == ("3000", "0.005")
    assert ticker["data"]["indexSource"] == "simulated"
    assert ticker["data"]["nextFundingTime"] is not None


@pytest.mark.usefixtures("market")
async def test_history_and_events_of_the_mark_price_agree_with_redis(pool: Pool, redis: Redis) -> None:
    mark = await mark_of(redis, BTC, source="simulated")
    rows = await pool.fetch("SELECT * FROM market.mark_prices WHERE instrument_id = $1 ORDER BY calculated_at", BTC)
    outbox = await pool.fetch("SELECT payload FROM outbox.messages WHERE topic = 'market.mark-price'")
    announced = [msgspec.json.decode(line) for row in outbox for line in row["payload"].split("\n")]
    assert {name: mark[name] for name in mark if name != "predictedFundingRate"} in announced
    assert Decimal(mark["indexPrice"]) in [row["index_price"] for row in rows]
    assert abs(Decimal(mark["markPrice"]) - 60_000) < 600


async def test_a_held_index_is_taken_between_rounds_and_stays_until_released(
    pool: Pool, redis: Redis, market_settings: Settings
) -> None:
    settings = market_settings.model_copy(update={"mark_price_interval_seconds": 60.0})
    async with running_market(pool, redis, settings):
        await mark_of(redis, BTC, source="simulated")
        for price in ("50000", "50001.5"):
            await redis.set(f"market:admin-price:{BTC}", price)

            async def nudge_until(price: str = price) -> Document | None:
                # The process may not have subscribed yet when the first nudge is sent.
                await redis.publish("market:admin-price", BTC)
                mark = await document(redis, f"market:mark:{BTC}")
                return mark if mark is not None and mark["markPrice"] == price else None

            assert (await eventually(nudge_until))["indexPrice"] == price
        await redis.delete(f"market:admin-price:{BTC}")
        await redis.publish("market:admin-price", BTC)

        async def moved() -> bool:
            mark = await document(redis, f"market:mark:{BTC}")
            return mark is not None and mark["indexPrice"] != "50001.5"

        assert await eventually(moved)


@pytest.mark.usefixtures("market")
async def test_a_deep_book_above_the_index_lifts_the_mark(redis: Redis, engine: EngineLog) -> None:
    await redis.set(f"market:admin-price:{ETH}", "3000")
    await mark_of(redis, ETH, indexPrice="3000")
    await engine.append(ETH, [placed(1, "BUY", 300_290, 1_000_000), placed(2, "SELL", 300_310, 1_000_000)])
    mark = await mark_of(redis, ETH, fairPrice="3003")
    assert mark["premiumIndex"] == "0.001"
    assert mark["markPrice"] == "3000"  # Held: neither book nor funding moves it.
    await redis.delete(f"market:admin-price:{ETH}")

    async def lifted() -> bool:
        released = await document(redis, f"market:mark:{ETH}")
        assert released is not None
        return Decimal(released["markPrice"]) > Decimal(released["indexPrice"]) + 1

    assert await eventually(lifted)


async def test_the_index_goes_on_from_the_last_run(pool: Pool, redis: Redis, market_settings: Settings) -> None:
    await redis.set(f"market:admin-price:{BTC}", "71000")
    async with running_market(pool, redis, market_settings):
        await mark_of(redis, BTC, indexPrice="71000")
    await redis.flushall()
    async with running_market(pool, redis, market_settings):
        mark = await mark_of(redis, BTC, source="simulated")
    assert abs(Decimal(mark["indexPrice"]) - 71_000) < 100


async def test_of_two_market_processes_one_stands_by_until_the_other_goes(
    pool: Pool, redis: Redis, market_settings: Settings
) -> None:
    async with running_market(pool, redis, market_settings):
        async with running_market(pool, redis, market_settings):
            await mark_of(redis, BTC, source="simulated")
            await asyncio.sleep(1.5)
            rows = await pool.fetch("SELECT calculated_at FROM market.mark_prices WHERE instrument_id = $1", BTC)
            moments = sorted(row["calculated_at"].timestamp() for row in rows)
            gaps = [later - earlier for earlier, later in itertools.pairwise(moments)]
            assert min(gaps) > 0.1
        await redis.delete(f"market:mark:{BTC}")
        await mark_of(redis, BTC, source="simulated")


@pytest.mark.usefixtures("market")
async def test_a_redis_that_lost_everything_is_filled_again(redis: Redis, engine: EngineLog) -> None:
    await engine.append(BTC, [placed(1, "BUY", 600_000, 5)])
    await depth_at(redis, BTC, 1)
    await redis.flushall()
    await redis.client_kill_filter(_type="pubsub")
    depth = await depth_at(redis, BTC, 1)
    assert depth["data"]["bids"] == [["60000", "0.005"]]


@pytest.mark.usefixtures("market")
async def test_losing_postgres_connections_only_delays(pool: Pool, redis: Redis, engine: EngineLog) -> None:
    await pool.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    await eventually(lambda: _works(engine))
    await depth_at(redis, BTC, 1)


async def _works(engine: EngineLog) -> bool:
    try:
        await engine.append(BTC, [placed(1, "BUY", 600_000, 5)], hint=False)
    except OUTAGES:
        return False
    return True


@pytest.mark.usefixtures("market")
async def test_reference_prices_are_read_together(redis: Redis, engine: EngineLog) -> None:
    await engine.append(BTC, [placed(1, "BUY", 600_000, 5)])
    await depth_at(redis, BTC, 1)
    prices = await read_reference_prices(redis, [BTC, ETH, "NOPE"])
    assert prices.keys() == {BTC, ETH}
    assert isinstance(prices[BTC], ReferencePrice)
    assert prices[BTC].mark > 50_000
    assert prices[ETH].mark > 2_900
    assert await read_reference_prices(redis, []) == {}


async def test_sigterm_ends_the_process_cleanly(database_url: str, redis_url: str, redis: Redis) -> None:
    process = await _start(database_url, redis_url)
    try:
        await eventually(lambda: redis.get(f"market:mark:{BTC}"))
        process.send_signal(signal.SIGTERM)
        _, errors = await asyncio.wait_for(process.communicate(), 10)
    finally:
        if process.returncode is None:
            process.kill()
    assert process.returncode == 0
    assert b"Traceback" not in errors


async def test_an_index_source_that_cannot_be_used_is_refused_in_one_line(database_url: str, redis_url: str) -> None:
    process = await _start(database_url, redis_url, EXCHANGE_INDEX_REPLAY_FILE="/nowhere/prices.gz")
    _, errors = await asyncio.wait_for(process.communicate(), 20)
    assert process.returncode == 1
    (line,) = errors.decode().strip().splitlines()
    assert line.startswith("The index source cannot be used: ")
    assert "/nowhere/prices.gz" in line


async def _start(database_url: str, redis_url: str, **more: str) -> asyncio.subprocess.Process:
    environment = os.environ | {"EXCHANGE_DATABASE_URL": database_url, "EXCHANGE_REDIS_URL": redis_url} | more
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "market", cwd=ROOT, env=environment, stderr=asyncio.subprocess.PIPE
    )

"""The market process with an index from exchanges: history, freeze and recovery; and with recorded prices."""

import asyncio
import itertools
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import pytest
from redis.asyncio import Redis

from settings import Settings
from storage.db import Pool
from tests.integration.identity_app import bearer, complete, running_exchange
from tests.integration.market_app import BTC, ETH, SOL, EngineLog, eventually, placed, running_market
from tests.integration.socket_app import Api
from tests.servers import ROOT
from tests.spot_exchanges import SpotExchanges, running_spot_exchanges, status

Document = dict[str, Any]


@pytest.fixture
async def spot() -> AsyncIterator[SpotExchanges]:
    async with running_spot_exchanges() as exchanges:
        yield exchanges


@pytest.fixture
def ccxt_settings(database_url: str, redis_url: str, spot: SpotExchanges) -> Settings:
    return Settings(
        database_url=database_url,
        redis_url=redis_url,
        mark_price_interval_seconds=0.1,
        index_source="ccxt",
        index_urls=spot.urls("binance", "coinbase"),
        # Kraken, which ccxt asks once a second only, is one too many for a fast test.
        index_exchanges="binance:1,coinbase:1",
        index_poll_seconds=0.05,
        index_stale_seconds=1.0,
    )


async def mark_of(redis: Redis, instrument_id: str, **expected: object) -> Document:
    """The mark price document, once it has the expected members."""

    async def read() -> Document | None:
        payload = await redis.get(f"market:mark:{instrument_id}")
        mark = None if payload is None else msgspec.json.decode(payload)
        return mark if mark is not None and expected.items() <= mark.items() else None

    return await eventually(read)


async def announced(pool: Pool, instrument_id: str) -> list[Document]:
    rows = await pool.fetch("SELECT payload FROM outbox.messages WHERE topic = 'market.mark-price' ORDER BY message_id")
    events = [msgspec.json.decode(line) for row in rows for line in row["payload"].split("\n")]
    return [event for event in events if event["instrumentId"] == instrument_id]


async def frozen_since(pool: Pool, instrument_id: str) -> object:
    return await pool.fetchval("SELECT frozen_since FROM market.v_index_states WHERE instrument_id = $1", instrument_id)


def alerts(caplog: pytest.LogCaptureFixture, instrument_id: str) -> list[str]:
    errors = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    return [text.partition(f" {instrument_id}")[0].rstrip(":") for text in errors if instrument_id in text]


async def test_the_index_and_what_it_was_made_of_are_kept(
    pool: Pool, redis: Redis, spot: SpotExchanges, ccxt_settings: Settings
) -> None:
    spot["binance"].prices["BTC"] = "60010"
    # Only a simulated index can be held: what is left of such a wish changes nothing.
    await redis.set(f"market:admin-price:{BTC}", "1")
    settings = ccxt_settings.model_copy(
        update={"index_exchanges": "binance:3,coinbase:1,kraken:1", "index_urls": spot.urls()}
    )
    spot["kraken"].markets_answer = status(500)
    async with running_market(pool, redis, settings):
        mark = await mark_of(redis, BTC, source="ccxt", indexPrice="60007.5")
    assert (mark["isFrozen"], mark["frozenSince"]) == (False, None)
    row = await pool.fetchrow(
        "SELECT * FROM market.index_prices WHERE instrument_id = $1 ORDER BY calculated_at DESC LIMIT 1", BTC
    )
    assert row is not None
    assert (row["index_price"], row["source"]) == (Decimal("60007.5"), "ccxt")
    assert msgspec.json.decode(row["sources"]) == {
        "used": [
            {"name": "binance", "price": "60010.00000000", "clamped": "60010.00000000", "weight": "0.75"},
            {"name": "coinbase", "price": "60000.00000000", "clamped": "60000.00000000", "weight": "0.25"},
        ],
        "dropped": {"kraken": "ExchangeNotAvailable"},
    }
    assert await frozen_since(pool, BTC) is None
    assert await pool.fetchval("SELECT source FROM market.v_index_states WHERE instrument_id = $1", ETH) == "ccxt"


async def test_without_a_fresh_index_the_mark_stands_visibly_until_there_is_one(
    pool: Pool, redis: Redis, spot: SpotExchanges, ccxt_settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    engine = EngineLog(pool, redis)
    async with running_market(pool, redis, ccxt_settings):
        before = await mark_of(redis, BTC, source="ccxt", isFrozen=False)
        spot["coinbase"].answer = status(500)
        frozen = await mark_of(redis, BTC, isFrozen=True)
        # Neither the exchange that is left nor the book moves it now.
        spot["binance"].prices["BTC"] = "61000"
        await engine.append(BTC, [placed(1, "BUY", 610_000, 1_000_000), placed(2, "SELL", 610_010, 1_000_000)])
        await asyncio.sleep(0.5)
        still = await mark_of(redis, BTC, isFrozen=True)
        assert still == frozen
        assert {name: still[name] for name in ("markPrice", "indexPrice")} == {
            name: before[name] for name in ("markPrice", "indexPrice")
        }
        assert await frozen_since(pool, BTC) is not None
        ticker = msgspec.json.decode(await eventually(lambda: redis.get(f"market:ticker:{BTC}")))
        assert (ticker["data"]["isFrozen"], ticker["data"]["indexSource"]) == (True, "ccxt")
        assert alerts(caplog, BTC) == ["ALERT"]
        spot["coinbase"].answer = None
        spot["coinbase"].prices["BTC"] = "61000"
        fresh = await mark_of(redis, BTC, isFrozen=False, indexPrice="61000")
        assert fresh["frozenSince"] is None
        assert await frozen_since(pool, BTC) is None
        assert alerts(caplog, BTC) == ["ALERT", "ALERT over"]
    flags = [event["isFrozen"] for event in await announced(pool, BTC)]
    assert flags.count(True) == 1
    unpriced = await pool.fetch(
        "SELECT sources FROM market.index_prices WHERE instrument_id = $1 AND index_price IS NULL", BTC
    )
    assert len(unpriced) >= 4
    assert msgspec.json.decode(unpriced[-1]["sources"])["dropped"] == {"coinbase": "ExchangeNotAvailable"}
    in_freeze = await pool.fetchval(
        "SELECT count(*) FROM market.mark_prices m JOIN market.index_prices i USING (instrument_id, calculated_at)"
        " WHERE i.index_price IS NULL"
    )
    assert in_freeze == 0


async def test_an_instrument_is_frozen_by_itself(
    pool: Pool, redis: Redis, spot: SpotExchanges, ccxt_settings: Settings
) -> None:
    del spot["coinbase"].prices["SOL"]
    async with running_market(pool, redis, ccxt_settings):
        await mark_of(redis, BTC, isFrozen=False)

        async def sol_is_frozen() -> object:
            return await frozen_since(pool, SOL)

        await eventually(sol_is_frozen)
        # It never had a mark, so there is none to show.
        assert await redis.get(f"market:mark:{SOL}") is None
        assert await frozen_since(pool, BTC) is None


async def test_an_exchange_that_hangs_delays_no_round_of_mark_prices(
    pool: Pool, redis: Redis, spot: SpotExchanges, ccxt_settings: Settings
) -> None:
    every = {
        "index_exchanges": "binance:1,coinbase:1,kraken:1",
        "index_urls": spot.urls(),
        "index_timeout_seconds": 5.0,
    }
    async with running_market(pool, redis, ccxt_settings.model_copy(update=every)):
        await mark_of(redis, BTC, isFrozen=False)
        spot["kraken"].hangs = True
        await asyncio.sleep(4.0)
        await mark_of(redis, BTC, isFrozen=False)
    rows = await pool.fetch("SELECT calculated_at FROM market.mark_prices WHERE instrument_id = $1 ORDER BY 1", BTC)
    moments = [row["calculated_at"].timestamp() for row in rows]
    assert max(later - earlier for earlier, later in itertools.pairwise(moments)) < 3


async def test_a_restart_within_a_freeze_keeps_the_mark_and_since_when_it_stands(
    pool: Pool, redis: Redis, spot: SpotExchanges, ccxt_settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    async with running_market(pool, redis, ccxt_settings):
        await mark_of(redis, BTC, isFrozen=False)
        for name in ("binance", "coinbase"):
            spot[name].answer = status(429)
        frozen = await mark_of(redis, BTC, isFrozen=True)
    await redis.flushall()
    caplog.clear()
    async with running_market(pool, redis, ccxt_settings):
        assert await mark_of(redis, BTC, isFrozen=True) == frozen
        assert alerts(caplog, BTC) == []
        for name in ("binance", "coinbase"):
            spot[name].answer = None
        await mark_of(redis, BTC, isFrozen=False)
        assert alerts(caplog, BTC) == ["ALERT over"]


async def test_a_simulated_mark_never_stands_in_for_a_real_one(
    pool: Pool, redis: Redis, spot: SpotExchanges, ccxt_settings: Settings
) -> None:
    async with running_market(pool, redis, ccxt_settings.model_copy(update={"index_source": "simulated"})):
        await mark_of(redis, BTC, source="simulated")
    await redis.flushall()
    for name in ("binance", "coinbase"):
        spot[name].answer = status(500)
    async with running_market(pool, redis, ccxt_settings):

        async def is_frozen() -> object:
            return await frozen_since(pool, BTC)

        await eventually(is_frozen)
        await asyncio.sleep(0.3)
        assert await redis.get(f"market:mark:{BTC}") is None


async def test_rest_shows_the_freeze_and_refuses_to_hold_a_real_index(
    pool: Pool, redis: Redis, spot: SpotExchanges, ccxt_settings: Settings, tmp_path: Path, settings: Settings
) -> None:
    whole = complete(settings, settings.state_dir).model_copy(
        update=ccxt_settings.model_dump(include={name for name in Settings.model_fields if name.startswith("index_")})
        | {"mark_price_interval_seconds": 0.1}
    )
    async with running_market(pool, redis, whole), running_exchange(whole) as exchange:
        await mark_of(redis, BTC, isFrozen=False)
        spot["coinbase"].answer = status(500)
        await mark_of(redis, BTC, isFrozen=True)
        mark = (await exchange.client.get(f"/api/market/mark-price/{BTC}")).json()
        assert (mark["source"], mark["isFrozen"], mark["frozenSince"] is None) == ("ccxt", True, False)
        token, _ = await Api("", exchange.app).sign_in(1001, "admin")
        path = f"/api/admin/mark-price/{BTC}"
        response = await exchange.client.post(path, json={"price": "1"}, headers=bearer(token))
        assert (response.status_code, response.json()["code"]) == (403, "FORBIDDEN")


async def test_the_process_starts_with_exchanges_and_ends_cleanly(
    redis: Redis, spot: SpotExchanges, ccxt_settings: Settings
) -> None:
    environment = os.environ | {
        "EXCHANGE_DATABASE_URL": ccxt_settings.require_database_url(),
        "EXCHANGE_REDIS_URL": ccxt_settings.require_redis_url(),
        "EXCHANGE_INDEX_SOURCE": "ccxt",
        "EXCHANGE_INDEX_URLS": spot.urls(),
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "market", cwd=ROOT, env=environment, stderr=asyncio.subprocess.PIPE
    )
    try:
        await mark_of(redis, BTC, source="ccxt", indexPrice="60000")
        process.send_signal(signal.SIGTERM)
        _, errors = await asyncio.wait_for(process.communicate(), 10)
    finally:
        if process.returncode is None:
            process.kill()
    assert process.returncode == 0
    assert not [line for line in errors.decode().splitlines() if "ERROR" in line or "Traceback" in line]


async def test_recorded_prices_are_played_as_a_simulated_index(
    pool: Pool, redis: Redis, ccxt_settings: Settings, tmp_path: Path
) -> None:
    file = tmp_path / "prices.jsonl"
    file.write_text(f'{{"at": "2024-08-08T00:00:00Z", "instrumentId": "{BTC}", "price": "55123.4"}}')
    settings = ccxt_settings.model_copy(update={"index_source": "simulated", "index_replay_file": file})
    async with running_market(pool, redis, settings):
        await mark_of(redis, BTC, source="simulated", indexPrice="55123.4")
        assert (
            await pool.fetchval("SELECT source FROM market.index_prices WHERE instrument_id = $1", BTC) == "simulated"
        )

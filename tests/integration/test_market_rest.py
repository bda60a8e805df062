"""Market data over REST, and the operator's hold on the index."""

import asyncio
from collections.abc import AsyncIterator
from decimal import Decimal

import httpx
import pytest
from redis.asyncio import Redis

from api.routes.market import DepthResponse, InstrumentResponse, MarkPriceResponse, TickerResponse, TradeResponse
from settings import Settings
from storage.db import Pool
from tests.integration.identity_app import Exchange, bearer, complete, running_exchange
from tests.integration.market_app import BTC, ETH, SOL, EngineLog, eventually, placed, running_market, trade
from tests.integration.socket_app import Api

ADMIN, USER = 1001, 1002


@pytest.fixture
async def exchange(settings: Settings) -> AsyncIterator[Exchange]:
    async with running_exchange(complete(settings, settings.state_dir)) as exchange:
        yield exchange


@pytest.fixture
async def market(pool: Pool, redis: Redis, settings: Settings) -> AsyncIterator[EngineLog]:
    async with running_market(pool, redis, settings):
        await eventually(lambda: redis.get(f"market:mark:{SOL}"))
        engine = EngineLog(pool, redis)
        for instrument_id in (BTC, ETH):
            bids = [placed(number, "BUY", 600_000 - number, number) for number in range(1, 6)]
            await engine.append(instrument_id, [*bids, trade(7, 1, 599_999, 1, maker_remaining=0)])
        await eventually(lambda: _has_trade(redis, ETH))
        yield engine


async def _has_trade(redis: Redis, instrument_id: str) -> bool:
    return b'"tradeId":7' in (await redis.get(f"market:trades:{instrument_id}") or b"")


async def sign_in(exchange: Exchange, user_id: int, *roles: str) -> dict[str, str]:
    token, _ = await Api("", exchange.app).sign_in(user_id, *roles)
    return bearer(token)


async def get(exchange: Exchange, path: str) -> httpx.Response:
    response = await exchange.client.get(f"/api/market{path}")
    assert response.status_code == 200, response.text
    return response


async def test_instruments_are_listed_with_their_rules_and_state(exchange: Exchange, pool: Pool) -> None:
    await pool.execute("UPDATE matching.instruments SET state = 'HALTED' WHERE instrument_id = $1", SOL)
    items = (await get(exchange, "/instruments")).json()["items"]
    by_id = {item["instrumentId"]: InstrumentResponse.model_validate(item) for item in items}
    assert list(by_id) == [BTC, ETH, SOL]
    assert items[0]["tickSize"] == "0.1"
    assert by_id[SOL].state == "HALTED"


@pytest.mark.usefixtures("market")
async def test_documents_have_the_published_form(exchange: Exchange) -> None:
    ticker = TickerResponse.model_validate((await get(exchange, f"/tickers/{BTC}")).json())
    assert (ticker.last_price, ticker.best_bid) == (Decimal("59999.9"), Decimal("59999.8"))
    tickers = (await get(exchange, "/tickers")).json()["items"]
    assert [TickerResponse.model_validate(item).instrument_id for item in tickers] == [BTC, ETH, SOL]
    mark = MarkPriceResponse.model_validate((await get(exchange, f"/mark-price/{ETH}")).json())
    assert mark.source == "simulated"


@pytest.mark.usefixtures("market")
async def test_depth_is_cut_to_the_limit_best_first(exchange: Exchange) -> None:
    response = await get(exchange, f"/depth/{BTC}?limit=2")
    assert response.json() == {
        "instrumentId": BTC,
        "seq": 6,
        "bids": [["59999.8", "0.002"], ["59999.7", "0.003"]],
        "asks": [],
    }
    assert len(DepthResponse.model_validate((await get(exchange, f"/depth/{BTC}")).json()).bids) == 4


async def test_trades_come_newest_first_up_to_the_limit(exchange: Exchange, market: EngineLog, redis: Redis) -> None:
    await market.append(BTC, [trade(8, 2, 599_998, 1, maker_remaining=1)])

    async def two_trades() -> bool:
        return b'"tradeId":8' in (await redis.get(f"market:trades:{BTC}") or b"")

    await eventually(two_trades)
    items = (await get(exchange, f"/trades/{BTC}")).json()["items"]
    assert [TradeResponse.model_validate(item).trade_id for item in items] == [8, 7]
    assert [item["tradeId"] for item in (await get(exchange, f"/trades/{BTC}?limit=1")).json()["items"]] == [8]


@pytest.mark.parametrize("path", ["/instruments", "/tickers", f"/depth/{BTC}", f"/trades/{BTC}", f"/mark-price/{BTC}"])
@pytest.mark.usefixtures("market")
async def test_an_answer_may_be_kept_for_a_second_and_has_a_tag(exchange: Exchange, path: str) -> None:
    headers = (await get(exchange, path)).headers
    assert headers["cache-control"] == "public, max-age=1"
    assert headers["etag"].startswith('"')


@pytest.mark.parametrize("form", ["{}", 'W/{}, "another"', "*"])
async def test_what_the_caller_has_is_not_sent_again_until_it_changes(
    exchange: Exchange, market: EngineLog, redis: Redis, form: str
) -> None:
    path = f"/api/market/depth/{BTC}"
    tag = (await exchange.client.get(path)).headers["etag"]
    again = await exchange.client.get(path, headers={"If-None-Match": form.format(tag)})
    assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
    await market.append(BTC, [placed(8, "BUY", 500_000, 1)])

    async def has_changed() -> bool:
        return b'"50000"' in (await redis.get(f"market:depth:{BTC}") or b"")

    await eventually(has_changed)
    changed = await exchange.client.get(path, headers={"If-None-Match": tag})
    assert changed.status_code == 200
    assert changed.headers["etag"] != tag


async def test_a_refusal_is_not_kept(exchange: Exchange) -> None:
    response = await exchange.client.get(f"/api/market/depth/{BTC}")
    assert response.status_code == 503
    assert "etag" not in response.headers
    assert "max-age" not in response.headers.get("cache-control", "")


@pytest.mark.parametrize("path", ["tickers", "depth", "trades", "mark-price"])
async def test_an_unknown_instrument_is_not_found(exchange: Exchange, path: str) -> None:
    response = await exchange.client.get(f"/api/market/{path}/DOGE-USDT-PERP")
    assert (response.status_code, response.json()["code"]) == (404, "INSTRUMENT_NOT_FOUND")


@pytest.mark.parametrize("path", ["tickers", "depth", "trades", "mark-price"])
async def test_without_a_market_process_the_caller_is_told_to_come_back(exchange: Exchange, path: str) -> None:
    response = await exchange.client.get(f"/api/market/{path}/{BTC}")
    assert (response.status_code, response.json()["code"]) == (503, "OVERLOADED")


@pytest.mark.parametrize("query", ["limit=0", "limit=-1", "limit=many", "limit=100000"])
async def test_a_limit_out_of_range_is_refused(exchange: Exchange, query: str) -> None:
    response = await exchange.client.get(f"/api/market/depth/{BTC}?{query}")
    assert (response.status_code, response.json()["code"]) == (422, "VALIDATION_FAILED")


@pytest.mark.usefixtures("market")
@pytest.mark.parametrize("name", ["price", "markPrice", "indexPrice", "mark_price"])
async def test_an_operator_holds_the_mark_exactly_and_releases_it(exchange: Exchange, name: str) -> None:
    admin = await sign_in(exchange, ADMIN, "admin")
    path = f"/api/admin/mark-price/{BTC}"
    response = await exchange.client.post(path, json={name: "54321.123"}, headers=admin)
    assert response.status_code == 200, response.text
    held = MarkPriceResponse.model_validate(response.json())
    assert held.mark_price == held.index_price == Decimal("54321.123")
    await asyncio.sleep(1.2)
    assert (await get(exchange, f"/mark-price/{BTC}")).json()["markPrice"] == "54321.123"
    assert (await exchange.client.delete(path, headers=admin)).status_code == 204

    async def moved() -> bool:
        mark = MarkPriceResponse.model_validate((await get(exchange, f"/mark-price/{BTC}")).json())
        return mark.index_price != Decimal("54321.123")

    assert await eventually(moved)


async def test_only_operators_may_hold_the_mark(exchange: Exchange) -> None:
    user = await sign_in(exchange, USER)
    path = f"/api/admin/mark-price/{BTC}"
    assert (await exchange.client.post(path, json={"price": "1"})).json()["code"] == "UNAUTHENTICATED"
    assert (await exchange.client.post(path, json={"price": "1"}, headers=user)).json()["code"] == "FORBIDDEN"
    assert (await exchange.client.delete(path, headers=user)).json()["code"] == "FORBIDDEN"


@pytest.mark.parametrize("price", ["0", "-1", "NaN", "Infinity", "1e30", "1.123456789", None])
async def test_a_price_that_is_none_is_refused(exchange: Exchange, price: str | None) -> None:
    admin = await sign_in(exchange, ADMIN, "admin")
    response = await exchange.client.post(f"/api/admin/mark-price/{BTC}", json={"price": price}, headers=admin)
    assert (response.status_code, response.json()["code"]) == (422, "VALIDATION_FAILED")


async def test_holding_an_unknown_instrument_is_not_found(exchange: Exchange) -> None:
    admin = await sign_in(exchange, ADMIN, "admin")
    response = await exchange.client.post("/api/admin/mark-price/DOGE", json={"price": "1"}, headers=admin)
    assert (response.status_code, response.json()["code"]) == (404, "INSTRUMENT_NOT_FOUND")


async def test_a_market_process_that_does_not_answer_is_reported(
    exchange: Exchange, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api.routes.market.HELD_PRICE_SECONDS_MAX", 0.2)
    admin = await sign_in(exchange, ADMIN, "admin")
    response = await exchange.client.post(f"/api/admin/mark-price/{BTC}", json={"price": "1"}, headers=admin)
    assert (response.status_code, response.json()["code"]) == (503, "OVERLOADED")

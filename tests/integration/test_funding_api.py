"""GET /api/funding/payments."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from domain.contracts.funding import FundingRun
from storage.db import Pool
from tests.integration.identity_app import Exchange, bearer, running_exchange, settings_without_workflows
from tests.integration.ledger_world import BTC, ETH, World, finish

TIMES = [datetime(2099, 1, 1, hour, tzinfo=UTC) for hour in (0, 8, 16)]


@pytest.fixture
async def exchange(database_url: str, redis_url: str, temporal_address: str, tmp_path: Path) -> AsyncIterator[Exchange]:
    async with running_exchange(settings_without_workflows(database_url, redis_url, temporal_address, tmp_path)) as app:
        yield app


async def payments(exchange: Exchange, headers: dict[str, str], **query: Any) -> dict[str, Any]:
    answer = await exchange.client.get("/api/funding/payments", headers=headers, params=query)
    assert answer.status_code == 200, answer.text
    page: dict[str, Any] = answer.json()
    return page


async def test_users_see_their_own_payments_newest_first_and_page_by_page(
    exchange: Exchange, pool: Pool, redis: Redis
) -> None:
    alice, bob = [await exchange.add_user(f"{name}@example.com") for name in ("alice", "bob")]
    world = World(pool, redis)
    await world.deposit(100_000, alice, bob)
    await world.trade(alice, bob, "0.5", 60_000)
    await world.trade(bob, alice, "2", 3_000, ETH)
    for moment in TIMES:
        await world.publish_rate(moment, "0.0001", 60_000)
        await finish(world.funding(FundingRun(BTC.instrument_id, moment.isoformat())))
    await world.publish_rate(TIMES[0], "-0.00025", "3000.5", ETH)
    await finish(world.funding(FundingRun(ETH.instrument_id, TIMES[0].isoformat())))

    headers = bearer((await exchange.login())["accessToken"])
    newest = (await payments(exchange, headers, limit=1))["items"][0]
    assert newest.pop("createdAt").endswith("Z")
    assert newest == {
        "fundingTime": "2099-01-01T00:00:00.000Z",
        "instrumentId": ETH.instrument_id,
        "quantity": "2",
        "side": "SHORT",
        "markPrice": "3000.5",
        "rate": "-0.00025",
        "payment": "-1.50025",
    }
    first = await payments(exchange, headers, instrumentId=BTC.instrument_id, limit=2)
    rest = await payments(exchange, headers, instrumentId=BTC.instrument_id, limit=2, cursor=first["nextCursor"])
    seen = first["items"] + rest["items"]
    assert rest["nextCursor"] is None
    assert [item["fundingTime"] for item in seen] == [f"2099-01-01T{hour}:00:00.000Z" for hour in ("16", "08", "00")]
    assert {(item["side"], item["payment"]) for item in seen} == {("LONG", "-3")}

    other = bearer((await exchange.login("bob@example.com"))["accessToken"])
    assert {item["payment"] for item in (await payments(exchange, other))["items"]} == {"3", "1.50025"}
    # What was paid is no fill.
    fills = await exchange.client.get("/api/trades", headers=headers)
    assert [item["quantity"] for item in fills.json()["items"]] == ["2", "0.5"]


async def test_payments_are_for_the_signed_in(exchange: Exchange) -> None:
    assert (await exchange.client.get("/api/funding/payments")).status_code == 401

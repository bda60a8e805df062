"""What operators see and do about the insurance fund and liquidations, over HTTP."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from redis.asyncio import Redis

from activities.ledger.audit import run_audit
from api.bootstrap import bootstrap
from storage.db import Pool
from tests.integration.identity_app import (
    PASSWORD,
    Exchange,
    bearer,
    running_exchange,
    settings_without_workflows,
)
from tests.integration.ledger_world import limit
from tests.integration.liquidation_world import LiquidationWorld

ADMIN = "admin@exchange.local"


@pytest.fixture
async def exchange(
    database_url: str, redis_url: str, temporal_address: str, tmp_path: Path, pool: Pool
) -> AsyncIterator[Exchange]:
    settings = settings_without_workflows(database_url, redis_url, temporal_address, tmp_path)
    settings = settings.model_copy(update={"admin_email": ADMIN, "admin_password": SecretStr(PASSWORD)})
    # Twice, as at every start: the fund is seeded once.
    await bootstrap(settings, pool)
    await bootstrap(settings, pool)
    async with running_exchange(settings) as running:
        yield running


async def admin(exchange: Exchange) -> dict[str, str]:
    return bearer((await exchange.login(ADMIN))["accessToken"])


async def get(exchange: Exchange, path: str, headers: dict[str, str]) -> Any:
    response = await exchange.client.get(path, headers=headers)
    assert response.status_code == 200, response.text
    return response.json()


async def test_the_fund_is_seeded_once_and_operators_add_to_it_once_per_reference(
    exchange: Exchange, pool: Pool
) -> None:
    headers = await admin(exchange)
    deposit = {"asset": "USDT", "amount": "250.5", "reference": "april"}
    for _ in range(2):
        answer = await exchange.client.post("/api/admin/insurance-fund/deposits", json=deposit, headers=headers)
        assert answer.status_code == 200, answer.text
        assert answer.json() == {"asset": "USDT", "balance": "1000250.5", "promised": "0", "openClaims": 0}
    other = await exchange.client.post(
        "/api/admin/insurance-fund/deposits", json={**deposit, "amount": "1"}, headers=headers
    )
    assert (other.status_code, other.json()["code"]) == (422, "VALIDATION_FAILED")
    fund = await get(exchange, "/api/admin/insurance-fund", headers)
    assert fund["funds"] == [{"asset": "USDT", "balance": "1000250.5", "promised": "0", "openClaims": 0}]
    assert [(m["entryType"], m["amount"]) for m in fund["movements"]] == [
        ("INSURANCE_FUND_DEPOSIT", "250.5"),
        ("INSURANCE_FUND_DEPOSIT", "1000000"),
    ]
    accounts = await get(exchange, "/api/admin/accounts", headers)
    assert {a["account"]: a["balance"] for a in accounts if a["balance"] != "0"} == {
        "exchange:insurance_fund": "1000250.5",
        "external:deposits": "-1000250.5",
    }
    assert (await run_audit(pool)).ok


async def test_liquidations_and_the_users_own_view_of_them(exchange: Exchange, pool: Pool, redis: Redis) -> None:
    headers = await admin(exchange)
    world = LiquidationWorld(pool, redis)
    user_id = await exchange.add_user()
    await world.deposit(100_000, user_id, 1, 2)
    await world.trade(user_id, 1, "1", 60_000)
    own = bearer((await exchange.login())["accessToken"])
    await world.place(limit(2, "BUY", "2", 54_200))
    await world.settle()
    [opened] = await world.marked(54_200)
    [position] = await get(exchange, "/api/positions", own)
    assert (position["status"], position["adlRank"]) == ("LIQUIDATION_PENDING", 5)
    page = await get(exchange, "/api/admin/liquidations", headers)
    assert [(row["userId"], row["status"]) for row in page["items"]] == [(str(user_id), "PENDING")]
    assert page["items"][0]["workflowId"] == opened.workflow_id
    await world.liquidate(opened.liquidation_id)
    assert (await get(exchange, "/api/admin/liquidations?status=PENDING", headers))["items"] == []
    assert len((await get(exchange, "/api/admin/liquidations?status=PROCESSED", headers))["items"]) == 1
    [position] = await get(exchange, "/api/positions", own)
    assert (position["status"], position["adlRank"]) == ("CLOSED", None)


@pytest.mark.parametrize("path", ["insurance-fund", "accounts", "liquidations"])
async def test_users_see_none_of_it(exchange: Exchange, path: str) -> None:
    await exchange.add_user()
    own = bearer((await exchange.login())["accessToken"])
    assert (await exchange.client.get(f"/api/admin/{path}", headers=own)).status_code == 403

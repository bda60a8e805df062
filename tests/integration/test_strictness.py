"""Nothing that a caller sends is ignored: on every route of the document, what it does not know is refused by name."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from storage.db import Pool
from tests.integration.identity_app import (
    INTERNAL_TOKEN,
    PASSWORD,
    Exchange,
    bearer,
    running_exchange,
    settings_without_workflows,
)
from tests.security.conftest import sign_in
from tests.security.document import Call, calls

JSON = {"Content-Type": "application/json"}
BTC = "BTC-USDT-PERP"


@pytest_asyncio.fixture
async def exchange(database_url: str, redis_url: str, temporal_address: str, tmp_path: Path) -> AsyncIterator[Exchange]:
    settings = settings_without_workflows(database_url, redis_url, temporal_address, tmp_path)
    async with running_exchange(settings) as exchange:
        await exchange.add_user()
        yield exchange


async def headers_for(exchange: Exchange, call: Call) -> dict[str, str]:
    """Of whoever may call it: operators are users, too."""
    return (
        {"X-Internal-Token": INTERNAL_TOKEN} if call.roles == {"internal"} else await sign_in(exchange, 1000, "admin")
    )


def named(answer: httpx.Response) -> list[str]:
    """The places that a refusal names."""
    assert (answer.status_code, answer.json().get("code")) == (422, "VALIDATION_FAILED"), answer.text
    fields = [error["field"] for error in answer.json()["errors"]]
    assert fields[0] in answer.json()["detail"]
    return fields


async def test_every_route_names_a_parameter_that_it_does_not_know(exchange: Exchange) -> None:
    for call in calls(exchange.app.openapi()):
        headers = await headers_for(exchange, call)
        answer = await exchange.client.request(call.method, call.url(), params={"wrongName": "x"}, headers=headers)
        assert named(answer) == ["wrongName"], call.name


async def test_every_parameter_is_taken_once_and_in_one_spelling(exchange: Exchange) -> None:
    tried = set()
    for call in calls(exchange.app.openapi()):
        headers = await headers_for(exchange, call)
        for name in {each["name"] for each in call.parameters if each["in"] == "query"}:
            twice = await exchange.client.request(call.method, f"{call.url()}?{name}=1&{name}=1", headers=headers)
            assert named(twice) == [name], (call.name, name)
            if (snake := snake_case(name)) != name:
                url = f"{call.url()}?{name}=1&{snake}=2"
                assert named(await exchange.client.request(call.method, url, headers=headers)) == [snake], call.name
                tried.add(name)
    assert {"instrumentId", "userId", "startTime"} <= tried


def snake_case(name: str) -> str:
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name)


async def test_every_body_names_a_member_that_it_does_not_know_or_that_comes_twice(exchange: Exchange) -> None:
    for call in calls(exchange.app.openapi()):
        if call.body is None:
            continue
        headers = {**await headers_for(exchange, call), **JSON}
        assert call.body["additionalProperties"] is False, call.name
        answer = await exchange.client.request(call.method, call.url(), json={"reduceonly": True}, headers=headers)
        assert "reduceonly" in named(answer), call.name
        for name in call.body["properties"]:
            body = f'{{"{name}": null, "{name}": "1"}}'
            answer = await exchange.client.request(call.method, call.url(), content=body, headers=headers)
            assert named(answer) == [name], (call.name, name)
            if (snake := snake_case(name)) != name:
                body = f'{{"{name}": "1", "{snake}": "2"}}'
                answer = await exchange.client.request(call.method, call.url(), content=body, headers=headers)
                assert {name, snake} & set(named(answer)), (call.name, name)


async def test_a_body_is_refused_where_none_is_taken_unless_it_says_nothing(exchange: Exchange) -> None:
    for call in calls(exchange.app.openapi()):
        if call.body is None:
            headers = await headers_for(exchange, call)
            answer = await exchange.client.request(call.method, call.url(), json={"instrumentId": BTC}, headers=headers)
            assert named(answer) == ["body"], call.name
    headers = await sign_in(exchange, 1000)
    assert (await exchange.client.request("DELETE", "/api/orders", json={}, headers=headers)).status_code == 200


async def test_a_cancellation_with_a_wrong_name_cancels_nothing(exchange: Exchange, pool: Pool) -> None:
    await pool.execute(
        "INSERT INTO orders.orders (order_id, user_id, instrument_id, side, type, time_in_force, price, bound_price,"
        " quantity, status, stp_mode) VALUES (1, 1000, $1, 'BUY', 'LIMIT', 'GTC', 60000, 60000, 1, 'PLACED',"
        " 'EXPIRE_TAKER')",
        BTC,
    )
    headers = await sign_in(exchange, 1000)
    for query in ("wrongName=x", "clientOrderId=x", "instrumentid=x", "instrument=x", "userId=1000", "=x", "x"):
        assert (await exchange.client.delete(f"/api/orders?{query}", headers=headers)).status_code == 422, query
    url = f"/api/orders?instrumentId={BTC}&instrument_id=ETH-USDT-PERP"
    assert named(await exchange.client.delete(url, headers=headers)) == ["instrument_id"]
    assert await pool.fetchval("SELECT status FROM orders.orders") == "PLACED"
    assert await pool.fetchval("SELECT count(*) FROM orders.sagas") == 0
    # In snake_case it is the same parameter, and not an order to cancel everything.
    other = await exchange.client.delete("/api/orders?instrument_id=ETH-USDT-PERP", headers=headers)
    assert (other.status_code, other.json()["items"]) == (200, [])


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"stopLoss": {"stopPrice": "1"}}, "stopLoss"),
        ({"closePosition": True}, "closePosition"),
        ({"reduceonly": True}, "reduceonly"),
        ({"reduceOnly": True, "reduce_only": False}, "reduce_only"),
    ],
)
async def test_orders_name_what_they_do_not_know_alone_and_in_a_batch(
    exchange: Exchange, changes: dict[str, Any], field: str
) -> None:
    headers = await sign_in(exchange, 1000)
    order = {"instrumentId": BTC, "side": "BUY", "type": "LIMIT", "quantity": "0.1", "price": "60000", **changes}
    assert named(await exchange.client.post("/api/orders", json=order, headers=headers)) == [field]
    batch = (await exchange.client.post("/api/orders/batch", json={"orders": [order]}, headers=headers)).json()
    assert [error["field"] for error in batch["results"][0]["errors"]] == [field]
    amend = await exchange.client.post("/api/orders/1/amend", json={"price": "1", **changes}, headers=headers)
    assert field in named(amend)


async def test_a_member_that_comes_twice_deep_inside_is_named(exchange: Exchange) -> None:
    body = '{"orders": [{"side": "BUY", "side": "SELL"}]}'
    headers = {**await sign_in(exchange, 1000), **JSON}
    assert named(await exchange.client.post("/api/orders/batch", content=body, headers=headers)) == ["side"]


async def test_what_is_missing_or_no_json_is_said(exchange: Exchange) -> None:
    async def login(content: bytes, content_type: str = "application/json") -> tuple[list[str], str]:
        headers = {"Content-Type": content_type}
        answer = await exchange.client.post("/api/auth/login", content=content, headers=headers)
        return named(answer), answer.json()["errors"][0]["message"]

    good = json.dumps({"email": "alice@example.com", "password": PASSWORD}).encode()
    assert await login(b'{"email": ') == (["body"], "Expected JSON: Expecting value at character 10")
    assert await login(b'{"email": "alice@example.com"}') == (["password"], "It is needed, and missing")
    for fields, message in (await login(b""), await login(b"[]"), await login(good, "text/plain")):
        assert (fields, "a JSON object, with Content-Type: application/json" in message) == (["body"], True), message
    assert named(await exchange.client.get("/api/market/kline?period=1m")) == ["symbol"]
    assert named(await exchange.client.get(f"/api/market/kline?symbol={BTC}&instrumentId=X&period=1m")) == [
        "instrumentId"
    ]


async def test_operators_list_what_is_anybodys_and_users_only_their_own(exchange: Exchange, pool: Pool) -> None:
    bob_id = await exchange.add_user("bob@example.com")
    admin, bob = await sign_in(exchange, 1000, "admin"), await sign_in(exchange, bob_id)
    await pool.execute(
        "INSERT INTO orders.orders (order_id, user_id, instrument_id, side, type, time_in_force, price, bound_price,"
        " quantity, status, stp_mode) VALUES (1, $1, $2, 'BUY', 'LIMIT', 'GTC', 60000, 60000, 1, 'PLACED',"
        " 'EXPIRE_TAKER')",
        bob_id,
        BTC,
    )
    for spelling in ("userId", "user_id"):
        listed = (await exchange.client.get(f"/api/orders?{spelling}={bob_id}", headers=admin)).json()["items"]
        assert [(order["orderId"], order["userId"]) for order in listed] == [(1, str(bob_id))]
    assert (await exchange.client.get("/api/orders", headers=admin)).json()["items"] == []
    for path in ("/api/orders", "/api/trades", "/api/ledger/entries", "/api/funding/payments"):
        for user_id, status in ((1000, 403), (bob_id, 200)):
            answer = await exchange.client.get(path, params={"userId": user_id}, headers=bob)
            assert answer.status_code == status, (path, answer.text)
        assert (await exchange.client.get(path, params={"userId": bob_id}, headers=admin)).status_code == 200


async def test_no_address_is_redirected(exchange: Exchange) -> None:
    body = {"email": "alice@example.com", "password": PASSWORD}
    answer = await exchange.client.post("/api/auth/login/", json=body)
    assert (answer.status_code, answer.json()["code"]) == (404, "NOT_FOUND")
    headers = bearer((await exchange.login())["accessToken"])
    for call in calls(exchange.app.openapi()):
        for url in {f"{call.url()}/", call.url().replace("/api/", "/api//")} - {call.url()}:
            answer = await exchange.client.request(call.method, url, headers=headers)
            assert answer.status_code in (404, 405), (call.name, url)
            assert "location" not in answer.headers

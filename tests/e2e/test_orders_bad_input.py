"""Whatever a client sends, it gets the contract's problem document and nothing is written."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from tests.exchange import BTC, Exchange, Trader

JSON = {"Content-Type": "application/json"}
GOOD: dict[str, Any] = {"instrumentId": BTC, "side": "BUY", "type": "LIMIT", "quantity": "0.001", "price": "60000"}
ROWS = """
    SELECT (SELECT count(*) FROM orders.orders), (SELECT count(*) FROM orders.sagas),
           (SELECT count(*) FROM ledger.ledger_entries), (SELECT count(*) FROM ledger.journals),
           (SELECT count(*) FROM ledger.ledger_balances), (SELECT count(*) FROM ledger.margin_holds),
           (SELECT count(*) FROM ledger.steps), (SELECT count(*) FROM risk.exposures),
           (SELECT count(*) FROM matching.commands
            WHERE payload ->> 'kind' NOT IN ('MARK_PRICE', 'SET_TERMS'))
"""


@pytest.fixture(scope="module")
async def trader(exchange: Exchange, admin: Trader) -> Trader:
    return await exchange.trader(admin, "100000")


async def rows(exchange: Exchange) -> tuple[int, ...]:
    record = await exchange.pool.fetchrow(ROWS)
    assert record is not None
    return tuple(record)


async def assert_refused(
    exchange: Exchange, client: httpx.AsyncClient, request: httpx.Request, status: int, code: str
) -> dict[str, Any]:
    """A problem document of this code, and no row more than before; the document."""
    before = await rows(exchange)
    answer = await client.send(request)
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = answer.json()
    assert problem["status"] == status
    assert {"type", "title", "status", "detail", "code"} <= set(problem)
    assert "Traceback" not in answer.text
    assert await rows(exchange) == before
    return problem


def invalid(member: str, *values: object) -> list[tuple[dict[str, Any], int, str]]:
    return [({member: value}, 422, "VALIDATION_FAILED") for value in values]


BAD_ORDERS: list[tuple[dict[str, Any], int, str]] = [
    *invalid("quantity", None, "", "x", [], {}, "1,5", "0x1", " "),
    *invalid("quantity", "0", "-0.001", 0, -1, "-0", "1e-400"),
    *invalid("quantity", "NaN", "-NaN", "sNaN", "Infinity", "-Infinity"),
    *invalid("quantity", "1e400", "1e30", 10**30, "1e1000000000", 1e300),
    ({"quantity": True}, 422, "VALIDATION_FAILED"),
    ({"quantity": "9" * 5000}, 422, "VALIDATION_FAILED"),
    ({"quantity": "0.0015"}, 400, "QUANTITY_NOT_ON_LOT"),
    ({"quantity": "0.001000000001"}, 400, "QUANTITY_NOT_ON_LOT"),
    ({"quantity": "1e-18"}, 400, "QUANTITY_NOT_ON_LOT"),
    ({"quantity": "0.001", "price": "1000"}, 400, "PRICE_OUT_OF_BAND"),
    *invalid("price", None, "", "x", [], {}, "0", "-1", "NaN", "Infinity"),
    *invalid("price", "1e400", "1e30", 10**30, "1e-400"),
    ({"price": "60000.05"}, 400, "PRICE_NOT_ON_TICK"),
    ({"price": 60000.05}, 400, "PRICE_NOT_ON_TICK"),
    ({"price": "90000.1"}, 400, "PRICE_OUT_OF_BAND"),
    ({"price": "29999.9"}, 400, "PRICE_OUT_OF_BAND"),
    ({"price": "999999999999"}, 400, "PRICE_OUT_OF_BAND"),
    ({"type": "MARKET"}, 422, "VALIDATION_FAILED"),
    ({"instrumentId": ""}, 404, "INSTRUMENT_NOT_FOUND"),
    ({"instrumentId": "BTC"}, 404, "INSTRUMENT_NOT_FOUND"),
    ({"instrumentId": "btc-usdt-perp"}, 404, "INSTRUMENT_NOT_FOUND"),
    ({"instrumentId": "'; --"}, 404, "INSTRUMENT_NOT_FOUND"),
    ({"instrumentId": "é"}, 404, "INSTRUMENT_NOT_FOUND"),
    *invalid("instrumentId", None, 1, [], "x" * 65, "BTC\x00", "\ud800"),
    *invalid("side", None, "", "buy", "LONG", 1),
    *invalid("type", None, "", "limit", "ICEBERG", 1),
    *invalid("timeInForce", None, "", "GTD", 1),
    *invalid("stpMode", None, "", "NONE"),
    *invalid("clientOrderId", "", "x" * 37, 5, [], "a\x00b", "\udfff"),
]


@pytest.mark.parametrize(("change", "status", "code"), BAD_ORDERS)
async def test_a_bad_order_is_refused(
    exchange: Exchange, trader: Trader, change: dict[str, Any], status: int, code: str
) -> None:
    # Escaped to ASCII, which JSON allows also for what is no character.
    request = trader.client.build_request("POST", "/api/orders", content=json.dumps({**GOOD, **change}), headers=JSON)
    await assert_refused(exchange, trader.client, request, status, code)


@pytest.mark.parametrize("missing", ["instrumentId", "side", "type", "quantity", "price"])
async def test_what_an_order_must_have_is_named_when_missing(exchange: Exchange, trader: Trader, missing: str) -> None:
    order = {name: value for name, value in GOOD.items() if name != missing}
    request = trader.client.build_request("POST", "/api/orders", json=order)
    problem = await assert_refused(exchange, trader.client, request, 422, "VALIDATION_FAILED")
    assert missing in str(problem)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"x"',
        b"5",
        b"\xff\xfe",
        b'{"quantity": 01}',
        b"[" * 100_000 + b"]" * 100_000,
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        b'{"orders":' + b"[" * 50_000 + b"]" * 50_000 + b"}",
        b"9" * 100_000,
    ],
    ids=lambda body: repr(body[:12]),
)
@pytest.mark.parametrize("path", ["/api/orders", "/api/orders/batch", "/api/risk/pre-check"])
async def test_a_body_that_is_not_an_object_is_refused(
    exchange: Exchange, trader: Trader, path: str, body: bytes
) -> None:
    request = trader.client.build_request("POST", path, content=body, headers=JSON)
    await assert_refused(exchange, trader.client, request, 422, "VALIDATION_FAILED")


@pytest.mark.parametrize("figure", ["NaN", "Infinity", "-Infinity", "1e400", "9" * 5000])
async def test_numbers_that_json_does_not_know_or_money_cannot_be_are_refused(
    exchange: Exchange, trader: Trader, figure: str
) -> None:
    body = f'{{"instrumentId":"{BTC}","side":"BUY","type":"LIMIT","quantity":{figure},"price":"60000"}}'
    request = trader.client.build_request("POST", "/api/orders", content=body.encode(), headers=JSON)
    await assert_refused(exchange, trader.client, request, 422, "VALIDATION_FAILED")
    batch = f'{{"orders":[{body}]}}'.encode()
    before = await rows(exchange)
    answer = await trader.client.post("/api/orders/batch", content=batch, headers=JSON)
    codes = [answer.json().get("code")] if answer.status_code != 200 else [r["code"] for r in answer.json()["results"]]
    assert codes == ["VALIDATION_FAILED"]
    assert await rows(exchange) == before


async def test_a_body_of_10_mb_is_refused_before_it_is_sent(exchange: Exchange, trader: Trader) -> None:
    before = await rows(exchange)
    head = "POST /api/orders HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 10485760\r\n\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", exchange.settings.api_port)
    writer.write(head.encode())
    answer = await asyncio.wait_for(reader.read(), 10)
    writer.close()
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b'"code":"REQUEST_TOO_LARGE"' in answer
    assert await rows(exchange) == before


async def test_a_body_that_does_not_say_its_length_is_refused_at_the_limit(exchange: Exchange, trader: Trader) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(17):
            yield b" " * 65_536

    request = trader.client.build_request("POST", "/api/orders", content=chunks(), headers=JSON)
    await assert_refused(exchange, trader.client, request, 413, "REQUEST_TOO_LARGE")


@pytest.mark.parametrize(
    "batch",
    [
        {},
        {"orders": None},
        {"orders": {}},
        {"orders": "x"},
        {"orders": []},
        {"orders": [GOOD] * 501},
    ],
    ids=["nothing", "null", "object", "string", "empty", "501 orders"],
)
async def test_a_bad_batch_is_refused_whole(exchange: Exchange, trader: Trader, batch: dict[str, Any]) -> None:
    request = trader.client.build_request("POST", "/api/orders/batch", json=batch)
    await assert_refused(exchange, trader.client, request, 422, "VALIDATION_FAILED")


async def test_orders_of_a_batch_that_are_no_orders_are_refused_in_their_places(
    exchange: Exchange, trader: Trader
) -> None:
    before = await rows(exchange)
    orders: list[Any] = [None, 1, "x", [], {}, {**GOOD, "quantity": None}, {**GOOD, "clientOrderId": "a\x00b"}]
    answer = await trader.client.post("/api/orders/batch", json={"orders": orders})
    assert answer.status_code == 200, answer.text
    results = answer.json()["results"]
    assert [(r["status"], r["code"]) for r in results] == [(422, "VALIDATION_FAILED")] * len(orders)
    assert await rows(exchange) == before


IDS = ["0", "-1", "x", "1.5", "9" * 30, str(2**53), "1e3", "%00", "NaN", "%FF"]


@pytest.mark.parametrize("method", ["GET", "DELETE"])
@pytest.mark.parametrize("order_id", IDS)
async def test_an_order_id_that_cannot_be_one_is_refused(
    exchange: Exchange, trader: Trader, method: str, order_id: str
) -> None:
    request = trader.client.build_request(method, f"/api/orders/{order_id}")
    await assert_refused(exchange, trader.client, request, 422, "VALIDATION_FAILED")


@pytest.mark.parametrize("method", ["GET", "DELETE"])
@pytest.mark.parametrize("order_id", ["999999", str(2**53 - 1)])
async def test_an_order_that_does_not_exist_is_not_found(
    exchange: Exchange, trader: Trader, method: str, order_id: str
) -> None:
    request = trader.client.build_request(method, f"/api/orders/{order_id}")
    await assert_refused(exchange, trader.client, request, 404, "ORDER_NOT_FOUND")


@pytest.mark.parametrize("path", ["/api/orders", "/api/trades", "/api/ledger/entries"])
@pytest.mark.parametrize(
    "query",
    [
        *({"limit": value} for value in ("0", "-1", "501", "x", "1.5", "9" * 30, "")),
        *({"cursor": value} for value in ("0", "-1", "x", "1.5", str(2**63), "9" * 5000, "' OR 1=1", "")),
    ],
    ids=lambda query: str(query)[:30],
)
async def test_a_bad_cursor_or_limit_is_refused(
    exchange: Exchange, trader: Trader, path: str, query: dict[str, str]
) -> None:
    request = trader.client.build_request("GET", path, params=query)
    await assert_refused(exchange, trader.client, request, 422, "VALIDATION_FAILED")


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/api/orders?status=OPEN", 422, "VALIDATION_FAILED"),
        ("GET", "/api/orders?instrumentId=a%00b", 422, "VALIDATION_FAILED"),
        ("GET", "/api/ledger/entries?asset=%00", 422, "VALIDATION_FAILED"),
        ("DELETE", "/api/orders?instrumentId=DOGE", 404, "INSTRUMENT_NOT_FOUND"),
        ("GET", "/api/ledger/balances?userId=x", 422, "VALIDATION_FAILED"),
        ("GET", "/api/ledger/balances?userId=-1", 422, "VALIDATION_FAILED"),
        ("GET", f"/api/positions?userId={2**63}", 422, "VALIDATION_FAILED"),
        ("GET", "/api/nothing", 404, "NOT_FOUND"),
        ("PATCH", "/api/orders", 405, "METHOD_NOT_ALLOWED"),
        ("POST", "/api/orders?wait=filled", 422, "VALIDATION_FAILED"),
        ("PUT", "/api/positions/DOGE/leverage", 404, "INSTRUMENT_NOT_FOUND"),
    ],
)
async def test_bad_addresses_are_refused(
    exchange: Exchange, trader: Trader, method: str, path: str, status: int, code: str
) -> None:
    body = {"POST": GOOD, "PUT": {"leverage": 5}}.get(method)
    request = trader.client.build_request(method, path, json=body)
    await assert_refused(exchange, trader.client, request, status, code)


@pytest.mark.parametrize("path", ["/api/ledger/deposits", "/api/ledger/withdrawals"])
@pytest.mark.parametrize(
    "change",
    [
        *({"amount": value} for value in ("0", "-1", "NaN", "Infinity", "1e400", "1e16", "0.000000001", "x", None)),
        *({"userId": value} for value in ("0", "-1", "x", str(2**63), None, 1.5)),
        *({"asset": value} for value in ("", "x" * 17, "DOGE", "US\x00DT", None)),
        *({"reference": value} for value in ("", "x" * 129, "a\x00b", None)),
    ],
    ids=lambda change: str(change)[:30],
)
async def test_a_bad_transfer_is_refused(
    exchange: Exchange, admin: Trader, trader: Trader, path: str, change: dict[str, Any]
) -> None:
    transfer = {"userId": trader.user_id, "asset": "USDT", "amount": "1", "reference": "bad-input", **change}
    request = admin.client.build_request("POST", path, json=transfer)
    await assert_refused(exchange, admin.client, request, 422, "VALIDATION_FAILED")


async def test_after_all_this_a_good_order_is_taken(exchange: Exchange, admin: Trader, trader: Trader) -> None:
    assert (await trader.place("BUY", "0.001", "60000", clientOrderId="x" * 36))["status"] == "PLACED"
    await exchange.until_settled()
    await exchange.audit(admin)
    assert "Traceback" not in exchange.log("api")

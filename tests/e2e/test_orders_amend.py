"""Amending orders over HTTP on the real processes: what is refused, and races with fills and cancellations."""

import asyncio
import json
from collections.abc import AsyncIterator
from decimal import Decimal
from typing import Any

import httpx
import pytest

from tests.exchange import BTC, INTERNAL_TOKEN, Exchange, Trader
from tests.waiting import until

D = Decimal
JSON = {"Content-Type": "application/json"}
INTERNAL = {"X-Internal-Token": INTERNAL_TOKEN}


@pytest.fixture(autouse=True)
async def audited(exchange: Exchange, admin: Trader) -> AsyncIterator[None]:
    """After every test the ledger is clean, no amendment is left under way, and the next test finds empty books."""
    yield
    await exchange.until_settled()
    await exchange.audit(admin)
    rows = await exchange.pool.fetch(
        "SELECT order_id FROM orders.orders WHERE status IN ('PLACED', 'PARTIALLY_FILLED', 'CANCEL_REQUESTED')"
    )
    for row in rows:
        await exchange.client.post("/api/matching/cancel", json={"orderId": row[0]}, headers=INTERNAL)
    await exchange.until_settled()
    assert not await exchange.pool.fetchval(
        "SELECT EXISTS (SELECT FROM orders.amendments WHERE status IN ('PENDING', 'ACCEPTED'))"
    )


async def amend(trader: Trader, order_id: int, *, wait: bool = True, **change: Any) -> httpx.Response:
    return await trader.client.post(
        f"/api/orders/{order_id}/amend", json=change, params={"wait": "placed"} if wait else None
    )


def code(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["code"]


async def test_price_and_quantity_are_amended_and_the_margin_follows(exchange: Exchange, admin: Trader) -> None:
    alice = await exchange.trader(admin, "1000")
    order = await alice.place("BUY", "0.1", "50000")
    # 5000 / 10 + 5000 * 0.0005
    assert await alice.balance() == (D("497.5"), D("502.5"))
    answer = await amend(alice, order["orderId"], price="55000", quantity="0.12")
    assert answer.status_code == 200, answer.text
    view = answer.json()
    assert (view["status"], view["price"], view["quantity"]) == ("PLACED", "55000", "0.12")
    assert (view["amendmentStatus"], view["amendmentFailureReason"]) == ("AMENDED", None)
    assert view["amendmentId"] > order["orderId"]
    # 6600 / 10 + 3.3
    assert await alice.balance() == (D("336.7"), D("663.3"))
    assert (await alice.order(order["orderId"]))["quantity"] == "0.12"

    # Right after it the next one; without the engine's answer it says how far it is.
    later = (await amend(alice, order["orderId"], wait=False, quantity="0.02")).json()
    assert later["amendmentStatus"] in ("PENDING", "ACCEPTED", "AMENDED")
    again = (await amend(alice, order["orderId"], price="50000")).json()
    assert (again["amendmentStatus"], again["price"], again["quantity"]) == ("AMENDED", "50000", "0.02")
    assert await alice.balance() == (D("899.5"), D("100.5"))


async def test_an_amendment_that_cannot_be_paid_fails_and_one_to_less_never_does(
    exchange: Exchange, admin: Trader
) -> None:
    alice = await exchange.trader(admin, "502.5")
    order = await alice.place("BUY", "0.1", "50000")
    await exchange.until_settled()
    dear = (await amend(alice, order["orderId"], quantity="0.2")).json()
    assert (dear["amendmentStatus"], dear["amendmentFailureReason"]) == ("FAILED", "INSUFFICIENT_MARGIN")
    assert (dear["status"], dear["quantity"]) == ("PLACED", "0.1")
    cheap = (await amend(alice, order["orderId"], quantity="0.05")).json()
    assert (cheap["amendmentStatus"], cheap["quantity"]) == ("AMENDED", "0.05")


async def test_an_amended_order_may_trade_and_what_is_filled_counts(exchange: Exchange, admin: Trader) -> None:
    alice, bob = await exchange.trader(admin, "10000"), await exchange.trader(admin, "10000")
    order = await alice.place("SELL", "0.1", "60000")
    await bob.place("BUY", "0.04", "60000")
    await exchange.until_settled()
    assert code(await amend(alice, order["orderId"], quantity="0.04")) == (400, "ORDER_NOT_AMENDABLE")
    larger = (await amend(alice, order["orderId"], quantity="0.12")).json()
    assert (larger["status"], larger["filledQuantity"]) == ("PARTIALLY_FILLED", "0.04")
    bid = await bob.place("BUY", "0.2", "59000")
    crossing = (await amend(alice, order["orderId"], price="59000")).json()
    assert (crossing["status"], crossing["filledQuantity"], crossing["quantity"]) == ("FILLED", "0.12", "0.12")
    assert (await bob.order(bid["orderId"]))["filledQuantity"] == "0.08"
    assert code(await amend(alice, order["orderId"], quantity="1")) == (400, "ORDER_NOT_AMENDABLE")


@pytest.fixture(scope="module")
async def owner(exchange: Exchange, admin: Trader) -> Trader:
    return await exchange.trader(admin, "100000")


NO_AMOUNTS: list[Any] = ["0", "-1", "NaN", "Infinity", "1e400", 10**30, "x", "", [], {}, True]
BAD: list[tuple[dict[str, Any], int, str]] = [
    ({}, 422, "VALIDATION_FAILED"),
    ({"price": None, "quantity": None}, 422, "VALIDATION_FAILED"),
    ({"price": "60000", "quantity": "0.100"}, 422, "VALIDATION_FAILED"),
    ({"price": "60000.05"}, 400, "PRICE_NOT_ON_TICK"),
    ({"price": "90000.1"}, 400, "PRICE_OUT_OF_BAND"),
    ({"price": "29999.9"}, 400, "PRICE_OUT_OF_BAND"),
    ({"quantity": "0.0005"}, 400, "QUANTITY_NOT_ON_LOT"),
    *(({member: value}, 422, "VALIDATION_FAILED") for member in ("price", "quantity") for value in NO_AMOUNTS),
]


@pytest.mark.parametrize(("change", "status", "problem"), BAD)
async def test_a_bad_amendment_is_refused_and_writes_nothing(
    exchange: Exchange, owner: Trader, change: dict[str, Any], status: int, problem: str
) -> None:
    order = await owner.place("SELL", "0.1", "60000")
    await exchange.until_settled()
    path = f"/api/orders/{order['orderId']}/amend"
    answer = await owner.client.post(path, content=json.dumps(change), headers=JSON)
    assert code(answer) == (status, problem), answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    count = "SELECT count(*) FROM orders.amendments WHERE order_id = $1"
    assert await exchange.pool.fetchval(count, order["orderId"]) == 0


@pytest.mark.parametrize("body", [b"", b"{", b"null", b"[]", b'"x"', b"5", b"\xff\xfe"])
async def test_a_body_that_is_no_object_is_refused(owner: Trader, body: bytes) -> None:
    answer = await owner.client.post("/api/orders/1/amend", content=body, headers=JSON)
    assert code(answer) == (422, "VALIDATION_FAILED")


@pytest.mark.parametrize("order_id", ["0", "-1", "x", "1.5", str(2**53), "%00"])
async def test_an_id_that_cannot_be_one_is_refused(owner: Trader, order_id: str) -> None:
    answer = await owner.client.post(f"/api/orders/{order_id}/amend", json={"quantity": "1"})
    assert code(answer) == (422, "VALIDATION_FAILED")


async def test_orders_of_others_and_of_nobody_are_not_found(exchange: Exchange, admin: Trader, owner: Trader) -> None:
    stranger = await exchange.trader(admin, "1000")
    order = await owner.place("SELL", "0.1", "60000")
    for trader, order_id in ((stranger, order["orderId"]), (admin, order["orderId"]), (owner, 2**53 - 1)):
        assert code(await amend(trader, order_id, quantity="0.2")) == (404, "ORDER_NOT_FOUND")
    answer = await exchange.client.post(f"/api/orders/{order['orderId']}/amend", json={"quantity": "0.2"})
    assert code(answer) == (401, "UNAUTHENTICATED")
    assert (await owner.order(order["orderId"]))["quantity"] == "0.1"


async def test_orders_without_a_limit_and_ended_ones_are_not_amendable(exchange: Exchange, owner: Trader) -> None:
    cancelled = await owner.place("SELL", "0.1", "60000")
    await owner.client.delete(f"/api/orders/{cancelled['orderId']}")
    await exchange.until_settled()
    stop = await owner.place("SELL", "0.1", type="STOP_MARKET", stopPrice="50000")
    market = await owner.place("SELL", "0.1")
    for order in (cancelled, stop, market):
        assert code(await amend(owner, order["orderId"], quantity="0.2")) == (400, "ORDER_NOT_AMENDABLE")


async def test_a_waiting_stop_order_can_be_amended(owner: Trader) -> None:
    stop = await owner.place("SELL", "0.1", "50000", type="STOP_LIMIT", stopPrice="51000")
    amended = (await amend(owner, stop["orderId"], price="50500", quantity="0.2")).json()
    assert (amended["amendmentStatus"], amended["price"], amended["quantity"]) == ("AMENDED", "50500", "0.2")
    assert amended["status"] == "PLACED"


async def test_an_order_is_amended_as_soon_as_it_is_with_the_engine(owner: Trader) -> None:
    order = {"instrumentId": BTC, "side": "SELL", "type": "LIMIT", "quantity": "0.1", "price": "61000"}
    pending = (await owner.send(order)).json()
    amended = await amend(owner, pending["orderId"], quantity="0.2")
    assert (amended.json()["amendmentStatus"], amended.json()["quantity"]) == ("AMENDED", "0.2")


async def test_amendments_of_one_order_at_the_same_time_are_carried_out_one_after_the_other(
    exchange: Exchange, owner: Trader
) -> None:
    order = await owner.place("SELL", "0.1", "60000")
    changes = [f"0.{n}" for n in range(2, 8)]
    answers = await asyncio.gather(*(amend(owner, order["orderId"], quantity=quantity) for quantity in changes))
    assert [answer.status_code for answer in answers] == [200] * len(changes), [answer.text for answer in answers]
    assert {answer.json()["amendmentStatus"] for answer in answers} == {"AMENDED"}
    assert (await owner.order(order["orderId"]))["quantity"] in changes
    await exchange.until_settled()


async def test_amending_and_cancelling_at_the_same_time_leaves_no_money_behind(
    exchange: Exchange, admin: Trader
) -> None:
    alice = await exchange.trader(admin, "10000")
    orders = await asyncio.gather(*(alice.place("BUY", "0.01", "50000") for _ in range(20)))
    requests = []
    for order in orders:
        requests.append(amend(alice, order["orderId"], wait=False, quantity="0.02"))
        requests.append(alice.client.delete(f"/api/orders/{order['orderId']}"))
    for answer in await asyncio.gather(*requests):
        assert answer.status_code == 200 or code(answer) == (400, "ORDER_NOT_AMENDABLE"), answer.text

    async def all_cancelled() -> bool:
        return (
            not (await alice.get("/api/orders", status="CANCEL_REQUESTED"))["items"]
            and not (await alice.get("/api/orders", status="PLACED"))["items"]
        )

    await until(all_cancelled, 10, "the orders to be cancelled")
    await exchange.until_settled()
    assert await alice.balance() == (D(10_000), D(0))


async def test_amending_orders_while_they_are_filled_keeps_the_books(exchange: Exchange, admin: Trader) -> None:
    alice, bob = await exchange.trader(admin, "50000"), await exchange.trader(admin, "50000")
    orders = await asyncio.gather(*(alice.place("SELL", "0.02", "60000") for _ in range(20)))
    amendments = [
        amend(
            alice, order["orderId"], wait=False, quantity=("0.01", "0.03")[n % 2], price=("60000", "60010")[n % 3 > 1]
        )
        for n, order in enumerate(orders)
    ]
    takers = [bob.place("BUY", "0.01", "60010") for _ in range(40)]
    answers = (await asyncio.gather(asyncio.gather(*amendments), asyncio.gather(*takers)))[0]
    for answer in answers:
        assert answer.status_code == 200 or code(answer) == (400, "ORDER_NOT_AMENDABLE"), answer.text
    await exchange.until_settled()
    for order in orders:
        view = await alice.order(order["orderId"])
        assert D(view["filledQuantity"]) <= D(view["quantity"]) <= D("0.03")
    sides = [(await trader.position())["quantity"] for trader in (alice, bob)]
    assert sides[0] == sides[1]

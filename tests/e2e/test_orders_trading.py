"""Trading over HTTP on the real processes. Expected figures are worked out by hand in the comments; BTC has maker fee
0.02 %, taker fee 0.05 % and leverage 10, and an order reserves notional / leverage + taker fee.
"""

import asyncio
import json
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from decimal import Decimal
from typing import Any

import pytest
from websockets.asyncio.client import ClientConnection, connect

from tests.exchange import BTC, ETH, INTERNAL_TOKEN, SOL, Exchange, Trader
from tests.waiting import until

D = Decimal
INTERNAL = {"X-Internal-Token": INTERNAL_TOKEN}


@pytest.fixture(autouse=True)
async def audited(exchange: Exchange, admin: Trader) -> AsyncIterator[None]:
    """After every test the ledger is clean; the next one finds empty books."""
    yield
    await exchange.until_settled()
    await exchange.audit(admin)
    rows = await exchange.pool.fetch(
        "SELECT order_id FROM orders.orders WHERE status IN ('PLACED', 'PARTIALLY_FILLED', 'CANCEL_REQUESTED')"
    )
    for row in rows:
        await exchange.client.post("/api/matching/cancel", json={"orderId": row[0]}, headers=INTERNAL)
    await exchange.until_settled()


def limit(side: str, quantity: str, price: str, **terms: Any) -> dict[str, Any]:
    return {"instrumentId": BTC, "side": side, "type": "LIMIT", "quantity": quantity, "price": price, **terms}


async def until_status(trader: Trader, order_id: int, status: str) -> dict[str, Any]:
    async def reached() -> bool:
        return bool((await trader.order(order_id))["status"] == status)

    await until(reached, 10, f"order {order_id} to be {status}")
    return await trader.order(order_id)


async def test_trades_fees_margins_and_positions_add_up_to_the_last_decimal(exchange: Exchange, admin: Trader) -> None:
    alice, bob = await exchange.trader(admin, "10000"), await exchange.trader(admin, "10000")

    ask = await alice.place("SELL", "0.1", "60000")
    assert (ask["status"], ask["filledQuantity"], ask["averagePrice"]) == ("PLACED", "0", None)
    # 6000 / 10 + 6000 * 0.0005
    assert await alice.balance() == (D("9397"), D("603"))

    # LIMIT against LIMIT: at the maker's price.
    buy = await bob.place("BUY", "0.04", "60010")
    assert (buy["status"], buy["averagePrice"]) == ("FILLED", "60000")
    await exchange.until_settled()
    # Bob pays 2400 * 0.0005 = 1.2 and backs 0.04 with 240.
    assert await bob.balance() == (D("9758.8"), D("240"))
    # Alice pays 2400 * 0.0002 = 0.48, backs 0.04 with 240 and the open 0.06 with 3600 / 10 + 1.8.
    assert await alice.balance() == (D("9397.72"), D("601.8"))
    assert (await alice.order(ask["orderId"]))["status"] == "PARTIALLY_FILLED"
    assert (await alice.order(ask["orderId"]))["filledQuantity"] == "0.04"

    # MARKET: 0.05 at 60000, fees 1.5 and 0.6.
    assert (await bob.place("BUY", "0.05"))["status"] == "FILLED"
    await exchange.until_settled()
    assert await bob.balance() == (D("9457.3"), D("540"))
    assert await alice.balance() == (D("9398.62"), D("600.3"))
    await alice.client.delete(f"/api/orders/{ask['orderId']}")
    cancelled = await until_status(alice, ask["orderId"], "CANCELLED")
    assert (cancelled["filledQuantity"], cancelled["failureReason"]) == ("0.09", "USER_REQUEST")
    await exchange.until_settled()
    assert await alice.balance() == (D("9458.92"), D("540"))

    # An order that only reduces reserves nothing.
    await alice.place("BUY", "0.03", "59000")
    assert await alice.balance() == (D("9458.92"), D("540"))
    # Bob closes a third at 59000: -30 of profit, 180 of margin back, fee 1770 * 0.0005 = 0.885 (Alice: +30, 0.354).
    assert (await bob.place("SELL", "0.03"))["averagePrice"] == "59000"
    await exchange.until_settled()
    assert await bob.balance() == (D("9606.415"), D("360"))
    assert await alice.balance() == (D("9668.566"), D("360"))

    # Both flip: 0.06 closed (-30, +30) and 0.04 opened at 59500, margin 238; fees 5950 * 0.0005 and 5950 * 0.0002.
    await alice.place("BUY", "0.1", "59500")
    # What it opens has a margin of its own: 0.04 * 59500 / 10 = 238, and its fee of 2.975.
    assert await alice.balance() == (D("9427.591"), D("600.975"))
    assert (await bob.place("SELL", "0.1", "59500"))["status"] == "FILLED"
    await exchange.until_settled()
    assert await bob.balance() == (D("9695.44"), D("238"))
    assert await alice.balance() == (D("9819.376"), D("238"))

    short, long = await bob.position(), await alice.position()
    figures = ("side", "quantity", "entryPrice", "margin", "realizedPnl", "unrealizedPnl", "status")
    # Mark is 60000: 0.04 * 500 = 20.
    assert [short[name] for name in figures] == ["SHORT", "0.04", "59500", "238", "-60", "-20", "OPEN"]
    assert [long[name] for name in figures] == ["LONG", "0.04", "59500", "238", "60", "20", "OPEN"]
    # Equity is 238 - 20 of 2400; maintenance is met at (238 + 2380) / (0.04 * 1.005).
    assert (short["marginRatio"], short["liquidationPrice"]) == ("0.09083333", "65124.37810945")
    # Maintenance is met at (238 - 2380) / (0.04 * 0.005 - 0.04).
    assert long["liquidationPrice"] == "53819.09547739"

    trades = [await trader.get("/api/trades") for trader in (alice, bob)]
    assert [[t["fee"] for t in part["items"]] for part in trades] == [
        ["1.19", "0.354", "0.6", "0.48"],
        ["2.975", "0.885", "1.5", "1.2"],
    ]
    assert [t["realizedPnl"] for t in trades[1]["items"]] == ["-30", "-30", "0", "0"]
    assert {t["role"] for t in trades[0]["items"]} == {"MAKER"}
    assert {t["role"] for t in trades[1]["items"]} == {"TAKER"}
    assert [t["tradeId"] for t in trades[0]["items"]] == [t["tradeId"] for t in trades[1]["items"]]
    for trader in (alice, bob):
        await assert_entries_lead_to_balance(trader)


async def assert_entries_lead_to_balance(trader: Trader) -> None:
    """Every entry's balanceAfter follows from the one before, and the last is the balance."""
    available = reserved = D(0)
    for entry in reversed(await trader.pages("/api/ledger/entries", 3)):
        available += D(entry["deltaAvailable"])
        reserved += D(entry["deltaReserved"])
        assert D(entry["balanceAfter"]) == available, entry
    assert await trader.balance() == (available, reserved)


async def test_an_order_is_pending_at_once_and_follows_its_course(exchange: Exchange, admin: Trader) -> None:
    trader = await exchange.trader(admin, "1000")
    answer = await trader.send(limit("BUY", "0.01", "59000", clientOrderId="mine"))
    assert answer.status_code == 200
    first = answer.json()
    assert (first["status"], first["clientOrderId"], first["userId"]) == ("PENDING", "mine", trader.user_id)
    placed = await until_status(trader, first["orderId"], "PLACED")
    assert {**placed, "status": "PENDING", "updatedAt": first["updatedAt"]} == first


async def test_prices_improve_and_the_earlier_of_equal_orders_is_served_first(
    exchange: Exchange, admin: Trader
) -> None:
    makers = [await exchange.trader(admin, "1000") for _ in range(3)]
    prices = ["60010", "60000", "60000"]
    orders = [await maker.place("SELL", "0.01", price) for maker, price in zip(makers, prices, strict=True)]
    taker = await exchange.trader(admin, "2000")
    bought = await taker.place("BUY", "0.015", "60010")
    # 0.01 and 0.005 at 60000; none at 60010.
    assert (bought["filledQuantity"], bought["averagePrice"]) == ("0.015", "60000")
    await exchange.until_settled()
    states = [(await m.order(o["orderId"]))["status"] for m, o in zip(makers, orders, strict=True)]
    assert states == ["PLACED", "FILLED", "PARTIALLY_FILLED"]


@pytest.mark.parametrize(
    ("terms", "status", "reason", "filled"),
    [
        ({"type": "MARKET", "price": None}, "EXPIRED", "NO_LIQUIDITY", "0.01"),
        ({"timeInForce": "IOC"}, "EXPIRED", "IOC", "0.01"),
        ({"timeInForce": "FOK"}, "EXPIRED", "FOK_NOT_FILLABLE", "0"),
        ({"timeInForce": "FOK", "quantity": "0.01"}, "FILLED", None, "0.01"),
    ],
)
async def test_what_an_immediate_order_cannot_get_expires_and_its_money_returns(
    exchange: Exchange, admin: Trader, terms: dict[str, Any], status: str, reason: str | None, filled: str
) -> None:
    maker, taker = await exchange.trader(admin, "1000"), await exchange.trader(admin, "1000")
    await maker.place("SELL", "0.01", "60000")
    order = (await taker.send({**limit("BUY", "0.03", "60000"), **terms}, wait=True)).json()
    assert (order["status"], order["failureReason"], order["filledQuantity"]) == (status, reason, filled)
    await exchange.until_settled()
    # 0.01 costs 60 of margin and 0.3 of fee.
    expected = (D("939.7"), D("60")) if filled == "0.01" else (D("1000"), D("0"))
    assert await taker.balance() == expected
    stored = await taker.order(order["orderId"])
    assert {**stored, "updatedAt": order["updatedAt"]} == order


async def test_nobody_trades_with_themselves(exchange: Exchange, admin: Trader) -> None:
    trader = await exchange.trader(admin, "1000")
    resting = await trader.place("SELL", "0.01", "60000")
    taking = await trader.place("BUY", "0.01", "60000")
    assert (taking["status"], taking["failureReason"]) == ("EXPIRED", "SELF_TRADE")
    await exchange.until_settled()
    assert (await trader.order(resting["orderId"]))["status"] == "PLACED"
    assert (await trader.get("/api/trades"))["items"] == []


async def test_a_cancelled_order_ends_cancelled_gives_its_money_back_and_cannot_be_cancelled_again(
    exchange: Exchange, admin: Trader
) -> None:
    trader = await exchange.trader(admin, "1000")
    order = await trader.place("BUY", "0.1", "50000")
    assert await trader.balance() == (D("497.5"), D("502.5"))
    answer = await trader.client.delete(f"/api/orders/{order['orderId']}")
    assert answer.json() == {"orderId": order["orderId"], "status": "CANCEL_REQUESTED"}
    cancelled = await until_status(trader, order["orderId"], "CANCELLED")
    assert cancelled["failureReason"] == "USER_REQUEST"
    await exchange.until_settled()
    assert await trader.balance() == (D("1000"), D("0"))
    again = await trader.client.delete(f"/api/orders/{order['orderId']}")
    assert (again.status_code, again.json()["code"]) == (400, "ORDER_NOT_CANCELLABLE")


async def test_an_order_cancelled_at_once_is_cancelled_after_it_was_placed(exchange: Exchange, admin: Trader) -> None:
    trader = await exchange.trader(admin, "1000")
    ids = []
    for _ in range(5):
        order_id = (await trader.send(limit("BUY", "0.001", "59000"))).json()["orderId"]
        assert (await trader.client.delete(f"/api/orders/{order_id}")).status_code == 200
        ids.append(order_id)
    await exchange.until_settled()
    assert [(await trader.order(order_id))["status"] for order_id in ids] == ["CANCELLED"] * 5
    assert await trader.balance() == (D("1000"), D("0"))


async def test_cancel_all_takes_the_callers_orders_of_one_instrument_or_of_all(
    exchange: Exchange, admin: Trader
) -> None:
    trader, other = await exchange.trader(admin, "1000"), await exchange.trader(admin, "1000")
    mine = [await trader.place("BUY", "0.001", price) for price in ("59000", "59001", "59002")]
    eth = await trader.place("BUY", "0.01", "2900", instrumentId=ETH)
    theirs = await other.place("BUY", "0.001", "59000")

    answer = await trader.client.delete("/api/orders", params={"instrumentId": BTC})
    assert [item["orderId"] for item in answer.json()["items"]] == sorted((o["orderId"] for o in mine), reverse=True)
    await exchange.until_settled()
    assert [(await trader.order(o["orderId"]))["status"] for o in mine] == ["CANCELLED"] * 3
    assert (await trader.order(eth["orderId"]))["status"] == "PLACED"

    answer = await trader.client.delete("/api/orders")
    assert [item["orderId"] for item in answer.json()["items"]] == [eth["orderId"]]
    await exchange.until_settled()
    assert await trader.balance() == (D("1000"), D("0"))
    assert (await other.order(theirs["orderId"]))["status"] == "PLACED"
    assert (await trader.client.delete("/api/orders")).json()["items"] == []


async def test_a_post_only_order_rests_or_is_rejected_and_gives_its_money_back(
    exchange: Exchange, admin: Trader
) -> None:
    alice, bob = await exchange.trader(admin, "10000"), await exchange.trader(admin, "10000")
    assert (await alice.place("SELL", "0.1", "60000", postOnly=True))["status"] == "PLACED"
    refused = await bob.place("BUY", "0.1", "60000", postOnly=True)
    assert (refused["status"], refused["failureReason"]) == ("REJECTED", "POST_ONLY_WOULD_CROSS")
    await exchange.until_settled()
    assert await bob.balance() == (D("10000"), D("0"))


async def test_a_reduce_only_order_needs_a_position_and_shrinks_with_it(exchange: Exchange, admin: Trader) -> None:
    alice, bob = await exchange.trader(admin, "10000"), await exchange.trader(admin, "10000")
    refused = (await alice.send(limit("SELL", "0.1", "61000", reduceOnly=True))).json()
    failed = await until_status(alice, refused["orderId"], "FAILED")
    assert failed["failureReason"] == "REDUCE_ONLY_REJECTED"

    await bob.place("SELL", "0.1", "60000")
    await alice.place("BUY", "0.1", "60000")
    await exchange.until_settled()
    before = await alice.balance()
    closing = await alice.place("SELL", "0.25", "61000", reduceOnly=True)
    assert closing["status"] == "PLACED"
    await exchange.until_settled()
    assert await alice.balance() == before
    assert (await alice.order(closing["orderId"]))["quantity"] == "0.1"

    # Half of the position is closed otherwise: the order follows it down.
    await bob.place("BUY", "0.05", "59000")
    await alice.place("SELL", "0.05", "59000")
    await exchange.until_settled()
    assert (await alice.order(closing["orderId"]))["quantity"] == "0.05"
    await bob.place("BUY", "0.2", "61000")
    filled = await until_status(alice, closing["orderId"], "FILLED")
    assert filled["filledQuantity"] == "0.05"
    await exchange.until_settled()
    assert (await alice.position())["quantity"] == "0"


async def test_a_stop_order_waits_for_the_last_price_and_then_trades(exchange: Exchange, admin: Trader) -> None:
    alice, bob = await exchange.trader(admin, "10000"), await exchange.trader(admin, "10000")
    carol = await exchange.trader(admin, "10000")
    await bob.place("SELL", "0.01", "60000")
    await carol.place("BUY", "0.01", "60000")
    stop = await alice.place("BUY", "0.02", type="STOP_MARKET", stopPrice="60500", workingType="LAST")
    assert (stop["status"], stop["stopPrice"], stop["workingType"]) == ("PLACED", "60500", "LAST")
    await bob.place("SELL", "0.05", "60500")
    await carol.place("BUY", "0.03", "60500")
    triggered = await until_status(alice, stop["orderId"], "FILLED")
    assert triggered["averagePrice"] == "60500"


async def test_a_stop_order_waits_for_the_mark_price(exchange: Exchange, admin: Trader) -> None:
    alice, bob = await exchange.trader(admin, "10000"), await exchange.trader(admin, "10000")
    stop = await alice.place("SELL", "0.02", "57000", type="STOP_LIMIT", stopPrice="58000")
    assert stop["status"] == "PLACED"
    await bob.place("BUY", "0.02", "57500")
    await admin.client.post(f"/api/admin/mark-price/{BTC}", json={"price": "57900"})
    assert (await until_status(alice, stop["orderId"], "FILLED"))["averagePrice"] == "57500"
    await exchange.hold_marks(admin)


async def test_an_instrument_can_be_closed_and_opened_again(exchange: Exchange, admin: Trader) -> None:
    alice = await exchange.trader(admin, "10000")
    resting = await alice.place("BUY", "0.01", "59000")

    async def refused() -> bool:
        answer = await alice.send(limit("BUY", "0.01", "59000"), wait=True)
        return answer.status_code == 400 and answer.json()["code"] == "INSTRUMENT_NOT_TRADING"

    closed = await admin.client.post(f"/api/admin/instruments/{BTC}/cancel-only")
    assert closed.json() == {"instrumentId": BTC, "state": "CANCEL_ONLY"}
    await until(refused, 5, "new orders to be refused")
    await alice.client.delete(f"/api/orders/{resting['orderId']}")
    await until_status(alice, resting["orderId"], "CANCELLED")
    await admin.client.post(f"/api/admin/instruments/{BTC}/halt")
    assert await refused()
    await admin.client.post(f"/api/admin/instruments/{BTC}/resume")

    async def accepted() -> bool:
        answer = await alice.send(limit("BUY", "0.01", "59000"), wait=True)
        return answer.status_code == 200 and answer.json()["status"] == "PLACED"

    await until(accepted, 5, "new orders to be taken")
    assert (await alice.client.post(f"/api/admin/instruments/{BTC}/halt")).status_code == 403
    assert (await admin.client.post("/api/admin/instruments/XYZ/halt")).json()["code"] == "INSTRUMENT_NOT_FOUND"


async def test_a_dead_man_switch_cancels_what_its_user_left_open(exchange: Exchange, admin: Trader) -> None:
    alice, bob = await exchange.trader(admin, "10000"), await exchange.trader(admin, "10000")
    left, kept = await alice.place("BUY", "0.01", "55000"), await bob.place("BUY", "0.01", "55000")
    armed = (await alice.client.post("/api/orders/cancel-all-after", json={"timeoutMs": 300})).json()
    assert armed["timeoutMs"] == 300
    assert armed["cancelAt"] is not None
    await bob.client.post("/api/orders/cancel-all-after", json={"timeoutMs": 300})
    stopped = (await bob.client.post("/api/orders/cancel-all-after", json={"timeoutMs": 0})).json()
    assert stopped == {"timeoutMs": 0, "cancelAt": None}
    assert (await until_status(alice, left["orderId"], "CANCELLED"))["failureReason"] == "USER_REQUEST"
    assert (await bob.order(kept["orderId"]))["status"] == "PLACED"
    refused = await alice.client.post("/api/orders/cancel-all-after", json={"timeoutMs": -1})
    assert (refused.status_code, refused.json()["code"]) == (422, "VALIDATION_FAILED")


async def test_a_batch_answers_each_order_in_its_place(exchange: Exchange, admin: Trader) -> None:
    trader = await exchange.trader(admin, "1000")
    orders = [
        limit("BUY", "0.001", "59000", clientOrderId="first"),
        limit("BUY", "0.0015", "59000"),
        limit("BUY", "0.001", "59000.05"),
        limit("BUY", "0.001", "59000", clientOrderId="first"),
        {**limit("BUY", "0.001", "59000"), "instrumentId": "DOGE-USDT-PERP"},
        limit("BUY", "NaN", "59000"),
        limit("BUY", "1", "59000"),
        limit("BUY", "0.002", "59000"),
    ]
    answer = await trader.client.post("/api/orders/batch", json={"orders": orders}, params={"wait": "placed"})
    assert answer.status_code == 200
    results = answer.json()["results"]
    assert [r.get("code") or r["status"] for r in results] == [
        "PLACED",
        "QUANTITY_NOT_ON_LOT",
        "PRICE_NOT_ON_TICK",
        "DUPLICATE_CLIENT_ORDER_ID",
        "INSTRUMENT_NOT_FOUND",
        "VALIDATION_FAILED",
        "FAILED",
        "PLACED",
    ]
    assert results[3]["order"]["orderId"] == results[0]["orderId"]
    assert results[6]["failureReason"] == "INSUFFICIENT_MARGIN"
    assert [r["quantity"] for r in (results[0], results[7])] == ["0.001", "0.002"]
    assert results[0]["orderId"] < results[6]["orderId"] < results[7]["orderId"]
    assert len((await trader.get("/api/orders"))["items"]) == 3


async def test_a_full_batch_of_500_is_taken(exchange: Exchange, admin: Trader) -> None:
    trader = await exchange.trader(admin, "10000")
    batch = {"orders": [limit("BUY", "0.001", "59000")] * 500}
    results = (await trader.client.post("/api/orders/batch", json=batch)).json()["results"]
    assert len({result["orderId"] for result in results}) == 500
    await exchange.until_settled()
    # Each reserves 5.9 + 0.0295.
    assert await trader.balance() == (D("7035.25"), D("2964.75"))
    assert len(await trader.pages("/api/orders", 100, status="PLACED")) == 500
    assert len((await trader.client.delete("/api/orders")).json()["items"]) == 500
    await exchange.until_settled()
    assert await trader.balance() == (D("10000"), D("0"))


async def test_a_client_order_id_is_good_for_one_order_of_its_user(exchange: Exchange, admin: Trader) -> None:
    trader, other = await exchange.trader(admin, "1000"), await exchange.trader(admin, "1000")
    order = limit("BUY", "0.001", "59000", clientOrderId="once")
    answers = await asyncio.gather(*(trader.send(order) for _ in range(20)))
    taken = [a.json() for a in answers if a.status_code == 200]
    refused = [a.json() for a in answers if a.status_code == 409]
    assert (len(taken), len(refused)) == (1, 19)
    assert {problem["code"] for problem in refused} == {"DUPLICATE_CLIENT_ORDER_ID"}
    assert {problem["order"]["orderId"] for problem in refused} == {taken[0]["orderId"]}
    assert (await other.send(order)).status_code == 200
    # Also with other terms, also when the first has ended.
    await exchange.until_settled()
    await trader.client.delete(f"/api/orders/{taken[0]['orderId']}")
    await until_status(trader, taken[0]["orderId"], "CANCELLED")
    late = await trader.send(limit("SELL", "0.005", "61000", clientOrderId="once"))
    assert (late.status_code, late.json()["order"]["status"]) == (409, "CANCELLED")
    assert len((await trader.get("/api/orders"))["items"]) == 1


@asynccontextmanager
async def user_feed(exchange: Exchange, trader: Trader) -> AsyncIterator[ClientConnection]:
    """A socket that is pushed what happens to this user from now on."""

    async def nothing_is_still_to_be_pushed() -> bool:
        return not await exchange.pool.fetchval("SELECT EXISTS (SELECT FROM outbox.messages)")

    await exchange.until_settled()
    await until(nothing_is_still_to_be_pushed, 10, "the relay")
    token = trader.client.headers["Authorization"].removeprefix("Bearer ")
    async with connect(exchange.url.replace("http", "ws") + "/ws/user", proxy=None) as socket:
        await socket.send(json.dumps({"op": "auth", "token": token}))
        assert json.loads(await socket.recv()) == {"channel": "auth", "data": {"userId": trader.user_id}}
        yield socket


async def latest(socket: ClientConnection, order_id: int, status: str, channels: set[str]) -> dict[str, Any]:
    """The last message of each channel, once all came and the order has the status."""
    seen: dict[str, Any] = {}
    async with asyncio.timeout(10):
        while not channels <= set(seen) or (seen["order"]["orderId"], seen["order"]["status"]) != (order_id, status):
            message = json.loads(await socket.recv())
            seen[message["channel"]] = message["data"]
    return seen


async def test_an_order_without_money_fails_and_its_user_is_told_why(exchange: Exchange, admin: Trader) -> None:
    trader = await exchange.trader(admin, "100")
    async with user_feed(exchange, trader) as socket:
        order = await trader.place("BUY", "0.1", "60000")
        assert (order["status"], order["failureReason"]) == ("FAILED", "INSUFFICIENT_MARGIN")
        seen = await latest(socket, order["orderId"], "FAILED", {"order"})
    assert seen["order"]["failureReason"] == "INSUFFICIENT_MARGIN"
    assert await trader.balance() == (D("100"), D("0"))
    assert (await trader.order(order["orderId"])) == seen["order"]


async def test_a_fill_reaches_its_user_as_order_fill_balance_and_position(exchange: Exchange, admin: Trader) -> None:
    maker, taker = await exchange.trader(admin, "1000"), await exchange.trader(admin, "1000")
    ask = await maker.place("SELL", "0.01", "60000")
    async with user_feed(exchange, maker) as socket:
        await taker.place("BUY", "0.01", "60000")
        seen = await latest(socket, ask["orderId"], "FILLED", {"order", "fill", "balance", "position"})
    assert (seen["fill"]["role"], seen["fill"]["fee"]) == ("MAKER", "0.12")
    assert seen["balance"] == {"asset": "USDT", "available": "939.88", "reserved": "60", "total": "999.88"}
    assert (seen["position"]["side"], seen["position"]["quantity"]) == ("SHORT", "0.01")


@pytest.mark.parametrize(
    ("side", "quantity", "price", "reason"),
    [
        ("BUY", "0.01", "60000", None),
        ("SELL", "0.01", "66000", None),
        ("BUY", "0.01", None, None),
        ("BUY", "0.165", "60000", None),
        # 0.166 * 60000 / 10 + 0.166 * 60000 * 0.0005 = 1000.98
        ("BUY", "0.166", "60000", "INSUFFICIENT_MARGIN"),
        ("SELL", "1000.001", "60000", "RISK_LIMIT_EXCEEDED"),
        ("BUY", "0.01", "90000.1", "PRICE_OUT_OF_BAND"),
        ("BUY", "0.01", "29999.9", "PRICE_OUT_OF_BAND"),
        ("BUY", "0.01", "60000.05", "PRICE_NOT_ON_TICK"),
        ("BUY", "0.0005", "60000", "QUANTITY_NOT_ON_LOT"),
    ],
)
async def test_the_pre_check_says_what_placement_does(
    exchange: Exchange, admin: Trader, side: str, quantity: str, price: str | None, reason: str | None
) -> None:
    trader = await exchange.trader(admin, "1000")
    asked = {"instrumentId": BTC, "side": side, "quantity": quantity, "price": price}
    check = (await trader.client.post("/api/risk/pre-check", json=asked)).json()
    assert (check["allowed"], check["reason"]) == (reason is None, reason)
    kind = "MARKET" if price is None else "LIMIT"
    answer = await trader.send({**asked, "type": kind})
    await exchange.until_settled()
    _, reserved = await trader.balance()
    if answer.status_code != 200:
        assert answer.json()["code"] == reason
        return
    final = await trader.order(answer.json()["orderId"])
    assert (final["status"], final["failureReason"]) == (
        ("FAILED", reason) if reason else ("EXPIRED", "NO_LIQUIDITY") if price is None else ("PLACED", None)
    )
    if price is not None and reason is None:
        assert reserved == D(check["requiredMargin"])


@pytest.mark.parametrize(
    ("held", "quantity", "price"),
    [("BUY", "0.01", "60000"), ("SELL", "0.01", "60000"), ("BUY", "0.3", "60000"), ("BUY", "0.01", None)],
)
async def test_the_pre_check_without_a_side_is_that_of_the_worse_side(
    exchange: Exchange, admin: Trader, held: str, quantity: str, price: str | None
) -> None:
    trader = await exchange.trader(admin, "1000")
    # The order that would come after it on the same side needs more than one on the other.
    await trader.place(held, "0.01", "59000" if held == "BUY" else "61000", postOnly=True)
    asked = {"userId": trader.user_id, "instrumentId": BTC, "quantity": quantity, "price": price}
    answer = await trader.client.post("/api/risk/pre-check", json=asked)
    assert answer.status_code == 200, answer.text
    sides = [
        (await trader.client.post("/api/risk/pre-check", json={**asked, "side": side})).json()
        for side in ("BUY", "SELL")
    ]
    await trader.client.delete("/api/orders")
    await exchange.until_settled()
    assert answer.json() == max(sides, key=lambda each: (not each["allowed"], D(each["requiredMargin"])))
    assert sides[0] != sides[1] or price is None


async def test_a_service_asks_the_pre_check_for_anybody_and_a_user_for_themselves(
    exchange: Exchange, admin: Trader
) -> None:
    trader, other = await exchange.trader(admin, "1000"), await exchange.trader(admin)
    asked = {"userId": trader.user_id, "instrumentId": BTC, "side": "BUY", "quantity": "0.01", "price": "60000"}
    by_service = await exchange.client.post("/api/risk/pre-check", json=asked, headers=INTERNAL)
    assert by_service.json() == {"allowed": True, "requiredMargin": "60.3", "reason": None}
    refused = await other.client.post("/api/risk/pre-check", json=asked)
    assert (refused.status_code, refused.json()["code"]) == (403, "FORBIDDEN")


async def test_leverage_decides_the_margin_of_what_is_open_and_of_what_comes(exchange: Exchange, admin: Trader) -> None:
    trader = await exchange.trader(admin, "1000")
    url = f"/api/positions/{BTC}/leverage"
    assert (await trader.client.put(url, json={"leverage": 20})).json() == {"instrumentId": BTC, "leverage": 20}
    order = await trader.place("BUY", "0.1", "60000")
    # 6000 / 20 + 3
    assert await trader.balance() == (D("697"), D("303"))
    assert (await trader.client.put(url, json={"leverage": 10})).status_code == 200
    assert await trader.balance() == (D("397"), D("603"))
    refused = await trader.client.put(url, json={"leverage": 5})
    assert (refused.status_code, refused.json()["code"]) == (400, "INSUFFICIENT_MARGIN")
    await trader.client.delete(f"/api/orders/{order['orderId']}")
    await exchange.until_settled()
    assert (await trader.client.put(url, json={"leverage": 5})).status_code == 200
    for leverage in (0, -1, 101, 1.5, "x", None):
        refused = await trader.client.put(url, json={"leverage": leverage})
        assert (refused.status_code, refused.json()["code"]) == (422, "VALIDATION_FAILED"), leverage
    too_much = await trader.client.put(f"/api/positions/{SOL}/leverage", json={"leverage": 51})
    assert too_much.json()["code"] == "VALIDATION_FAILED"
    await trader.place("BUY", "0.1", "60000")
    # 6000 / 5 does not fit 1000, so the order failed and nothing is held.
    assert await trader.balance() == (D("1000"), D("0"))


async def test_deposits_and_withdrawals_happen_once_per_reference(exchange: Exchange, admin: Trader) -> None:
    trader = await exchange.trader(admin)
    reference = uuid.uuid4().hex
    transfer = {"userId": trader.user_id, "asset": "USDT", "amount": "100.00000001", "reference": reference}
    answers = await asyncio.gather(*(admin.client.post("/api/ledger/deposits", json=transfer) for _ in range(5)))
    assert {answer.status_code for answer in answers} == {200}
    assert await trader.balance() == (D("100.00000001"), D("0"))
    changed = await admin.client.post("/api/ledger/deposits", json={**transfer, "amount": "1"})
    assert (changed.status_code, changed.json()["code"]) == (422, "VALIDATION_FAILED")

    await trader.place("BUY", "0.01", "60000")
    # 60.3 is reserved: 39.70000001 may leave, and not a unit more.
    too_much = {**transfer, "amount": "39.70000002"}
    refused = await admin.client.post("/api/ledger/withdrawals", json=too_much)
    assert (refused.status_code, refused.json()["code"]) == (400, "INSUFFICIENT_FUNDS")
    for _ in range(2):
        taken = await admin.client.post("/api/ledger/withdrawals", json={**too_much, "amount": "39.70000001"})
        assert taken.json()["balance"] == {"asset": "USDT", "available": "0", "reserved": "60.3", "total": "60.3"}
    nobody = await admin.client.post("/api/ledger/deposits", json={**transfer, "userId": "999999", "reference": "x"})
    assert (nobody.status_code, nobody.json()["code"]) == (404, "NOT_FOUND")
    unknown = await admin.client.post("/api/ledger/deposits", json={**transfer, "asset": "BTC", "reference": "x"})
    assert (unknown.status_code, unknown.json()["code"]) == (422, "VALIDATION_FAILED")


async def test_orders_of_others_do_not_exist(exchange: Exchange, admin: Trader) -> None:
    trader, other = await exchange.trader(admin, "1000"), await exchange.trader(admin)
    order = await trader.place("BUY", "0.001", "59000")
    for method in ("GET", "DELETE"):
        answer = await other.client.request(method, f"/api/orders/{order['orderId']}")
        assert (answer.status_code, answer.json()["code"]) == (404, "ORDER_NOT_FOUND")
    assert (await other.get("/api/orders"))["items"] == []
    assert (await other.client.delete("/api/orders")).json()["items"] == []
    await exchange.until_settled()
    assert (await trader.order(order["orderId"]))["status"] == "PLACED"


Call = tuple[str, str, dict[str, Any] | None]
OPERATORS_ONLY: list[Call] = [
    ("GET", "/api/admin/ledger/audit", None),
    ("POST", f"/api/admin/mark-price/{BTC}", {"price": "1"}),
    ("DELETE", f"/api/admin/mark-price/{BTC}", None),
    ("POST", "/api/ledger/deposits", {"userId": "1", "asset": "USDT", "amount": "1", "reference": "r"}),
    ("POST", "/api/ledger/withdrawals", {"userId": "1", "asset": "USDT", "amount": "1", "reference": "r"}),
    ("GET", "/api/ledger/balances?userId=1000", None),
    ("GET", "/api/positions?userId=1000", None),
]
SERVICES_ONLY: list[Call] = [
    ("POST", "/api/matching/cancel", {"orderId": 1}),
    ("POST", "/api/auth/credentials", {"userId": "1", "type": "PASSWORD", "secretHash": "x"}),
]
SIGNED_IN_ONLY: list[Call] = [
    ("POST", "/api/orders", {}),
    ("POST", "/api/orders/batch", {"orders": []}),
    ("GET", "/api/orders", None),
    ("GET", "/api/orders/1", None),
    ("DELETE", "/api/orders", None),
    ("DELETE", "/api/orders/1", None),
    ("GET", "/api/trades", None),
    ("GET", "/api/ledger/balances", None),
    ("GET", "/api/ledger/entries", None),
    ("GET", "/api/positions", None),
    ("PUT", f"/api/positions/{BTC}/leverage", {"leverage": 1}),
    ("POST", "/api/risk/pre-check", {}),
    ("GET", "/api/users/me", None),
]


async def test_operations_are_refused_to_users_and_everything_private_to_strangers(
    exchange: Exchange, admin: Trader
) -> None:
    trader = await exchange.trader(admin)
    for method, path, body in OPERATORS_ONLY + SERVICES_ONLY:
        answer = await trader.client.request(method, path, json=body)
        assert (answer.status_code, answer.json()["code"]) == (403, "FORBIDDEN"), path
    for method, path, body in SERVICES_ONLY:
        answer = await admin.client.request(method, path, json=body)
        assert (answer.status_code, answer.json()["code"]) == (403, "FORBIDDEN"), path
    for method, path, body in OPERATORS_ONLY + SERVICES_ONLY + SIGNED_IN_ONLY:
        for headers in ({}, {"Authorization": "Bearer x.y.z"}, {"X-Internal-Token": "wrong"}):
            answer = await exchange.client.request(method, path, json=body, headers=headers)
            assert (answer.status_code, answer.json()["code"]) == (401, "UNAUTHENTICATED"), path
            assert answer.headers["content-type"] == "application/problem+json"


async def test_a_service_cancels_any_order(exchange: Exchange, admin: Trader) -> None:
    trader = await exchange.trader(admin, "1000")
    order = await trader.place("BUY", "0.001", "59000")
    answer = await exchange.client.post("/api/matching/cancel", json={"orderId": order["orderId"]}, headers=INTERNAL)
    assert answer.status_code == 200
    await until_status(trader, order["orderId"], "CANCELLED")
    unknown = await exchange.client.post("/api/matching/cancel", json={"orderId": 2**50}, headers=INTERNAL)
    assert (unknown.status_code, unknown.json()["code"]) == (404, "ORDER_NOT_FOUND")


async def test_pages_visit_everything_once_newest_first(exchange: Exchange, admin: Trader) -> None:
    maker, taker = await exchange.trader(admin, "1000"), await exchange.trader(admin, "1000")
    for price in range(60_000, 60_007):
        await maker.place("SELL", "0.001", str(price))
    await taker.place("BUY", "0.007", "60006")
    await taker.place("BUY", "0.01", "2900", instrumentId=ETH)
    await exchange.until_settled()
    for trader, path, key, count in (
        (maker, "/api/orders", "orderId", 7),
        (taker, "/api/trades", "tradeId", 7),
        (maker, "/api/ledger/entries", "entryId", None),
    ):
        whole = [item[key] for item in (await trader.get(path, limit=500))["items"]]
        assert whole == sorted(set(whole), reverse=True)
        assert count is None or len(whole) == count
        for size in (1, 3, 7, 500):
            assert [item[key] for item in await trader.pages(path, size)] == whole
    assert [o["instrumentId"] for o in await taker.pages("/api/orders", 5, instrumentId=ETH)] == [ETH]
    assert [o["status"] for o in await taker.pages("/api/orders", 5, status="FILLED")] == ["FILLED"]
    assert (await maker.get("/api/trades", instrumentId=ETH))["items"] == []


SIDES = (("BUY", "60010", "50000"), ("SELL", "59990", "70000"))


async def test_after_filled_the_stop_and_the_close_that_follow_at_once_are_taken(
    exchange: Exchange, admin: Trader
) -> None:
    """Settlement comes some hundredths of a second after the answer; nobody waits for it here."""
    maker = await exchange.trader(admin, "1000000")
    for side, price, stop_price in SIDES * 3:
        # 60.01 of margin, 0.1 to the mark, 0.3 of the fee: the close has no money of its own.
        trader = await exchange.trader(admin, "60.5")
        other = "SELL" if side == "BUY" else "BUY"
        for _ in range(2):
            await maker.place("BUY", "0.01", "59990")
            await maker.place("SELL", "0.01", "60010")
        opened = await trader.place(side, "0.01", price)
        closed = await trader.place(other, "0.01")
        mode = await trader.client.put(f"/api/positions/{BTC}/margin-mode", json={"marginMode": "CROSS"})
        await exchange.deposit(admin, trader, "100")
        again = await trader.place(side, "0.01", price)
        stop = await trader.place(other, "0.01", type="STOP_MARKET", stopPrice=stop_price, reduceOnly=True)
        found = [(order["status"], order["failureReason"]) for order in (opened, closed, again, stop)]
        assert found == [("FILLED", None), ("FILLED", None), ("FILLED", None), ("PLACED", None)]
        assert mode.status_code == 200, mode.text


async def test_after_expired_the_money_is_there_at_once(exchange: Exchange, admin: Trader) -> None:
    for side, price in (("BUY", "59000"), ("SELL", "61000")) * 3:
        trader = await exchange.trader(admin, "100")
        # Some 60 a time.
        for _ in range(2):
            order = await trader.place(side, "0.01", price, timeInForce="IOC")
            assert (order["status"], order["filledQuantity"]) == ("EXPIRED", "0"), order
        await admin.operator.withdraw(trader.user_id, "USDT", D(100), reference=uuid.uuid4().hex)
        assert await trader.balance() == (D(0), D(0))

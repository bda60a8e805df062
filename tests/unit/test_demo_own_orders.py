"""Keeping track of our own orders from answers and messages."""

import asyncio
from decimal import Decimal

import pytest
from msgspec import convert

from api.schema.examples import BODIES
from client import Order, Refused
from demo.messages import Steps
from demo.own_orders import Order as OwnOrder
from demo.own_orders import OwnOrders
from demo.quoting import Quote
from demo.tally import Latencies, Tally

STEPS = Steps(Decimal("0.1"), Decimal("0.001"))


def view(client_id: str | None, status: str, filled: str = "0", reason: str | None = None) -> Order:
    return convert(document(client_id, status, filled, reason), Order)


def document(client_id: str | None, status: str, filled: str = "0", reason: str | None = None) -> dict[str, object]:
    return dict(BODIES["OrderView"]) | {
        "orderId": 7,
        "clientOrderId": client_id,
        "status": status,
        "filledQuantity": filled,
        "failureReason": reason,
    }


@pytest.fixture
def tally() -> Tally:
    return Tally()


@pytest.fixture
def orders(tally: Tally) -> OwnOrders:
    tracked = OwnOrders(tally, STEPS)
    tracked.send(OwnOrder("maker", 0, "MAKER", "SELL", 1001, 9, sent_at=100.0))
    tracked.send(OwnOrder("taker", 5, "TAKER", "BUY", 1001, 9, sent_at=100.0))
    return tracked


def test_fills_reduce_quotes_and_only_takers_make_volume(orders: OwnOrders, tally: Tally) -> None:
    orders.hear(view("maker", "PARTIALLY_FILLED", "0.004"), 100.5)
    orders.hear(view("taker", "PARTIALLY_FILLED", "0.004"), 100.5)
    orders.hear(view("taker", "FILLED", "0.009"), 100.7)
    assert orders.quotes() == [Quote("maker", "SELL", 1001, 5)]
    assert tally.ours.volume == 9
    assert orders.get("taker") is None


def test_latency_is_counted_once_per_order_and_not_for_refused_or_unfilled_ones(
    orders: OwnOrders, tally: Tally
) -> None:
    orders.hear(view("maker", "PLACED"), 100.25)
    orders.hear(view("maker", "PARTIALLY_FILLED", "0.001"), 109.0)
    orders.hear(view("taker", "EXPIRED", reason="NO_LIQUIDITY"), 100.5)
    assert tally.placed.milliseconds([50]) == pytest.approx([250.0, 250.0])
    assert len(tally.filled) == 0
    assert not tally.refusals


def test_refusals_are_counted_by_reason_and_end_the_order(orders: OwnOrders, tally: Tally) -> None:
    orders.answer("maker", Refused(400, "PRICE_OUT_OF_BAND", "", {}))
    orders.hear(view("taker", "FAILED", reason="INSUFFICIENT_MARGIN"), 101.0)
    assert tally.refusals == {"PRICE_OUT_OF_BAND": 1, "INSUFFICIENT_MARGIN": 1}
    assert orders.quotes() == []
    assert orders.get("taker") is None


def test_the_answer_to_a_repeated_order_is_the_first_order(orders: OwnOrders, tally: Tally) -> None:
    orders.answer("maker", Refused(409, "DUPLICATE_CLIENT_ORDER_ID", "", {"order": document("maker", "PLACED")}))
    order = orders.get("maker")
    assert order is not None
    assert order.order_id == 7
    assert not tally.refusals


def test_messages_about_strangers_orders_change_nothing(orders: OwnOrders, tally: Tally) -> None:
    orders.hear(view("stranger", "FILLED", "1"), 101.0)
    orders.hear(view(None, "FILLED", "1"), 101.0)
    assert tally.ours.volume == 0
    assert len(orders.of_account(0)) == len(orders.of_account(5)) == 1


async def test_waiting_ends_with_the_message_or_with_the_time(orders: OwnOrders) -> None:
    waiting = asyncio.create_task(orders.until(lambda: orders.get("maker") is None, 10.0))
    await asyncio.sleep(0)
    orders.hear(view("maker", "CANCELLED"), 101.0)
    assert await waiting
    assert not await orders.until(lambda: orders.get("taker") is None, 0.01)


def test_percentiles_are_by_nearest_rank_with_the_maximum_last() -> None:
    latencies = Latencies()
    assert latencies.milliseconds() == []
    for number in range(200, 0, -1):
        latencies.add(number / 1000)
    assert latencies.milliseconds() == pytest.approx([100.0, 180.0, 198.0, 200.0])

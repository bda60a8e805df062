"""The parts of the engine process that need no server."""

import json
from decimal import Decimal

import msgspec
import pytest

from domain.clock import from_ms
from domain.events import OrderCancelled, OrderFilled, OrderPlaced, OrderRejected, TradeExecuted
from domain.instruments import SHIPPED, choose
from domain.matching import Cancel, Trade, encode
from engine.log import Batch
from engine.matcher import Matcher
from engine.outgoing import business_event, trade_row
from engine.publisher import message
from tests.engine_commands import AT, new

BTC = SHIPPED[0]
ALL = {instrument.instrument_id: instrument for instrument in SHIPPED}


def traded(taker_side: str) -> Trade:
    """Order 1 of user 1 rests, order 2 of user 2 takes 3 of its 5 lots."""
    matcher = Matcher(BTC)
    matcher.apply(new(1, "SELL" if taker_side == "BUY" else "BUY", 600_001, 5))
    trade = matcher.apply(new(2, "BUY" if taker_side == "BUY" else "SELL", 600_001, 3))[0]
    assert isinstance(trade, Trade)
    return trade


@pytest.mark.parametrize(("taker_side", "buyer", "seller"), [("BUY", 2, 1), ("SELL", 1, 2)])
def test_a_trade_names_its_buyer_and_its_seller(taker_side: str, buyer: int, seller: int) -> None:
    trade = traded(taker_side)
    row = trade_row(BTC, 2, trade)
    assert (row.buy_order_id, row.sell_order_id, row.buyer_user_id, row.seller_user_id) == (buyer, seller) * 2
    event = business_event(BTC, trade)
    assert isinstance(event, TradeExecuted)
    assert (event.buy_order_id, event.sell_order_id) == (buyer, seller)
    assert (event.buyer_user_id, event.seller_user_id) == (str(buyer), str(seller))


def test_a_trade_leaves_the_engine_in_decimals() -> None:
    row = trade_row(BTC, 2, traded("BUY"))
    assert (row.price, row.quantity) == (Decimal("60000.1"), Decimal("0.003"))
    assert (row.maker_fee, row.taker_fee) == (Decimal("0.03600006"), Decimal("0.09000015"))
    assert row.executed_at == from_ms(AT)
    event = business_event(BTC, traded("BUY"))
    assert isinstance(event, TradeExecuted)
    assert (event.price, event.quantity) == ("60000.1", "0.003")
    assert (event.maker_fee, event.taker_fee, event.fee) == ("0.03600006", "0.09000015", "0.12600021")
    assert event.executed_at == "2023-11-14T22:13:20.000Z"


def test_every_event_of_the_engine_has_its_business_event() -> None:
    matcher = Matcher(BTC)
    instrument_id = BTC.instrument_id
    placed = matcher.apply(new(1, "SELL", 600_000, 5))[0]
    assert business_event(BTC, placed) == OrderPlaced(
        order_id=1, instrument_id=instrument_id, side="SELL", price="60000", quantity="0.005"
    )
    filled = matcher.apply(new(2, "BUY", 600_000, 1))[1]
    assert business_event(BTC, filled) == OrderFilled(order_id=2, instrument_id=instrument_id, user_id="2")
    cancelled = matcher.apply(Cancel(at=AT, order_id=1, user_id=1))[0]
    assert business_event(BTC, cancelled) == OrderCancelled(
        order_id=1, instrument_id=instrument_id, user_id="1", status="CANCELLED", reason="USER_REQUEST",
        remaining_quantity="0.004",
    )  # fmt: skip
    expired = matcher.apply(new(3, "BUY", 600_000, 1, time_in_force="IOC"))[0]
    assert business_event(BTC, expired) == OrderCancelled(
        order_id=3, instrument_id=instrument_id, user_id="3", status="EXPIRED", reason="IOC",
        remaining_quantity="0.001",
    )  # fmt: skip
    rejected = matcher.apply(new(4, "BUY", 0, 1))[0]
    assert business_event(BTC, rejected) == OrderRejected(
        order_id=4, instrument_id=instrument_id, user_id="4", reason="INVALID_ORDER"
    )


def test_subscribers_get_the_bytes_that_stand_in_the_log() -> None:
    events = Matcher(BTC).apply(new(1, "SELL", 600_000, 5))
    batch = Batch(command_seq=1, first_seq=1, events=events, causes=[1])
    assert batch.payloads == [encode(events[0])]
    sent = message(BTC.instrument_id, batch)
    assert batch.payloads[0] in sent
    assert json.loads(sent) == {
        "instrumentId": BTC.instrument_id, "firstSeq": 1, "lastSeq": 1, "events": [msgspec.to_builtins(events[0])]
    }  # fmt: skip


def test_an_engine_owns_every_instrument_unless_told_which() -> None:
    assert choose(ALL, "") == list(SHIPPED)
    assert choose(ALL, " SOL-USDT-PERP, BTC-USDT-PERP,") == [SHIPPED[2], SHIPPED[0]]


def test_an_engine_refuses_an_instrument_that_does_not_exist() -> None:
    with pytest.raises(RuntimeError, match="DOGE"):
        choose(ALL, "BTC-USDT-PERP,DOGE-USDT-PERP")

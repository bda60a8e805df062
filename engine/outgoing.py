"""Engine events in the words of the rest of the exchange: decimal prices and quantities, times, business events."""

from collections.abc import Iterable
from datetime import datetime
from decimal import Decimal
from functools import lru_cache
from typing import NamedTuple

from domain.clock import from_ms, iso
from domain.events import (
    BusinessEvent,
    InstrumentStateChanged,
    OrderAmended,
    OrderAmendRejected,
    OrderCancelled,
    OrderFilled,
    OrderPlaced,
    OrderRejected,
    OrderTriggered,
    TradeExecuted,
)
from domain.instruments import Instrument
from domain.matching import (
    Amended,
    AmendRejected,
    AnyEvent,
    Cancelled,
    Deleveraged,
    Expired,
    Filled,
    Placed,
    Rejected,
    StateChanged,
    Trade,
    Triggered,
)
from domain.money import plain


class TradeRow(NamedTuple):
    """A row of `matching.trade_tickers`."""

    trade_id: int
    instrument_id: str
    seq: int
    price: Decimal
    quantity: Decimal
    taker_side: str
    buy_order_id: int
    sell_order_id: int
    buyer_user_id: int
    seller_user_id: int
    maker_fee: Decimal
    taker_fee: Decimal
    executed_at: datetime


# A batch has few different times.
_iso_ms = lru_cache(maxsize=256)(lambda unix_ms: iso(from_ms(unix_ms)))


def trade_row(instrument: Instrument, seq: int, trade: Trade) -> TradeRow:
    """The trade as the tape keeps it."""
    buy_order_id, sell_order_id, buyer_id, seller_id = _buyer_and_seller(trade)
    return TradeRow(
        trade_id=trade.trade_id,
        instrument_id=instrument.instrument_id,
        seq=seq,
        price=instrument.ticks_to_price(trade.price),
        quantity=instrument.lots_to_quantity(trade.quantity),
        taker_side=trade.taker_side,
        buy_order_id=buy_order_id,
        sell_order_id=sell_order_id,
        buyer_user_id=buyer_id,
        seller_user_id=seller_id,
        maker_fee=_fee(trade.maker_fee),
        taker_fee=_fee(trade.taker_fee),
        executed_at=from_ms(trade.at),
    )


class DeleveragingRow(NamedTuple):
    """A row of `matching.deleveragings`."""

    trade_id: int
    instrument_id: str
    seq: int
    price: Decimal
    quantity: Decimal
    side: str
    user_id: int
    counterparty_user_id: int
    executed_at: datetime


def deleveraging_row(instrument: Instrument, seq: int, event: Deleveraged) -> DeleveragingRow:
    """What auto-deleveraging did, as it is kept."""
    return DeleveragingRow(
        trade_id=event.trade_id,
        instrument_id=instrument.instrument_id,
        seq=seq,
        price=instrument.ticks_to_price(event.price),
        quantity=instrument.lots_to_quantity(event.quantity),
        side=event.side,
        user_id=event.user_id,
        counterparty_user_id=event.counterparty_user_id,
        executed_at=from_ms(event.at),
    )


def business_events(instrument: Instrument, events: Iterable[AnyEvent]) -> list[BusinessEvent]:
    """The catalogue's events for engine events, in their order; some are of no interest to anybody outside."""
    found = (business_event(instrument, event) for event in events)
    return [event for event in found if event is not None]


def business_event(instrument: Instrument, event: AnyEvent) -> BusinessEvent | None:
    """The catalogue's event for an engine event, if it has one; `fee` of a trade is that of both sides together."""
    name = instrument.instrument_id
    found: BusinessEvent | None = None
    match event:
        case Trade():
            found = _trade_executed(instrument, event)
        case Placed():
            found = OrderPlaced(
                event.order_id, name, event.side, _price(instrument, event.price), _quantity(instrument, event.quantity)
            )
        case Filled():
            found = OrderFilled(event.order_id, name, str(event.user_id))
        case Rejected():
            found = OrderRejected(event.order_id, name, str(event.user_id), event.reason)
        case Cancelled() | Expired():
            status = str(event.__struct_config__.tag)
            rest = _quantity(instrument, event.quantity)
            found = OrderCancelled(event.order_id, name, str(event.user_id), status, event.reason, rest)
        case Amended():
            price, quantity = _price(instrument, event.price), _quantity(instrument, event.quantity)
            user_id = str(event.user_id)
            found = OrderAmended(event.order_id, name, user_id, event.side, price, quantity, event.reason)
        case AmendRejected():
            found = OrderAmendRejected(event.order_id, name, str(event.user_id), event.amendment_id, event.reason)
        case Triggered():
            found = OrderTriggered(event.order_id, name, str(event.user_id))
        case StateChanged():
            found = InstrumentStateChanged(name, event.state)
        case _:
            pass
    return found


def _price(instrument: Instrument, ticks: int) -> str:
    return plain(instrument.ticks_to_price(ticks))


def _quantity(instrument: Instrument, lots: int) -> str:
    return plain(instrument.lots_to_quantity(lots))


def _trade_executed(instrument: Instrument, trade: Trade) -> TradeExecuted:
    buy_order_id, sell_order_id, buyer_id, seller_id = _buyer_and_seller(trade)
    return TradeExecuted(
        trade_id=trade.trade_id,
        instrument_id=instrument.instrument_id,
        buy_order_id=buy_order_id,
        sell_order_id=sell_order_id,
        price=plain(instrument.ticks_to_price(trade.price)),
        quantity=plain(instrument.lots_to_quantity(trade.quantity)),
        buyer_user_id=str(buyer_id),
        seller_user_id=str(seller_id),
        taker_side=trade.taker_side,
        maker_fee=plain(_fee(trade.maker_fee)),
        taker_fee=plain(_fee(trade.taker_fee)),
        fee=plain(_fee(trade.maker_fee + trade.taker_fee)),
        executed_at=_iso_ms(trade.at),
    )


def _buyer_and_seller(trade: Trade) -> tuple[int, int, int, int]:
    if trade.taker_side == "BUY":
        return trade.taker_order_id, trade.maker_order_id, trade.taker_user_id, trade.maker_user_id
    return trade.maker_order_id, trade.taker_order_id, trade.maker_user_id, trade.taker_user_id


def _fee(units: int) -> Decimal:
    """`units` of 1e-8 quote as an amount."""
    return Decimal(units).scaleb(-8)

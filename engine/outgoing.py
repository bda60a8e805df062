"""Engine events in the words of the rest of the exchange: decimal prices and quantities, times, business events."""

from datetime import datetime
from decimal import Decimal
from functools import lru_cache
from typing import NamedTuple

from domain.clock import from_ms, iso
from domain.events import BusinessEvent, OrderCancelled, OrderFilled, OrderPlaced, OrderRejected, TradeExecuted
from domain.instruments import Instrument
from domain.matching import AnyEvent, Filled, Placed, Rejected, Trade
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


def business_event(instrument: Instrument, event: AnyEvent) -> BusinessEvent:
    """The catalogue's event for an engine event; `fee` of a trade is that of both sides together."""
    if isinstance(event, Trade):
        return _trade_executed(instrument, event)
    if isinstance(event, Placed):
        return OrderPlaced(
            order_id=event.order_id,
            instrument_id=instrument.instrument_id,
            side=event.side,
            price=plain(instrument.ticks_to_price(event.price)),
            quantity=plain(instrument.lots_to_quantity(event.quantity)),
        )
    if isinstance(event, Filled):
        return OrderFilled(order_id=event.order_id, instrument_id=instrument.instrument_id, user_id=str(event.user_id))
    if isinstance(event, Rejected):
        return OrderRejected(
            order_id=event.order_id,
            instrument_id=instrument.instrument_id,
            user_id=str(event.user_id),
            reason=event.reason,
        )
    return OrderCancelled(
        order_id=event.order_id,
        instrument_id=instrument.instrument_id,
        user_id=str(event.user_id),
        status=str(event.__struct_config__.tag),
        reason=event.reason,
        remaining_quantity=plain(instrument.lots_to_quantity(event.quantity)),
    )


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

"""From the trades of the replayed market to the taker orders that would have made them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from demo.messages import Side, Trade

# How far beyond the price of the replayed trade a taker goes, for our book is always a moment behind.
THROUGH_TICKS = 5
ORDERS_MAX = 40
# 100 BTC: well below the position that an account may have at its leverage. The rest comes with the next orders.
LOTS_MAX = 100_000


@dataclass(frozen=True, slots=True)
class TakerOrder:
    """An order to trade at once, at `price` (ticks) or better."""

    side: Side
    lots: int
    price: int


def taker_orders(trades: Sequence[Trade], orders_max: int = ORDERS_MAX) -> list[TakerOrder]:
    """The orders behind `trades`: those of one moment and side were one order that met several others.

    When there would be more than `orders_max` it is one order per side, in the order of their last trades.
    """
    moments = groupby(trades, key=lambda trade: (trade.exchange_ms, trade.side))
    orders = [_merged(side, [_order(trade) for trade in group]) for (_, side), group in moments]
    if len(orders) <= orders_max:
        return orders
    last_places = {order.side: place for place, order in enumerate(orders)}
    sides = sorted(last_places, key=lambda side: last_places[side])
    return [_merged(side, [order for order in orders if order.side == side]) for side in sides]


def with_backlog(
    orders: Sequence[TakerOrder], backlog: Mapping[Side, int], best: Mapping[Side, int]
) -> list[TakerOrder]:
    """`orders` after those for the lots that earlier ones did not get; these take `best`, the opposite best price."""
    again = [TakerOrder(side, lots, best[side]) for side, lots in backlog.items() if lots]
    return [*again, *orders]


def capped(orders: Iterable[TakerOrder], lots_max: int = LOTS_MAX) -> list[TakerOrder]:
    """`orders` with at most `lots_max` lots together: the first ones."""
    result: list[TakerOrder] = []
    room = lots_max
    for order in orders:
        lots = min(order.lots, room)
        if lots:
            result.append(replace(order, lots=lots))
            room -= lots
    return result


def limit_price(order: TakerOrder, through: int = THROUGH_TICKS) -> int:
    """The worst price in ticks that the order may get: `through` beyond its own."""
    return order.price + through if order.side == "BUY" else order.price - through


def _order(trade: Trade) -> TakerOrder:
    return TakerOrder(trade.side, trade.lots, trade.price)


def _merged(side: Side, orders: Sequence[TakerOrder]) -> TakerOrder:
    worst = max if side == "BUY" else min
    return replace(orders[0], lots=sum(order.lots for order in orders), price=worst(order.price for order in orders))

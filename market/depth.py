"""The public book of one instrument, derived from engine events: resting quantity per price.

Prices are ticks, quantities lots. An order rests only once it was PLACED, so an order that ended without
having rested leaves the depth as it was.
"""

from collections.abc import Mapping

import msgspec

from domain.matching import Amended, AnyEvent, Cancelled, Expired, Placed, Side, Trade


class RestingOrder(msgspec.Struct, array_like=True, gc=False):
    """What is open of an order in the book."""

    side: Side
    price: int
    lots: int


class DepthBook:
    """`bids` and `asks` map price to quantity; `changed_*` collect the prices touched since they were cleared.

    `orders` are the resting ones by id; the rest follows from them.
    """

    def __init__(self, orders: Mapping[int, RestingOrder] | None = None) -> None:
        self.bids: dict[int, int] = {}
        self.asks: dict[int, int] = {}
        self.changed_bids: set[int] = set()
        self.changed_asks: set[int] = set()
        self.orders: dict[int, RestingOrder] = {}
        for order_id, order in (orders or {}).items():
            self._add(order_id, order)

    def apply(self, event: AnyEvent) -> None:
        """Take in the next event. Raises KeyError for a trade with an order that never rested: the log is broken."""
        if isinstance(event, Placed):
            self._place(event)
        elif isinstance(event, Trade):
            self._reduce(event.maker_order_id, event.quantity)
        elif isinstance(event, Cancelled | Expired) and event.order_id in self.orders:
            self._reduce(event.order_id, self.orders[event.order_id].lots)
        elif isinstance(event, Amended):
            if event.was_resting:
                self._reduce(event.order_id, self.orders[event.order_id].lots)
            if event.resting:
                self._place(event)

    def _place(self, event: Placed | Amended) -> None:
        self._add(event.order_id, RestingOrder(event.side, event.price, event.quantity))

    def _add(self, order_id: int, order: RestingOrder) -> None:
        self.orders[order_id] = order
        levels, changed = self._side(order.side)
        levels[order.price] = levels.get(order.price, 0) + order.lots
        changed.add(order.price)

    def _reduce(self, order_id: int, lots: int) -> None:
        order = self.orders[order_id]
        assert order.lots >= lots, f"Expected at least {lots} lots in order {order_id}, was {order.lots}"
        order.lots -= lots
        if not order.lots:
            del self.orders[order_id]
        levels, changed = self._side(order.side)
        left = levels[order.price] - lots
        if left:
            levels[order.price] = left
        else:
            del levels[order.price]
        changed.add(order.price)

    def _side(self, side: Side) -> tuple[dict[int, int], set[int]]:
        return (self.bids, self.changed_bids) if side == "BUY" else (self.asks, self.changed_asks)

"""The public book of one instrument, derived from engine events: resting quantity per price.

Prices are ticks, quantities lots. An order rests only once it was PLACED, so an order that ended without
having rested leaves the depth as it was.
"""

from dataclasses import dataclass

from domain.matching import Amended, AnyEvent, Cancelled, Expired, Placed, Trade


@dataclass(slots=True)
class _Resting:
    level: dict[int, int]
    changed: set[int]
    price: int
    lots: int


class DepthBook:
    """`bids` and `asks` map price to quantity; `changed_*` collect the prices touched since they were cleared."""

    def __init__(self) -> None:
        self.bids: dict[int, int] = {}
        self.asks: dict[int, int] = {}
        self.changed_bids: set[int] = set()
        self.changed_asks: set[int] = set()
        self._orders: dict[int, _Resting] = {}

    def apply(self, event: AnyEvent) -> None:
        """Take in the next event. Raises KeyError for a trade with an order that never rested: the log is broken."""
        if isinstance(event, Placed):
            self._place(event)
        elif isinstance(event, Trade):
            self._reduce(event.maker_order_id, event.quantity)
        elif isinstance(event, Cancelled | Expired) and event.order_id in self._orders:
            self._reduce(event.order_id, self._orders[event.order_id].lots)
        elif isinstance(event, Amended):
            if event.was_resting:
                self._reduce(event.order_id, self._orders[event.order_id].lots)
            if event.resting:
                self._place(event)

    def _place(self, event: Placed | Amended) -> None:
        if event.side == "BUY":
            order = _Resting(self.bids, self.changed_bids, event.price, event.quantity)
        else:
            order = _Resting(self.asks, self.changed_asks, event.price, event.quantity)
        self._orders[event.order_id] = order
        order.level[order.price] = order.level.get(order.price, 0) + order.lots
        order.changed.add(order.price)

    def _reduce(self, order_id: int, lots: int) -> None:
        order = self._orders[order_id]
        assert order.lots >= lots, f"Expected at least {lots} lots in order {order_id}, was {order.lots}"
        order.lots -= lots
        if not order.lots:
            del self._orders[order_id]
        left = order.level[order.price] - lots
        if left:
            order.level[order.price] = left
        else:
            del order.level[order.price]
        order.changed.add(order.price)

"""Orders that wait outside the book for a price: stops and take-profits."""

from typing import TypeAlias

from sortedcontainers import SortedDict

from domain.matching import New, WorkingType
from engine.book import Order

Prices: TypeAlias = "SortedDict[int, dict[int, Order]]"
WORKING_TYPES: tuple[WorkingType, ...] = ("MARK", "LAST")


def waits_for_rise(new: New) -> bool:
    """Whether the order is triggered from below: a stop to buy or a take-profit to sell."""
    return new.type.startswith("STOP") == (new.side == "BUY")


class Stops:
    """Waiting orders by id and by user in order of entry, and by the price that triggers them.

    The prices of those that wait for a fall are kept negative, so that the first to be reached is always the first.
    """

    def __init__(self) -> None:
        self.orders: dict[int, Order] = {}
        self.users: dict[int, dict[int, Order]] = {}
        self.rising: dict[WorkingType, Prices] = {kind: SortedDict() for kind in WORKING_TYPES}
        self.falling: dict[WorkingType, Prices] = {kind: SortedDict() for kind in WORKING_TYPES}

    def add(self, order: Order) -> None:
        """Let an order wait."""
        new = order.new
        prices, key = self._place(new)
        prices.setdefault(key, {})[new.order_id] = order
        self.orders[new.order_id] = order
        self.users.setdefault(new.user_id, {})[new.order_id] = order

    def remove(self, order: Order) -> None:
        """Take an order out."""
        new = order.new
        prices, key = self._place(new)
        del prices[key][new.order_id]
        if not prices[key]:
            del prices[key]
        self._forget(new)

    def await_last(self) -> bool:
        """Whether any order waits for the last price."""
        return bool(self.rising["LAST"] or self.falling["LAST"])

    def reached(self, working_type: WorkingType, price: int, ceiling: int) -> list[Order]:
        """Take out the orders that a price triggers, which is given rounded down and up: those that waited for a rise,
        lowest stop price first, then those that waited for a fall, highest first; at one stop price in order of entry.
        """
        orders: list[Order] = []
        for prices, key in ((self.rising[working_type], price), (self.falling[working_type], -ceiling)):
            while prices and prices.peekitem(0)[0] <= key:
                orders += prices.popitem(0)[1].values()
        for order in orders:
            self._forget(order.new)
        return orders

    def _place(self, new: New) -> tuple[Prices, int]:
        if waits_for_rise(new):
            return self.rising[new.working_type], new.stop_price
        return self.falling[new.working_type], -new.stop_price

    def _forget(self, new: New) -> None:
        del self.orders[new.order_id]
        own = self.users[new.user_id]
        del own[new.order_id]
        if not own:
            del self.users[new.user_id]

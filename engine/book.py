"""The order book of one instrument: resting orders by price, then by time of entry.

Prices are ticks, quantities lots. The book holds and finds orders; who trades with whom is `matcher.py`.
"""

from collections import deque
from collections.abc import Iterator
from heapq import heapify, heappop, heappush

import msgspec

from domain.matching import New, Side

# Emptied places are kept until they are this many and the majority: dropping them then costs O(1) per order.
CLUTTER_MIN = 64


class Order(msgspec.Struct, array_like=True, gc=False):
    """A live order: its terms, its price, and the lots that remain. Out of the book `remaining` is 0 if it left a
    queue that has not been tidied up yet.

    `new.quantity` is what the whole order is over now: that less `remaining` has been filled.

    `gc=False`: it refers to its command only, so no cycle can go through it, and a million of them cost nothing.
    `array_like`: a snapshot takes orders as they are.
    """

    new: New
    price: int
    remaining: int


class Level:
    """All orders at one price in order of entry; `lots` is what remains of them together.

    Who leaves from the middle of the queue stays in it, marked by `remaining` 0, until the front reaches it or the
    `gone` prevail: leaving takes constant time.
    """

    __slots__ = ("gone", "key", "lots", "price", "queue")

    def __init__(self, key: int, price: int) -> None:
        self.key = key
        self.price = price
        self.lots = 0
        self.gone = 0
        self.queue: deque[Order] = deque()

    def __iter__(self) -> Iterator[Order]:
        return (order for order in self.queue if order.remaining)

    def first(self) -> Order:
        """The first live order of a level that has one."""
        queue = self.queue
        while not queue[0].remaining:
            queue.popleft()
            self.gone -= 1
        return queue[0]

    def tidy(self) -> None:
        """Forget those who left."""
        self.queue = deque(self)
        self.gone = 0


class BookSide:
    """The levels of one side under keys that sort best price first; `best` is the first that has orders.

    A key is the price of an ask and minus the price of a bid, so that both sides share every rule.
    `heap` has the keys of `levels`. An empty level stays until it comes to the top or the `empty` prevail: most
    prices are soon in use again.
    """

    __slots__ = ("best", "empty", "heap", "levels", "name", "sign")

    def __init__(self, name: Side) -> None:
        self.name: Side = name
        self.sign = -1 if name == "BUY" else 1
        self.levels: dict[int, Level] = {}
        self.heap: list[int] = []
        self.empty = 0
        self.best: Level | None = None

    def open_level(self, price: int) -> Level:
        """The level at `price`, which has no orders but is about to get one."""
        key = self.sign * price
        level = self.levels.get(key)
        if level is None:
            level = self.levels[key] = Level(key, price)
            heappush(self.heap, key)
        else:
            self.empty -= 1
        best = self.best
        if best is None or key < best.key:
            self.best = level
        return level

    def emptied(self, level: Level) -> None:
        """Take note that the last order left `level`."""
        level.queue.clear()
        level.gone = 0
        self.empty += 1
        if level is self.best:
            self._find_best()
        if self.empty > CLUTTER_MIN and self.empty * 2 > len(self.heap):
            self.levels = {key: level for key, level in self.levels.items() if level.lots}
            self.heap = list(self.levels)
            heapify(self.heap)
            self.empty = 0

    def _find_best(self) -> None:
        heap, levels = self.heap, self.levels
        while heap:
            level = levels[heap[0]]
            if level.lots:
                self.best = level
                return
            del levels[heappop(heap)]
            self.empty -= 1
        self.best = None

    def __iter__(self) -> Iterator[Level]:
        """The levels that have orders, best first; the first n of them in O(n log n), however many follow."""
        heap, levels = self.heap, self.levels
        frontier = [(heap[0], 0)] if heap else []
        while frontier:
            key, index = heappop(frontier)
            level = levels[key]
            if level.lots:
                yield level
            for child in (2 * index + 1, 2 * index + 2):
                if child < len(heap):
                    heappush(frontier, (heap[child], child))


class Book:
    """Both sides, every resting order by its id in order of entry, and each user's orders likewise."""

    __slots__ = ("asks", "bids", "orders", "users")

    def __init__(self) -> None:
        self.bids = BookSide("BUY")
        self.asks = BookSide("SELL")
        self.orders: dict[int, Order] = {}
        self.users: dict[int, dict[int, Order]] = {}

    def side(self, name: Side) -> BookSide:
        """The bids for BUY, the asks for SELL."""
        return self.bids if name == "BUY" else self.asks

    def add(self, order: Order) -> None:
        """Queue an order behind all others at its price."""
        new = order.new
        order_id, user_id, price = new.order_id, new.user_id, order.price
        side = self.bids if new.side == "BUY" else self.asks
        level = side.levels.get(side.sign * price)
        if level is None or not level.lots:
            level = side.open_level(price)
        level.queue.append(order)
        level.lots += order.remaining
        self.orders[order_id] = order
        own = self.users.get(user_id)
        if own is None:
            self.users[user_id] = {order_id: order}
        else:
            own[order_id] = order

    def remove(self, order: Order) -> None:
        """Take an order out, wherever in its queue it stands; `remaining` is 0 then."""
        new = order.new
        side = self.bids if new.side == "BUY" else self.asks
        level = side.levels[side.sign * order.price]
        level.lots -= order.remaining
        order.remaining = 0
        if not level.lots:
            side.emptied(level)
        else:
            level.gone += 1
            if level.gone > CLUTTER_MIN and level.gone * 2 > len(level.queue):
                level.tidy()
        self.forget(new)

    def forget(self, new: New) -> None:
        """Drop an order that left its level from the indexes."""
        order_id, user_id = new.order_id, new.user_id
        del self.orders[order_id]
        own = self.users[user_id]
        del own[order_id]
        if not own:
            del self.users[user_id]

    def resting(self, side: BookSide) -> Iterator[Order]:
        """The orders of one side in the order in which they would trade."""
        for level in side:
            yield from level

    def depth(self, side: BookSide) -> list[tuple[int, int]]:
        """(price, lots) of every level of one side, best first."""
        return [(level.price, level.lots) for level in side]

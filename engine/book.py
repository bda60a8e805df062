"""The order book of one instrument: resting orders by price, then by time of entry.

Prices are ticks, quantities lots. The book holds and finds orders; who trades with whom is `matcher.py`.
"""

from collections import defaultdict, deque
from collections.abc import Iterator
from heapq import heapify, heappop, heappush

import msgspec

from domain.matching import New, Side

# Emptied places are kept until they are so many and the majority: dropping them then costs O(1) per order.
# In the queue of a level, and levels of a side.
CLUTTER_MIN = 64
EMPTY_LEVELS_MIN = 1024


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
    `gone` prevail: leaving takes constant time. `queued`: its key is in the heap of its side.
    """

    __slots__ = ("gone", "key", "lots", "price", "queue", "queued")

    def __init__(self, key: int, price: int) -> None:
        self.key = key
        self.price = price
        self.lots = 0
        self.gone = 0
        self.queued = False
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
        live = list(self)
        self.queue.clear()
        self.queue += live
        self.gone = 0


class BookSide:
    """The levels of one side by price; `best` is the first that has orders.

    A level's key is the price of an ask and minus the price of a bid, so that both sides share every rule.
    `heap` has the keys of all levels with orders and of some without, but never of such a one as its first.
    An empty level stays until there are `levels_max`: most prices are soon in use again.
    """

    __slots__ = ("best", "heap", "levels", "levels_max", "name", "sign")

    def __init__(self, name: Side) -> None:
        self.name: Side = name
        self.sign = -1 if name == "BUY" else 1
        self.levels: dict[int, Level] = {}
        self.levels_max = EMPTY_LEVELS_MIN
        self.heap: list[int] = []
        self.best: Level | None = None

    def new_level(self, price: int) -> Level:
        """A level at a price that has none."""
        if len(self.levels) >= self.levels_max:
            self.levels = {price: level for price, level in self.levels.items() if level.lots}
            self.heap = [level.key for level in self.levels.values()]
            heapify(self.heap)
            self.levels_max = 2 * len(self.levels) + EMPTY_LEVELS_MIN
        level = self.levels[price] = Level(self.sign * price, price)
        return level

    def emptied(self, level: Level) -> None:
        """Take note that the last order left `level`."""
        if level.queue:
            level.queue.clear()
            level.gone = 0
        if level is not self.best:
            return
        heap, levels, sign = self.heap, self.levels, self.sign
        while not level.lots:
            heappop(heap)
            level.queued = False
            if not heap:
                self.best = None
                return
            level = levels[sign * heap[0]]
        self.best = level

    def __iter__(self) -> Iterator[Level]:
        """The levels that have orders, best first; the first n of them in O(n log n), however many follow."""
        heap, levels = self.heap, self.levels
        frontier = [(heap[0], 0)] if heap else []
        while frontier:
            key, index = heappop(frontier)
            level = levels[self.sign * key]
            if level.lots:
                yield level
            for child in (2 * index + 1, 2 * index + 2):
                if child < len(heap):
                    heappush(frontier, (heap[child], child))


class Account:
    """A user's net `position` in lots, above zero for long, and resting orders by id in order of entry.

    The rest is for `engine/guards.py`. Terms: `leverage` (0: none, fills are not guarded), `maintenance` and `cross`.
    `backing`: what the position was opened for, less (long) or more (short) its margin, in millionths of a tick times
    a lot: a price of `backing` / position makes it worth nothing. `cover`, in the same unit: what the rest of the
    account has for a cross position. `fill_seq` is the event of the last fill. `bids` and `asks` are the open lots of
    orders that may open, `bids_backed` and `asks_backed` how many of them: see `engine/openings.py`.
    """

    __slots__ = (
        "asks",
        "asks_backed",
        "backing",
        "bids",
        "bids_backed",
        "cover",
        "cross",
        "fill_seq",
        "leverage",
        "maintenance",
        "orders",
        "position",
    )

    def __init__(self) -> None:
        self.position = 0
        self.orders: dict[int, Order] = {}
        self.leverage = 0
        self.maintenance = 0
        self.cross = False
        self.backing = 0
        self.cover = 0
        self.fill_seq = 0
        self.bids = self.asks = self.bids_backed = self.asks_backed = 0


class Book:
    """Both sides, every resting order by its id in order of entry, and the account of everyone who was ever there."""

    __slots__ = ("accounts", "asks", "bids", "orders")

    def __init__(self) -> None:
        self.bids = BookSide("BUY")
        self.asks = BookSide("SELL")
        self.orders: dict[int, Order] = {}
        self.accounts = defaultdict[int, Account](Account)

    def side(self, name: Side) -> BookSide:
        """The bids for BUY, the asks for SELL."""
        return self.bids if name == "BUY" else self.asks

    def add(self, order: Order) -> None:
        """Queue an order behind all others at its price."""
        new, price = order.new, order.price
        order_id = new.order_id
        side = self.bids if new.side == "BUY" else self.asks
        level = side.levels.get(price) or side.new_level(price)
        if not level.queued:
            # Only now can it be the best: the first of the heap has orders.
            level.queued = True
            key = level.key
            heappush(side.heap, key)
            if side.heap[0] == key:
                side.best = level
        level.queue.append(order)
        level.lots += order.remaining
        self.orders[order_id] = self.accounts[new.user_id].orders[order_id] = order

    def remove(self, order: Order) -> None:
        """Take an order out, wherever in its queue it stands."""
        new = order.new
        order_id = new.order_id
        side = self.bids if new.side == "BUY" else self.asks
        level = side.levels[order.price]
        level.lots -= order.remaining
        if not level.lots:
            side.emptied(level)
        else:
            order.remaining = 0
            level.gone += 1
            if level.gone > CLUTTER_MIN and level.gone * 2 > len(level.queue):
                level.tidy()
        del self.orders[order_id], self.accounts[new.user_id].orders[order_id]

    def resting(self, side: BookSide) -> Iterator[Order]:
        """The orders of one side in the order in which they would trade."""
        for level in side:
            yield from level

    def depth(self, side: BookSide) -> list[tuple[int, int]]:
        """(price, lots) of every level of one side, best first."""
        return [(level.price, level.lots) for level in side]

"""The order book of one instrument: resting orders by price, then by time of entry.

Prices are ticks, quantities lots. The book holds and finds orders; who trades with whom is `matcher.py`.
"""

from collections.abc import Iterator

from sortedcontainers import SortedDict

from domain.matching import Side


class Order:
    """A resting order with `remaining` lots; `ahead` and `behind` are its neighbours in the queue of its level."""

    __slots__ = ("ahead", "behind", "level", "order_id", "remaining", "user_id")

    def __init__(self, order_id: int, user_id: int, remaining: int, level: "Level", ahead: "Order | None") -> None:
        self.order_id = order_id
        self.user_id = user_id
        self.remaining = remaining
        self.level = level
        self.ahead = ahead
        self.behind: Order | None = None


class Level:
    """All orders at one price, a doubly linked queue in order of entry; `lots` is what remains of them together."""

    __slots__ = ("first", "key", "last", "lots", "price", "side")

    def __init__(self, side: "BookSide", key: int, price: int) -> None:
        self.side = side
        self.key = key
        self.price = price
        self.lots = 0
        self.first: Order | None = None
        self.last: Order | None = None

    def __iter__(self) -> Iterator[Order]:
        order = self.first
        while order is not None:
            yield order
            order = order.behind


class BookSide:
    """The levels of one side under keys that sort best price first; `best` is the first of them.

    A key is the price of an ask and minus the price of a bid, so that both sides share every rule.
    """

    __slots__ = ("best", "levels", "name", "sign")

    def __init__(self, name: Side) -> None:
        self.name: Side = name
        self.sign = -1 if name == "BUY" else 1
        self.levels: SortedDict[int, Level] = SortedDict()
        self.best: Level | None = None

    def open_level(self, price: int) -> Level:
        """A new, empty level at `price`, which must have none."""
        key = self.sign * price
        level = self.levels[key] = Level(self, key, price)
        if self.best is None or key < self.best.key:
            self.best = level
        return level

    def drop_level(self, level: Level) -> None:
        """Forget a level that has become empty."""
        del self.levels[level.key]
        if level is self.best:
            self.best = self.levels.peekitem(0)[1] if self.levels else None

    def within(self, limit_key: int) -> Iterator[Level]:
        """The levels that an order with this limit may trade with, best first."""
        levels = self.levels
        return (levels[key] for key in levels.irange(maximum=limit_key))


class Book:
    """Both sides, every resting order by its id, and each user's orders in order of entry."""

    __slots__ = ("asks", "bids", "orders", "users")

    def __init__(self) -> None:
        self.bids = BookSide("BUY")
        self.asks = BookSide("SELL")
        self.orders: dict[int, Order] = {}
        self.users: dict[int, dict[int, Order]] = {}

    def add(self, side: BookSide, price: int, order_id: int, user_id: int, remaining: int) -> None:
        """Queue an order behind all others at its price."""
        level = side.levels.get(side.sign * price) or side.open_level(price)
        last = level.last
        order = Order(order_id, user_id, remaining, level, last)
        if last is None:
            level.first = order
        else:
            last.behind = order
        level.last = order
        level.lots += remaining
        self.orders[order_id] = order
        own = self.users.get(user_id)
        if own is None:
            self.users[user_id] = {order_id: order}
        else:
            own[order_id] = order

    def remove(self, order: Order) -> None:
        """Take an order out, wherever in its queue it stands, in constant time (plus log(levels) for the last one)."""
        level, ahead, behind = order.level, order.ahead, order.behind
        level.lots -= order.remaining
        if ahead is None:
            level.first = behind
        else:
            ahead.behind = behind
        if behind is None:
            level.last = ahead
        else:
            behind.ahead = ahead
        if level.first is None:
            level.side.drop_level(level)
        self.forget(order)

    def forget(self, order: Order) -> None:
        """Drop an order that left its level from the indexes."""
        del self.orders[order.order_id]
        own = self.users[order.user_id]
        del own[order.order_id]
        if not own:
            del self.users[order.user_id]

    def resting(self, side: BookSide) -> Iterator[Order]:
        """The orders of one side in the order in which they would trade."""
        for level in side.levels.values():
            yield from level

    def depth(self, side: BookSide) -> list[tuple[int, int]]:
        """(price, lots) of every level of one side, best first."""
        return [(level.price, level.lots) for level in side.levels.values()]

"""Net positions as the matcher sees them, and the reduce-only orders that may not exceed them."""

from domain.matching import Side
from engine.book import Account, Order


class Reducers:
    """The resting reduce-only orders of one user in order of entry (all on one side), and their lots together."""

    __slots__ = ("lots", "orders", "side")

    def __init__(self, side: Side) -> None:
        self.side: Side = side
        self.orders: dict[int, Order] = {}
        self.lots = 0


class Reductions:
    """`users` has who has reduce-only orders in the book; positions are in the book's `accounts`."""

    __slots__ = ("accounts", "users")

    def __init__(self, accounts: dict[int, Account]) -> None:
        self.accounts = accounts
        self.users: dict[int, Reducers] = {}

    def reducible(self, user_id: int, side: Side) -> int:
        """How many lots an order on `side` can take off the user's position."""
        account = self.accounts.get(user_id)
        position = account.position if account else 0
        return max(0, -position if side == "BUY" else position)

    def lots(self, user_id: int) -> int:
        """The lots of the user's resting reduce-only orders."""
        reducers = self.users.get(user_id)
        return reducers.lots if reducers else 0

    def add(self, order: Order) -> None:
        """Count a reduce-only order that comes to rest, as the newest."""
        reducers = self.users.get(order.new.user_id)
        if reducers is None:
            reducers = self.users[order.new.user_id] = Reducers(order.new.side)
        reducers.orders[order.new.order_id] = order
        reducers.lots += order.remaining

    def take(self, order: Order, lots: int) -> None:
        """`lots` of a counted order are no longer open."""
        self.users[order.new.user_id].lots -= lots

    def remove(self, order: Order, lots: int) -> None:
        """A counted order left the book with `lots` open."""
        reducers = self.users[order.new.user_id]
        reducers.lots -= lots
        del reducers.orders[order.new.order_id]
        if not reducers.orders:
            del self.users[order.new.user_id]

    def excess(self, user_id: int) -> int:
        """By how many lots the user's reduce-only orders exceed the position; not above 0 if they don't."""
        reducers = self.users.get(user_id)
        return reducers.lots - self.reducible(user_id, reducers.side) if reducers else 0

    def newest(self, user_id: int) -> Order:
        """The newest reduce-only order of a user who has some."""
        orders = self.users[user_id].orders
        # Not by `reversed`, which would pass over every order removed before.
        order_id, order = orders.popitem()
        orders[order_id] = order
        return order

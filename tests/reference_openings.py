"""What may open a position, said a second time: what is backed with initial margin, counted by looking at every order.

Lots. Only of users with terms; orders that only reduce a position do not count.
"""

from collections.abc import Sequence

from domain.matching import Side
from tests.reference_guards import Holder, ReferenceGuards
from tests.reference_orders import Live

SIDES: tuple[Side, Side] = ("BUY", "SELL")


class ReferenceOpenings:
    """How many lots of a user's orders are backed (`Holder.backed`). `orders` is always every order that has not ended,
    wherever it stands: in the book, waiting, triggered, or entering just now."""

    def __init__(self, guards: ReferenceGuards) -> None:
        self.guards = guards

    def back(self, order: Live, lots: int, told: int, orders: Sequence[Live]) -> None:
        """`lots` more of an order are open, for `told` of which initial margin is held (below 0: for all)."""
        if not order.new.reduce_only:
            self.guards.holders[order.new.user_id].backed[order.new.side] += max(0, lots) if told < 0 else told
        self.fit(orders)

    def begin(self, user_id: int, orders: Sequence[Live]) -> None:
        """A user gets terms: what is open is backed."""
        for side in SIDES:
            self.guards.holders[user_id].backed[side] = _open_lots(orders, user_id, side)
        self._fit(user_id, self.guards.holders[user_id], orders)

    def fit(self, orders: Sequence[Live]) -> None:
        """Something changed: never more is backed than the orders could open now. What was too much is gone."""
        for user_id, holder in self.guards.holders.items():
            if holder.leverage:
                self._fit(user_id, holder, orders)

    def _fit(self, user_id: int, holder: Holder, orders: Sequence[Live]) -> None:
        for side in SIDES:
            could_open = _open_lots(orders, user_id, side) - holder.can_close(side)
            holder.backed[side] = max(0, min(holder.backed[side], could_open))

    def are_sure(self, order: Live, orders: Sequence[Live], *, reduces_beside: bool) -> bool:
        """Whether an order that waits in the book could open all that it may come to open, since its whole side is
        backed. With orders that only reduce beside it (`reduces_beside`) the position may be gone before."""
        holder = self._holder(order)
        if not holder.leverage or order.new.reduce_only:
            return True
        closing = 0 if reduces_beside else holder.can_close(order.new.side)
        return _open_lots(orders, order.new.user_id, order.new.side) - closing <= holder.backed[order.new.side]

    def allow(self, order: Live) -> bool:
        """Whether all may open that would, if the order were filled in full now."""
        holder = self._holder(order)
        opening = order.remaining - holder.can_close(order.new.side)
        return not holder.leverage or opening <= holder.backed[order.new.side]

    def _holder(self, order: Live) -> Holder:
        return self.guards.holders[order.new.user_id]


def _open_lots(orders: Sequence[Live], user_id: int, side: Side) -> int:
    """The open lots of the user's orders on one side that may open a position."""
    return sum(
        order.remaining
        for order in orders
        if (order.new.user_id, order.new.side) == (user_id, side) and not order.new.reduce_only
    )

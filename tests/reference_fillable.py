"""Whether a fill-or-kill order is filled, said a second time: it is tried out on a copy of the book."""

import copy
from typing import TYPE_CHECKING

from tests.reference_orders import Live

if TYPE_CHECKING:
    from tests.reference_book import ReferenceMatcher


def would_fill(book: "ReferenceMatcher", order: Live) -> bool:
    """A fill-or-kill order is filled if an immediate-or-cancel order in its place would be, in full, and surely so:
    guards that may stop it on the way count as if they did, and with a maker's first order all of its later ones."""
    trial, taker = copy.deepcopy((book, order))
    sign = 1 if order.new.side == "BUY" else -1
    unsure = set[int]()
    for maker in trial.queue("SELL" if order.new.side == "BUY" else "BUY"):
        user_id = maker.new.user_id
        if sign * (maker.price - order.price) > 0 or not taker.remaining:
            break
        if not _may_take(book, order, maker.price):
            return False
        if user_id == order.new.user_id:
            if order.new.stp_mode != "EXPIRE_MAKER":
                return False
        elif any(other is maker for other in trial.resting):
            if not _may_make(book, maker):
                unsure.add(user_id)
            if user_id not in unsure:
                trial.trade(taker, maker, min(taker.remaining, maker.remaining))
                trial.position_changed(user_id)
    return taker.remaining == 0


def _may_take(book: "ReferenceMatcher", order: Live, price: int) -> bool:
    """Whether the order's own guard lets it trade in full at this price. No guard stops a liquidation."""
    is_sure = book.guards.is_sure(order.new, price) and book.openings.allow(order)
    return is_sure or order.new.liquidation


def _may_make(book: "ReferenceMatcher", maker: Live) -> bool:
    reduces_beside = bool(book.reducing(maker.new.user_id))
    backed = book.openings.are_sure(maker, book.open(), reduces_beside=reduces_beside)
    return backed and book.guards.is_sure(maker.new, maker.price)

"""Whether a fill-or-kill order would trade in full at once: matching, tried out without touching the book."""

from domain.matching import New
from engine.book import Account, Book, BookSide
from engine.guards import Guards, reducible
from engine.openings import backed, fully_backed
from engine.reductions import Reductions


class _Trial:
    """A user's reduce-only orders while the trial goes on: trades shrink the position, and with it the newest."""

    def __init__(self, reductions: Reductions, user_id: int) -> None:
        reducers = reductions.users[user_id]
        self.room = reductions.reducible(user_id, reducers.side)
        self.lots = {order_id: order.remaining for order_id, order in reducers.orders.items()}
        self.total = reducers.lots

    def trade(self, order_id: int, lots: int) -> None:
        """An order of the user traded."""
        self.room -= lots
        if order_id in self.lots:
            self.lots[order_id] -= lots
            self.total -= lots
        while self.lots and self.total > max(0, self.room):
            newest, open_lots = self.lots.popitem()
            cut = min(open_lots, self.total - max(0, self.room))
            self.total -= cut
            if cut < open_lots:
                self.lots[newest] = open_lots - cut


def fillable(taker: New, wanted: int, book: Book, opposite: BookSide, reductions: Reductions, guards: Guards) -> bool:
    """Whether `wanted` lots would trade at once, self-trade prevention, reduce-only orders and guards considered."""
    limit_key = opposite.sign * taker.price
    account = book.accounts.get(taker.user_id)
    if (account and account.orders) or reductions.users or guards.asked:
        return _fillable_by_orders(taker, wanted, book, opposite, limit_key, reductions, guards)
    for level in opposite:
        if level.key > limit_key:
            return False
        wanted -= level.lots
        if wanted <= 0:
            return True
    return False


def _may_open(own: Account, taker: New, price: int, asked: int, guards: Guards) -> bool:
    opening = asked - reducible(own, taker.side)
    return guards.covers_all(own, taker, price, asked) and opening <= backed(own, taker.side)


def _fillable_by_orders(
    taker: New,
    wanted: int,
    book: Book,
    opposite: BookSide,
    limit_key: int,
    reductions: Reductions,
    guards: Guards,
) -> bool:
    trials = dict[int, _Trial]()
    # Makers of whom a guard may stop an order: what their later ones could do is open.
    unsure = set[int]()
    own = book.accounts[taker.user_id]
    asked = wanted
    for level in opposite:
        if level.key > limit_key:
            return False
        if own.leverage and not taker.liquidation and not _may_open(own, taker, level.price, asked, guards):
            return False
        for maker in level:
            user_id, order_id = maker.new.user_id, maker.new.order_id
            if user_id == taker.user_id:
                if taker.stp_mode != "EXPIRE_MAKER":
                    return False
                continue
            account = book.accounts[user_id]
            reducers = reductions.users.get(user_id)
            if account.leverage and (
                user_id in unsure
                or not guards.covers_all(account, maker.new, level.price, maker.remaining)
                or not (maker.new.reduce_only or fully_backed(account, opposite.name, may_shrink=reducers is not None))
            ):
                unsure.add(user_id)
                continue
            lots = maker.remaining
            if reducers is not None and reducers.side == opposite.name:
                trial = trials.get(user_id) or trials.setdefault(user_id, _Trial(reductions, user_id))
                if maker.new.reduce_only:
                    lots = trial.lots.get(order_id, 0)
                lots = min(lots, wanted)
                trial.trade(order_id, lots)
            wanted -= lots
            if wanted <= 0:
                return True
    return False

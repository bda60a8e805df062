"""Whether a fill is covered: how far from the mark, or from what backs the position, it may be.

A fill of a user with terms (`SetTerms`) opens or closes, or does first the one and then the other; where only closing
is covered, it ends there.

What *opens* gets the initial margin of its price. What it loses at once against the mark may eat that down to the
maintenance margin (the slack), and beyond it is backed by what its order holds for it (`New.loss`): so equity at the
mark is not below maintenance. With m = mark, i = initial and u = maintenance margin rate:

    BUY:  price <= m + loss + slack    slack = m * (i - u)              margin = price * i + open loss
    SELL: price >= m - loss - slack    slack = m * (i - u) / (1 + i)    margin = min(price + open loss, basis) * i
                                                                                 + open loss

Nothing opens on the side of a position that is below its maintenance margin already (a cross one: with what covers it):
it is the liquidation's.

The open loss is put behind the position, as far as it is held, when it is more than half of the slack: nobody shall be
liquidated by the next tick.

What *closes* an isolated position may cost what backs it, the taker fee included, and nothing else: the price is no
worse than the bankruptcy price. A cross position is backed by the whole account: by its own margin, and by what the
risk service tells of the rest (`SetCover`). What closes may be worse than the mark by the maintenance margin, as
long as the account has that much, and by `New.loss`. Once the account is empty at the mark, only the price at which it
would not be will do.

Prices are ticks, quantities lots, rates millionths. What is kept of a user rounds against them.
"""

from domain.matching import New, SetCover, SetTerms, Side
from engine.book import Account
from engine.openings import backed

ONE = 1_000_000
# No price: worse than every price that an order can have.
NO_SALE = 1 << 63


class Guards:
    """The mark as the engine has heard it, and the rules of this module. `mark` is rounded down, `ceiling` up; both
    are 0 as long as there is none. Until `live_until` (Unix milliseconds) it is live. `asked`: somebody has terms.

    `taker_fee` is a rate. `rounding` is what the ledger may lose by rounding when a position is closed in part, in
    millionths of a tick times a lot.
    """

    __slots__ = ("asked", "ceiling", "live_until", "mark", "rounding", "taker_fee")

    def __init__(self, taker_fee: int, rounding: int = 0) -> None:
        self.mark = 0
        self.ceiling = 0
        self.live_until = 0
        self.asked = False
        self.taker_fee = taker_fee
        self.rounding = rounding

    def worst_price(self, account: Account, new: New, *, closes: bool) -> int:
        """The worst price at which an order of a user with terms may open or close; the order's own is not asked."""
        buys = new.side == "BUY"
        if closes and not account.cross:
            return self._bankruptcy_price(account)
        if not self.mark or (not closes and self._is_due(account, buys=buys)):
            return 0 if buys else NO_SALE
        spare = self._cross_spare(account, new) if closes else new.loss + self._slack(account, new.side)
        if not buys:
            worst = self.ceiling - spare
            return worst if closes else max(worst, self._backed_from(account, new))
        worst = self.mark + spare
        return worst if closes or not new.basis else min(worst, new.basis)

    def _is_due(self, account: Account, *, buys: bool) -> bool:
        """Whether a position that an order of this side would add to is below its maintenance margin, a cross one with
        all that covers it."""
        held, mark = (account.position, self.mark) if buys else (-account.position, self.ceiling)
        if held <= 0:
            return False
        cover = account.cover if account.cross else 0
        return _equity(account, self.mark, self.ceiling) + cover < held * mark * account.maintenance

    def _backed_from(self, account: Account, new: New) -> int:
        """The lowest price at which a sale leaves its maintenance margin, if no more than what is held at its basis
        backs it: the mark may have gone beyond that since."""
        basis, ceiling = new.basis or new.price, self.ceiling
        held = basis * (ONE // account.leverage) - max(0, ceiling - basis) * self.taker_fee
        return -((held - ceiling * (ONE + account.maintenance)) // ONE) - new.loss

    def _cross_spare(self, account: Account, new: New) -> int:
        """How many ticks worse than the mark a cross position may be closed; below 0, how much better it must be."""
        held = abs(account.position)
        fee = self.ceiling * self.taker_fee // ONE + 1
        spare = (_equity(account, self.mark, self.ceiling) + account.cover) // (held * ONE) - fee
        if spare < 0:
            return spare
        return min(spare, max(0, self.mark * account.maintenance // ONE - fee)) + new.loss

    def open_loss(self, account: Account, new: New, price: int) -> int:
        """By how many ticks a fill that opens is worse than the mark, at most what is held for that; 0 if initial
        margin bears it easily."""
        gap = price - self.mark if new.side == "BUY" else self.ceiling - price
        if not account.leverage or gap * 2 <= self._slack(account, new.side):
            return 0
        return min(new.loss, gap)

    def _slack(self, account: Account, side: Side) -> int:
        """How many ticks initial margin can lose before it is down to the maintenance margin."""
        initial = ONE // account.leverage
        rate = max(0, initial - account.maintenance)
        return self.mark * rate // (ONE if side == "BUY" else ONE + initial)

    def lots(self, account: Account, new: New, price: int, quantity: int) -> int:
        """How many of `quantity` lots may trade at `price`: all, none, or what closes the position and what of the rest
        is backed."""
        closing = min(quantity, reducible(account, new.side))
        if closing and not self._allows(account, new, price, closes=True):
            return 0
        if closing == quantity:
            return quantity
        if self._allows(account, new, price, closes=False):
            return min(quantity, closing + backed(account, new.side))
        return closing

    def _allows(self, account: Account, new: New, price: int, *, closes: bool) -> bool:
        worst = self.worst_price(account, new, closes=closes)
        return price <= worst if new.side == "BUY" else price >= worst

    def covers_all(self, account: Account, new: New, price: int, quantity: int) -> bool:
        """Whether `quantity` lots may trade at `price`, whatever else the user's orders do before: more is asked for
        than may be needed."""
        buys = new.side == "BUY"
        closing = reducible(account, new.side)
        worst = []
        if closing:
            # A tick to spare, since what is kept of a position that shrinks is rounded.
            price_then = price + 1 if buys else price - 1
            worst.append((price_then, self.worst_price(account, new, closes=True)))
        if quantity > closing or not new.reduce_only:
            if not self._may_open_more(account, new, price):
                return False
            worst.append((price, self.worst_price(account, new, closes=False)))
        return all(at <= limit if buys else at >= limit for at, limit in worst)

    def _may_open_more(self, account: Account, new: New, price: int) -> bool:
        """Whether a position that has grown by an order at `price` can grow again: each lot is above its maintenance
        margin by itself, and a cross account with all that its orders may open."""
        if account.cross and not self._may_open_all(account, new.side, price):
            return False
        buys, basis = new.side == "BUY", new.basis or new.price
        backing = _opened(self, account, price, basis, self.open_loss(account, new, price), buys=buys)
        if buys:
            return self.mark * ONE - backing >= self.mark * account.maintenance
        return backing - self.ceiling * ONE >= self.ceiling * account.maintenance

    def _may_open_all(self, account: Account, side: Side, price: int) -> bool:
        """Whether a cross account is not due after opening all that its orders of a side may open, at `price`. Where
        they would turn its position round nobody knows that."""
        lots, buys = backed(account, side), side == "BUY"
        held, mark = (account.position, self.mark) if buys else (-account.position, self.ceiling)
        if held < 0:
            return not lots
        gap = max(0, price - self.mark if buys else self.ceiling - price)
        left = _equity(account, self.mark, self.ceiling) + account.cover - lots * (gap * ONE + price * self.taker_fee)
        return left >= (held + lots) * mark * account.maintenance

    def _bankruptcy_price(self, account: Account) -> int:
        held = abs(account.position)
        if account.position > 0:
            return -(-account.backing // (held * (ONE - self.taker_fee)))
        return account.backing // (held * (ONE + self.taker_fee))


def set_terms(account: Account, terms: SetTerms) -> None:
    """The terms on which `account` is guarded from here on."""
    if not account.leverage:
        account.backing = terms.bankruptcy * abs(account.position)
    account.leverage, account.maintenance, account.cross = terms.leverage, terms.maintenance, terms.cross


def set_cover(account: Account, told: SetCover) -> None:
    """What the rest of the account has for a cross position: less at once, more only if nothing was filled since."""
    if account.fill_seq <= told.after_seq or told.cover < account.cover:
        account.cover = told.cover


def reducible(account: Account, side: Side) -> int:
    """How many lots an order on `side` can take off the position."""
    return max(0, -account.position if side == "BUY" else account.position)


def _equity(account: Account, mark: int, ceiling: int) -> int:
    """What the margin of a position is worth at the mark, in millionths of a tick times a lot."""
    held = account.position
    return held * mark * ONE - account.backing if held > 0 else account.backing + held * ceiling * ONE


def book_fill(
    guards: Guards,
    account: Account,
    bought: int,
    price: int,
    basis: int,
    open_loss: int,
    seq: int,
    loss: int = 0,
    *,
    free_of_fee: bool = False,
) -> None:
    """Fold a fill of `bought` lots (below 0: sold) into what backs the position, which has it already.

    `loss` is what the order held per lot (`New.loss`); a cross account pays with it, and with the rest it has, what
    closing costs beyond the margin of what is closed, and the fee, if there is one. Opening takes its margin and fee
    out of the cover, where they were counted. What is gained makes good what the account lacks (a cover below 0), so
    that it makes no difference in how many fills a position is closed; more is believed in when it is told.
    """
    position = account.position - bought
    account.fill_seq = seq
    if position * bought < 0:
        held, closed = abs(position), min(abs(position), abs(bought))
        shared = account.backing * closed
        shared = shared // held if position > 0 else -(-shared // held)
        if account.cross:
            gain = closed * price * ONE - shared if position > 0 else shared - closed * price * ONE
            fee = 0 if free_of_fee else closed * price * guards.taker_fee
            account.cover += min(max(0, -account.cover), gain + closed * loss * ONE - fee)
        if closed < held:
            account.backing -= shared - guards.rounding if position > 0 else shared + guards.rounding
            return
        account.backing = 0
        bought = account.position
    if bought:
        account.backing += abs(bought) * _opened(guards, account, price, basis, open_loss, buys=bought > 0)
        if account.cross:
            margin = _initial_margin(guards, account, price, basis, open_loss, buys=bought > 0)
            account.cover -= abs(bought) * (margin + price * guards.taker_fee)


def _opened(guards: Guards, account: Account, price: int, basis: int, open_loss: int, *, buys: bool) -> int:
    """What a lot that is opened adds to the `backing` of a position."""
    margin = _initial_margin(guards, account, price, basis, open_loss, buys=buys) + open_loss * ONE
    return price * ONE - margin if buys else price * ONE + margin


def _initial_margin(guards: Guards, account: Account, price: int, basis: int, open_loss: int, *, buys: bool) -> int:
    """The initial margin of a lot that is opened."""
    initial = ONE // account.leverage
    if buys:
        return price * initial
    # The fee was held at the basis, too.
    return min(price + open_loss, basis) * initial - max(0, price - basis) * guards.taker_fee


def move_margin(account: Account, amount: int, after_seq: int) -> None:
    """Put `amount` (millionths of a tick times a lot) behind a position, or take it away.

    More is believed only if nothing was filled after event `after_seq`: part of it may have gone with what was closed.
    """
    if not account.leverage or not account.position or (amount > 0 and account.fill_seq > after_seq):
        return
    account.backing -= amount if account.position > 0 else -amount
    if account.cross and amount > 0:
        account.cover -= amount

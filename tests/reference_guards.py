"""The guards of fills, said a second time: the rules of `docs/solvency.md`, exact where nothing is rounded.

Prices are ticks, quantities lots, money ticks times lots. What a user has in a position is one number here, `money`:
its margin, less what was paid for the lots held, more what was got for those sold. At a price P a position is worth
`position * P + money`, whether it is long or short.

Roundings are part of the rules where a comment says so, each against the user.
"""

from collections import defaultdict
from dataclasses import dataclass, field
from fractions import Fraction
from math import ceil, floor

from domain.instruments import Instrument
from domain.mark_price import MARK_AGE_MAX
from domain.matching import MarkPrice, MoveMargin, New, SetCover, SetTerms, Side
from tests.reference_orders import Live

MILLION = 1_000_000
ZERO = Fraction(0)


def rounded_down(number: Fraction) -> Fraction:
    """To a millionth, which is what rates and money are kept at."""
    return Fraction(floor(number * MILLION), MILLION)


def rounded_up(number: Fraction) -> Fraction:
    """To a millionth, the other way."""
    return Fraction(ceil(number * MILLION), MILLION)


@dataclass
class Holder:
    """A user's position, and with terms (`leverage` above 0) what guards its fills. `filled_seq` is the event of the
    last fill on terms; `backed` is how many lots of orders on a side may open (`tests.reference_openings`)."""

    position: int = 0
    leverage: int = 0
    maintenance: Fraction = ZERO
    cross: bool = False
    money: Fraction = ZERO
    cover: Fraction = ZERO
    filled_seq: int = 0
    backed: dict[Side, int] = field(default_factory=lambda: {"BUY": 0, "SELL": 0})

    @property
    def initial(self) -> Fraction:
        """The initial margin rate. Rounded down: less margin is believed in."""
        return rounded_down(Fraction(1, self.leverage))

    def can_close(self, side: Side) -> int:
        """How many lots an order on `side` can take off the position."""
        return max(0, -self.position if side == "BUY" else self.position)


class ReferenceGuards:
    """The mark as it was told, everybody's position and what is behind it."""

    def __init__(self, instrument: Instrument) -> None:
        unit = Fraction(instrument.tick_size) * Fraction(instrument.lot_size)
        # Rounded up: closing costs more.
        self.taker_fee = rounded_up(Fraction(instrument.taker_fee_rate))
        # The ledger keeps margin and entry notional to 1e-8 quote each, so a part of them may lose as much twice.
        self.lost_by_rounding = rounded_up(2 * Fraction(1, 10**8) / unit)
        # The mark rounded down and up to a tick; 0: there is none.
        self.low = self.high = 0
        self.told_at: int | None = None
        self.holders: defaultdict[int, Holder] = defaultdict(Holder)

    # What is told

    def hear_mark(self, mark: MarkPrice) -> None:
        self.low, self.high = mark.price, mark.ceiling or mark.price
        self.told_at = None if mark.frozen else mark.at

    def is_live(self, at: int) -> bool:
        """Whether the mark says anything about the time `at` (Unix milliseconds)."""
        return self.told_at is not None and at - self.told_at <= MARK_AGE_MAX.total_seconds() * 1000

    def set_terms(self, terms: SetTerms) -> None:
        holder = self.holders[terms.user_id]
        if not holder.leverage:
            # At its bankruptcy price a position is worth nothing.
            holder.money = -holder.position * Fraction(terms.bankruptcy, MILLION)
        holder.leverage, holder.cross = terms.leverage, terms.cross
        holder.maintenance = Fraction(terms.maintenance, MILLION)

    def set_cover(self, told: SetCover) -> None:
        """Less counts at once, more only if it was decided after the last fill."""
        holder, cover = self.holders[told.user_id], Fraction(told.cover, MILLION)
        if cover < holder.cover or told.after_seq >= holder.filled_seq:
            holder.cover = cover

    def move_margin(self, move: MoveMargin) -> None:
        """Less counts at once, more only if it was decided after the last fill. Where there is no position there is no
        margin. What comes to the margin of a cross position leaves the rest of the account; what goes back there is
        not believed in until the risk service tells of it."""
        holder, amount = self.holders[move.user_id], Fraction(move.amount, MILLION)
        if not holder.leverage or not holder.position:
            return
        if amount > 0 and move.after_seq < holder.filled_seq:
            return
        holder.money += amount
        if holder.cross:
            holder.cover -= max(ZERO, amount)

    def protection_price(self, new: New) -> int:
        """As far from the mark as a triggered order without a limit says. Rounded to the last whole tick within."""
        away = Fraction(new.protection, MILLION)
        return floor(self.low * (1 + away)) if new.side == "BUY" else max(1, ceil(self.high * (1 - away)))

    # What may trade

    def lots(self, new: New, price: int, quantity: int) -> int:
        """How many of `quantity` lots an order may trade at `price`. It closes first, then it opens as much as is
        backed; what opens cannot come before what closes."""
        holder = self.holders[new.user_id]
        if not holder.leverage:
            return quantity
        closing = min(quantity, holder.can_close(new.side))
        if closing and not self._may_close(holder, new, price):
            return 0
        if quantity > closing and not self._may_open(holder, new, price):
            return closing
        return min(quantity, closing + holder.backed[new.side])

    def is_sure(self, new: New, price: int) -> bool:
        """Whether the guard of an order will allow `price`, whatever else its user's orders do before: fill-or-kill
        must not begin where that is open. Closing needs a tick to spare, since what remains of a position is rounded;
        and all that is not reduce-only may come to open."""
        holder = self.holders[new.user_id]
        if not holder.leverage:
            return True
        if holder.can_close(new.side):
            worse = price + 1 if new.side == "BUY" else price - 1
            if not self._may_close(holder, new, worse):
                return False
        return new.reduce_only or (self._may_open(holder, new, price) and self._may_open_more(holder, new, price))

    def _may_open_more(self, holder: Holder, new: New, price: int) -> bool:
        """Whether a position that grows by an order at `price` can grow again: each lot is above its maintenance margin
        by itself, and so is a cross account with all that the side's orders may open."""
        if holder.cross and not self._may_open_all(holder, new.side, price):
            return False
        buys = new.side == "BUY"
        mark = self.low if buys else self.high
        worth = self._brought(holder, new, price, self._open_loss(holder, new, price)) + (mark if buys else -mark)
        return worth >= mark * holder.maintenance

    def _may_open_all(self, holder: Holder, side: Side, price: int) -> bool:
        """Whether a cross account has its maintenance margin after opening all that is backed of a side at `price`, if
        that is worse than the mark, with a taker's fees. Nobody is sure of what turns a position round."""
        lots = holder.backed[side]
        if holder.can_close(side):
            return lots == 0
        mark = self.low if side == "BUY" else self.high
        worse = max(0, self._worse_than_mark(side, price))
        left = holder.position * mark + holder.money + holder.cover - lots * (worse + price * self.taker_fee)
        return left >= (abs(holder.position) + lots) * mark * holder.maintenance

    def open_loss(self, new: New, price: int, quantity: int) -> int:
        """The open loss per lot that goes behind what a fill opens: by how much it is worse than the mark, if that is
        more than half of the slack, and as far as the order holds it."""
        holder = self.holders[new.user_id]
        if not holder.leverage or quantity <= holder.can_close(new.side):
            return 0
        return self._open_loss(holder, new, price)

    def _open_loss(self, holder: Holder, new: New, price: int) -> int:
        worse = self._worse_than_mark(new.side, price)
        return min(new.loss, worse) if worse > self._slack(holder, new.side) / 2 else 0

    def _worse_than_mark(self, side: Side, price: int) -> int:
        # The mark is rounded against the user: one who buys is told the lower one.
        return price - self.low if side == "BUY" else self.high - price

    def _slack(self, holder: Holder, side: Side) -> Fraction:
        """What initial margin can lose, in ticks, before it is down to maintenance margin at the mark.

        Who buys at P has the margin P * i; who sells below the mark m gets less for it, and the margin P * i is of that
        lower price: m (1 + u) <= P (1 + i), so the slack is m - m (1 + u) / (1 + i).
        """
        beyond = max(ZERO, holder.initial - holder.maintenance)
        return self.low * beyond / (1 if side == "BUY" else 1 + holder.initial)

    def _may_open(self, holder: Holder, new: New, price: int) -> bool:
        if not self.low or self._is_due(holder, new.side):
            return False
        if self._worse_than_mark(new.side, price) > new.loss + self._slack(holder, new.side):
            return False
        basis = new.basis or new.price
        if new.side == "BUY":
            # Its initial margin is held at its basis only.
            return not new.basis or price <= basis
        # A sale as well, however far the mark is above that. The fee of what is above it is paid out of the margin.
        held = basis * holder.initial - max(0, self.high - basis) * self.taker_fee
        return price + held + new.loss >= self.high * (1 + holder.maintenance)

    def _worth(self, holder: Holder) -> Fraction:
        """What a position is worth at the mark, which is rounded against the user: a long has the lower one."""
        return holder.position * (self.low if holder.position > 0 else self.high) + holder.money

    def _is_due(self, holder: Holder, side: Side) -> bool:
        """Whether the position an order on `side` would add to is below its maintenance margin, all that is behind it
        considered: to such a one nothing is added."""
        size = holder.position if side == "BUY" else -holder.position
        worth = self._worth(holder) + (holder.cover if holder.cross else 0)
        return size > 0 and worth < size * (self.low if side == "BUY" else self.high) * holder.maintenance

    def _may_close(self, holder: Holder, new: New, price: int) -> bool:
        size = abs(holder.position)
        if not holder.cross:
            # The position pays for its own end, with the taker's fee, whoever takes.
            return holder.position * price + holder.money >= self.taker_fee * size * price
        if not self.low:
            return False
        # Rounded against the user: the fee is a whole tick more than its whole ticks.
        fee = floor(self.high * self.taker_fee) + 1
        spare = (self._worth(holder) + holder.cover) / size - fee
        if spare >= 0:
            # As much worse than the mark as the maintenance margin, if there is that, and by what the order holds.
            spare = min(spare, max(ZERO, self.low * holder.maintenance - fee)) + new.loss
        # An account that is empty needs a price better than the mark: `spare` is below zero then.
        return self._worse_than_mark(new.side, price) <= spare

    # What a fill does

    def fill(
        self, user_id: int, bought: int, price: int, seq: int, order: Live | None = None, open_loss: int = 0
    ) -> None:
        """`bought` lots (below 0: sold) come to a user by event `seq`, by an order or, without fees, by deleveraging,
        which only closes."""
        holder = self.holders[user_id]
        before, size = holder.position, abs(bought)
        holder.position += bought
        if not holder.leverage:
            return
        holder.filled_seq = seq
        closed = min(abs(before), size) if before * bought < 0 else 0
        if closed:
            self._close(holder, before, closed, price, order)
        opened = size - closed
        if opened:
            assert order is not None, "Expected an order where a position grows"
            brought = self._brought(holder, order.new, price, open_loss)
            holder.money += opened * brought
            if holder.cross:
                # The cover had the margin, but for the open loss, and a taker's fee.
                margin = brought - open_loss + (price if bought > 0 else -price)
                holder.cover -= opened * (margin + price * self.taker_fee)
            if not order.new.reduce_only:
                holder.backed[order.new.side] -= opened

    def _brought(self, holder: Holder, new: New, price: int, open_loss: int) -> Fraction:
        """What a lot that opens brings with it: its margin, less the price if it was bought, or with it."""
        if new.side == "BUY":
            return price * holder.initial + open_loss - price
        # Who sells has initial margin for the mark, as far as it is held; without a basis at the order's own price. The
        # fee was held there, too: what is above it is paid out of the margin.
        basis = new.basis or new.price
        fee = max(0, price - basis) * self.taker_fee
        return min(price + open_loss, basis) * holder.initial + open_loss - fee + price

    def _close(self, holder: Holder, before: int, closed: int, price: int, order: Live | None) -> None:
        """Take the share of `closed` lots out of the money of `before` lots. What stays is rounded down, so the share
        is the rest of it; for that, the ledger's own rounding goes off what stays."""
        stays = rounded_down(holder.money * (abs(before) - closed) / abs(before))
        share = holder.money - stays
        if holder.cross:
            got = share + (closed * price if before > 0 else -closed * price)
            if order is not None:
                # Every fee counts as the taker's, the higher one. What the order held is there to be lost.
                got += closed * (order.new.loss - price * self.taker_fee)
            # A loss is the account's. A gain makes good what the account lacks; more is believed in when it is told.
            holder.cover += min(max(ZERO, -holder.cover), got)
        holder.money = stays - self.lost_by_rounding if closed < abs(before) else ZERO

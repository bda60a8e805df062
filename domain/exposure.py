"""What a user is exposed to in one instrument: the position and every open order."""

from decimal import Decimal
from typing import Literal

from msgspec import Struct
from msgspec.structs import replace

from domain.margin import order_margin
from domain.money import ZERO

Side = Literal["BUY", "SELL"]
OPPOSITE: dict[Side, Side] = {"BUY": "SELL", "SELL": "BUY"}


class Exposure(Struct, frozen=True):
    """Position at entry price, and the open rests of orders at the prices at which their margin is held; all but the
    position >= 0.

    `bid_loss` and `ask_loss` (quote) are held beyond initial margin for what orders would lose at once against the
    mark. All of the account stands behind a `cross` position.
    """

    leverage: int
    signed_quantity: Decimal = ZERO
    entry_notional: Decimal = ZERO
    bid_quantity: Decimal = ZERO
    bid_notional: Decimal = ZERO
    ask_quantity: Decimal = ZERO
    ask_notional: Decimal = ZERO
    open_orders: int = 0
    bid_loss: Decimal = ZERO
    ask_loss: Decimal = ZERO
    cross: bool = False

    @property
    def signed_notional(self) -> Decimal:
        """Entry notional with the position's sign."""
        return self.entry_notional if self.signed_quantity >= 0 else -self.entry_notional

    @property
    def worst_notional(self) -> Decimal:
        """The largest position, in quote, that the open orders could lead to."""
        position = self.signed_notional
        return max(abs(position), self._opening_bids + max(ZERO, position), self._opening_asks - min(ZERO, position))

    def with_order(
        self, side: Side, quantity: Decimal, price: Decimal, *, loss: Decimal = ZERO, reduce_only: bool = False
    ) -> "Exposure":
        """One more order open, with margin at `price` and `loss` (quote per base) beyond it. One that can only reduce
        counts for nothing else: the engine keeps it within the position."""
        moved = self if reduce_only else self._moved(side, quantity, price, loss)
        return replace(moved, open_orders=self.open_orders + 1)

    def with_claim(
        self, side: Side, quantity: Decimal, notional: Decimal, orders: int, loss: Decimal = ZERO
    ) -> "Exposure":
        """`orders` more claim `quantity` for `notional`, and `loss` (quote), all told; below zero they give it back.

        An amendment claims margin without being an order of its own.
        """
        claimed = self._claimed(side, quantity, notional, loss)
        return replace(claimed, open_orders=self.open_orders + orders)

    def opens(self, side: Side) -> bool:
        """Whether the orders of `side`, all together, can do more than reduce the position."""
        return self.opening(side) > ZERO

    def can_reduce(self, side: Side) -> bool:
        """Whether there is a position that an order of `side` would reduce."""
        return self.signed_quantity < 0 if side == "BUY" else self.signed_quantity > 0

    def without_order(
        self, side: Side, quantity: Decimal, price: Decimal, *, loss: Decimal = ZERO, reduce_only: bool = False
    ) -> "Exposure":
        """An order ended with `quantity` unfilled."""
        moved = self if reduce_only else self._moved(side, -quantity, price, loss)
        return replace(moved, open_orders=self.open_orders - 1)

    def with_order_closed(self) -> "Exposure":
        """An order ended because nothing of it is left (its fills are accounted for already)."""
        return replace(self, open_orders=self.open_orders - 1)

    def with_fill(self, side: Side, quantity: Decimal, price: Decimal, loss: Decimal = ZERO) -> "Exposure":
        """`quantity` of an order is filled and thus no longer open; the position follows by `with_position`."""
        return self._moved(side, -quantity, price, loss)

    def with_position(self, signed_quantity: Decimal, entry_notional: Decimal) -> "Exposure":
        """The position as the positions service has it."""
        return replace(self, signed_quantity=signed_quantity, entry_notional=entry_notional)

    def order_margin(self, taker_fee_rate: Decimal) -> Decimal:
        """Margin the open orders need, open loss included, rounded up to 8 decimals (`domain.margin.order_margin`).

        Orders of a side that can only reduce the position need nothing, at any price, and no fee: what they release
        pays it, so a user without available money can always close. Of a cross position there is no margin that the
        engine could hold against them, so they need what they may lose beyond the mark.
        """
        bids = self.bid_notional if self.opens("BUY") else ZERO
        asks = self.ask_notional if self.opens("SELL") else ZERO
        losses = self.open_loss("BUY") + self.open_loss("SELL")
        extra = (bids + asks) * taker_fee_rate + losses
        return order_margin(self._opening_bids, self._opening_asks, self.leverage, extra)

    def open_loss(self, side: Side) -> Decimal:
        """What is held for the open loss of the orders of one side (quote)."""
        if not self.cross and not self.opens(side):
            return ZERO
        return self.bid_loss if side == "BUY" else self.ask_loss

    def opening(self, side: Side) -> Decimal:
        """How much (base) the orders of one side can open beyond a position of the other."""
        if side == "BUY":
            return max(ZERO, self.bid_quantity - max(ZERO, -self.signed_quantity))
        return max(ZERO, self.ask_quantity - max(ZERO, self.signed_quantity))

    @property
    def _opening_bids(self) -> Decimal:
        """Notional of what the bids can open: their share of it, at their mean price."""
        return _share(self.bid_notional, self.opening("BUY"), self.bid_quantity)

    @property
    def _opening_asks(self) -> Decimal:
        """Notional of what the asks can open: their share of it, at their mean price."""
        return _share(self.ask_notional, self.opening("SELL"), self.ask_quantity)

    def _moved(self, side: Side, quantity: Decimal, price: Decimal, loss: Decimal) -> "Exposure":
        return self._claimed(side, quantity, quantity * price, quantity * loss)

    def _claimed(self, side: Side, quantity: Decimal, notional: Decimal, loss: Decimal) -> "Exposure":
        if side == "BUY":
            return replace(
                self,
                bid_quantity=self.bid_quantity + quantity,
                bid_notional=self.bid_notional + notional,
                bid_loss=self.bid_loss + loss,
            )
        return replace(
            self,
            ask_quantity=self.ask_quantity + quantity,
            ask_notional=self.ask_notional + notional,
            ask_loss=self.ask_loss + loss,
        )


def _share(notional: Decimal, part: Decimal, whole: Decimal) -> Decimal:
    """What `part` of a quantity is worth if the `whole` is worth `notional`; exact for all and for nothing."""
    if not part:
        return ZERO
    return notional if part == whole else notional * part / whole

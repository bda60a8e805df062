"""A one-way position and what a fill does to it: open, add, reduce, close, flip through zero.

The money that backs a position is not part of it: that is the ledger's (`domain.wallet`).
"""

from decimal import Decimal
from typing import Literal

from msgspec import Struct

from domain.money import ZERO, round_down

FillKind = Literal["OPEN", "ADD", "REDUCE", "CLOSE", "FLIP"]


class Position(Struct, frozen=True):
    """`signed_quantity` > 0 is LONG. `entry_notional` >= 0 is what was paid for it."""

    signed_quantity: Decimal = ZERO
    entry_notional: Decimal = ZERO

    @property
    def side(self) -> Literal["LONG", "SHORT"] | None:
        """LONG, SHORT, or None when flat."""
        if not self.signed_quantity:
            return None
        return "LONG" if self.signed_quantity > 0 else "SHORT"

    @property
    def entry_price(self) -> Decimal | None:
        """Weighted average price of entry, unrounded; None when flat."""
        return self.entry_notional / abs(self.signed_quantity) if self.signed_quantity else None

    @property
    def signed_notional(self) -> Decimal:
        """Entry notional with the position's sign."""
        return self.entry_notional if self.signed_quantity >= 0 else -self.entry_notional


class Fill(Struct, frozen=True):
    """What one fill did: the position after it, profit (+) or loss (-) realised before fees, and its kind."""

    position: Position
    realized_pnl: Decimal
    kind: FillKind


def apply_fill(before: Position, signed_quantity: Decimal, price: Decimal) -> Fill:
    """The effect of buying (+) or selling (-) `signed_quantity` (not 0) at `price`.

    Reducing releases the closed share of entry notional (rounded down, the rest stays), so realised plus unrealised
    profit over all users is exactly 0 at any mark price.
    """
    if before.signed_quantity * signed_quantity >= 0:
        return _open(before, signed_quantity, price)
    if abs(signed_quantity) <= abs(before.signed_quantity):
        return _reduce(before, signed_quantity, price)
    closed = _reduce(before, -before.signed_quantity, price)
    opened = _open(closed.position, signed_quantity + before.signed_quantity, price)
    return Fill(opened.position, closed.realized_pnl, "FLIP")


def _open(before: Position, signed_quantity: Decimal, price: Decimal) -> Fill:
    after = Position(before.signed_quantity + signed_quantity, before.entry_notional + abs(signed_quantity) * price)
    return Fill(after, ZERO, "ADD" if before.signed_quantity else "OPEN")


def _reduce(before: Position, signed_quantity: Decimal, price: Decimal) -> Fill:
    held, closed = abs(before.signed_quantity), abs(signed_quantity)
    is_closed = closed == held
    entry = before.entry_notional if is_closed else round_down(before.entry_notional * closed / held)
    profit = closed * price - entry
    after = Position(before.signed_quantity + signed_quantity, before.entry_notional - entry)
    return Fill(after, profit if before.signed_quantity > 0 else -profit, "CLOSE" if is_closed else "REDUCE")

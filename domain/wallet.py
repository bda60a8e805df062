"""How a user's money in one asset divides into available, order margin and position margin."""

from dataclasses import dataclass, replace
from decimal import Decimal

from domain.money import ZERO


@dataclass(frozen=True, slots=True)
class Wallet:
    """A user's balance as one instrument sees it.

    `order_margin` and `position_margin` are held for this instrument (part of `reserved`). `order_short` is what the
    orders require beyond `order_margin`: above 0 when a loss has used up the money, below 0 when settlement freed
    margin that a freeze still on its way will then not have to hold.
    """

    available: Decimal = ZERO
    order_margin: Decimal = ZERO
    position_margin: Decimal = ZERO
    order_short: Decimal = ZERO

    @property
    def reserved(self) -> Decimal:
        """What is held for this instrument."""
        return self.order_margin + self.position_margin


@dataclass(frozen=True, slots=True)
class Settled:
    """A wallet after settlement and what the insurance fund had to add (>= 0) to keep it from going negative."""

    wallet: Wallet
    insurance: Decimal


def freeze(wallet: Wallet, amount: Decimal) -> Wallet | None:
    """Require `amount` more (>= 0) for orders and hold it, less what was freed in advance.

    None when available does not cover it, and nothing changes.
    """
    held = max(ZERO, amount + min(wallet.order_short, ZERO))
    if held > wallet.available:
        return None
    return replace(
        wallet,
        available=wallet.available - held,
        order_margin=wallet.order_margin + held,
        order_short=wallet.order_short + amount - held,
    )


def settle(wallet: Wallet, cash: Decimal, position_margin: Decimal, order_margin_delta: Decimal) -> Settled:
    """Pay `cash` (profit less fees, either sign) and divide what there is anew.

    First the position gets `position_margin`, then open orders get what they required before plus
    `order_margin_delta`, the rest is available. What cannot be held for orders is kept as `order_short` (their
    cancellation follows); what is missing altogether the insurance fund pays.
    """
    required = wallet.order_margin + wallet.order_short + order_margin_delta
    total = wallet.available + wallet.order_margin + wallet.position_margin + cash
    insurance = max(ZERO, -total)
    total += insurance
    held_position = min(position_margin, total)
    held_orders = max(ZERO, min(required, total - held_position))
    return Settled(
        Wallet(total - held_position - held_orders, held_orders, held_position, required - held_orders), insurance
    )

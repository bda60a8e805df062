"""Margin of linear perpetuals, as pure functions. Money is in quote, quantities in base.

What a user must put up rounds up (see `domain.money`). Prices that come out are unrounded.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

from domain.money import ZERO, round_up


@dataclass(frozen=True, slots=True)
class Tier:
    """From `notional_from` (quote) up: maintenance = notional * rate - cumulative, leverage at most `max_leverage`."""

    notional_from: Decimal
    maintenance_margin_rate: Decimal
    cumulative: Decimal
    max_leverage: int


def initial_margin(notional: Decimal, leverage: int) -> Decimal:
    """Margin to open a position of `notional` (>= 0), rounded up to 8 decimals."""
    return round_up(notional / leverage)


def order_margin(opening_bids: Decimal, opening_asks: Decimal, leverage: int, extra: Decimal = ZERO) -> Decimal:
    """Margin that open orders need beside the position's own, rounded up to 8 decimals.

    One-way rule: only one side can be filled as an opening, so the larger does. `opening_bids` and `opening_asks`
    (quote, >= 0) are what the orders of each side would open beyond a position of the other; `extra` is for fees and
    open loss.
    Source of the rule: Binance Futures, margin requirement in one-way mode. Theirs lets the old position's margin back
    what an order through zero opens; here that has its own, since closing at a loss uses the old margin up.
    """
    return round_up(max(opening_bids, opening_asks) / leverage + extra)


def open_loss(side: Literal["BUY", "SELL"], quantity: Decimal, price: Decimal, mark_price: Decimal) -> Decimal:
    """What a fill of `quantity` at `price` would lose at once at `mark_price`: q * |min(0, side * (mark - price))|.

    Source: Binance Futures, cost required to open a position.
    """
    gap = price - mark_price if side == "BUY" else mark_price - price
    return quantity * max(ZERO, gap)


def tier_of(notional: Decimal, tiers: Sequence[Tier]) -> Tier:
    """The tier that `notional` (>= 0) falls in; `tiers` ascend from 0."""
    found = tiers[0]
    for tier in tiers:
        if notional < tier.notional_from:
            break
        found = tier
    return found


def maintenance_margin(notional: Decimal, tiers: Sequence[Tier]) -> Decimal:
    """Maintenance margin of a position of `notional` (>= 0) at mark: notional * rate - cumulative, unrounded.

    Source: Binance, leverage and margin of USD-M futures (maintenance amount).
    """
    tier = tier_of(notional, tiers)
    return notional * tier.maintenance_margin_rate - tier.cumulative


def unrealized_pnl(signed_quantity: Decimal, entry_notional: Decimal, mark_price: Decimal) -> Decimal:
    """Profit (+) or loss (-) if the position were closed at `mark_price`; `entry_notional` >= 0. Exact."""
    value = signed_quantity * mark_price
    return value - entry_notional if signed_quantity >= 0 else value + entry_notional


def margin_ratio(
    signed_quantity: Decimal, entry_notional: Decimal, margin: Decimal, mark_price: Decimal
) -> Decimal | None:
    """Isolated equity over notional at mark; None when there is nothing open. Liquidation when <= maintenance rate."""
    notional = abs(signed_quantity) * mark_price
    if not notional:
        return None
    return (margin + unrealized_pnl(signed_quantity, entry_notional, mark_price)) / notional


def liquidation_price(
    signed_quantity: Decimal, entry_notional: Decimal, margin: Decimal, tiers: Sequence[Tier]
) -> Decimal | None:
    """Mark price at which isolated equity equals maintenance margin, fees not included; None if no price does it.

    (margin + cum - side * q * entry) / (q * rate - side * q), solved in each tier until the result lies in the
    tier it was solved for. Source: Binance, liquidation price of USD-M futures; dYdX v4 without tiers.
    """
    quantity = abs(signed_quantity)
    if not quantity:
        return None
    side = 1 if signed_quantity > 0 else -1
    for index, tier in enumerate(tiers):
        price = (margin + tier.cumulative - side * entry_notional) / (
            quantity * tier.maintenance_margin_rate - side * quantity
        )
        above = tiers[index + 1].notional_from if index + 1 < len(tiers) else None
        if price * quantity >= tier.notional_from and (above is None or price * quantity < above):
            return price if price > ZERO else None
    return None


def margin_to_keep(signed_quantity: Decimal, entry_notional: Decimal, mark_price: Decimal, leverage: int) -> Decimal:
    """What has to stay with a position when its user takes margin out: what opening it would take, at entry or at
    mark, whichever is more, and what it has lost so far (quote, rounded up).

    Source: Binance Futures, how much margin can be removed from an isolated position.
    """
    lost = max(ZERO, -unrealized_pnl(signed_quantity, entry_notional, mark_price))
    return initial_margin(max(entry_notional, abs(signed_quantity) * mark_price), leverage) + round_up(lost)


def releveraged_margin(
    signed_quantity: Decimal, entry_notional: Decimal, margin: Decimal, mark_price: Decimal, before: int, after: int
) -> Decimal:
    """The margin of a position whose leverage changes: lower leverage fills it up to what the position would have
    taken, higher leverage releases all that need not stay."""
    if after < before:
        return max(margin, initial_margin(entry_notional, after))
    return min(margin, margin_to_keep(signed_quantity, entry_notional, mark_price, after))


def bankruptcy_price(signed_quantity: Decimal, entry_notional: Decimal, margin: Decimal) -> Decimal | None:
    """Price at which isolated equity is zero, fees not included: entry -/+ margin / q. None when flat or <= 0."""
    quantity = abs(signed_quantity)
    if not quantity:
        return None
    price = (entry_notional - margin if signed_quantity > 0 else entry_notional + margin) / quantity
    return price if price > ZERO else None

"""How a position is liquidated, as pure functions: how much of it, at which worst price, and who is deleveraged.

Money is in quote, quantities in base, prices in quote per base. Positions are signed: above 0 is LONG.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal

from domain.margin import Tier, bankruptcy_price, liquidation_price, maintenance_margin, tier_of, unrealized_pnl
from domain.matching import Side
from domain.money import AMOUNT_STEP, ZERO, round_down, round_up

# How far from mark a liquidation order may trade: what the book does not take within it is deleveraged.
PROTECTION_BAND = Decimal("0.05")
# A warning is due when margin is no more than so many times the maintenance margin.
WARNING_FACTOR = Decimal("1.5")
# Every fill rounds its fee, its share of the margin and of the entry notional to 8 decimals. So much (quote) is kept
# back for each lot that is closed, should each be a fill of its own: the insurance fund does not pay for it.
ROUNDING_PER_LOT = 20 * AMOUNT_STEP


@dataclass(frozen=True, slots=True)
class Holding:
    """A position with the money that stands behind it (`margin`: what its user can lose with it)."""

    signed_quantity: Decimal
    entry_notional: Decimal
    margin: Decimal

    @property
    def closing_side(self) -> Side:
        """The side of an order that closes it."""
        return "SELL" if self.signed_quantity > 0 else "BUY"

    def equity(self, mark: Decimal) -> Decimal:
        """Margin and unrealised profit at `mark`."""
        return self.margin + unrealized_pnl(self.signed_quantity, self.entry_notional, mark)


def must_liquidate(holding: Holding, mark: Decimal, tiers: Sequence[Tier]) -> bool:
    """Whether equity is down to the maintenance margin. In one tier: margin ratio <= maintenance rate."""
    notional = abs(holding.signed_quantity) * mark
    return notional > ZERO and holding.equity(mark) <= maintenance_margin(notional, tiers)


def risk_status(holding: Holding, mark: Decimal, tiers: Sequence[Tier]) -> str:
    """OPEN, WARNING when equity is within WARNING_FACTOR of the maintenance margin, or LIQUIDATION_PENDING."""
    notional = abs(holding.signed_quantity) * mark
    maintenance = maintenance_margin(notional, tiers)
    equity = holding.equity(mark)
    if notional and equity <= maintenance:
        return "LIQUIDATION_PENDING"
    return "WARNING" if notional and equity <= maintenance * WARNING_FACTOR else "OPEN"


def warning_price(holding: Holding, tiers: Sequence[Tier]) -> Decimal | None:
    """Mark price at which equity is WARNING_FACTOR times the maintenance margin; None if no price does it. Unrounded.

    It is the liquidation price under a maintenance margin that is so much higher.
    """
    stricter = [
        replace(
            tier,
            maintenance_margin_rate=tier.maintenance_margin_rate * WARNING_FACTOR,
            cumulative=tier.cumulative * WARNING_FACTOR,
        )
        for tier in tiers
    ]
    return liquidation_price(holding.signed_quantity, holding.entry_notional, holding.margin, stricter)


def quantity_to_close(holding: Holding, mark: Decimal, tiers: Sequence[Tier], lot_size: Decimal) -> Decimal:
    """How much to close next: down into the next lower tier, or in the lowest tier everything; whole lots.

    A position in a high tier needs more margin per notional only because of its size, and may be sound without it.
    Source of the rule: Binance, liquidation protocols (large positions are reduced tier by tier).
    """
    quantity = abs(holding.signed_quantity)
    tier = tier_of(quantity * mark, tiers)
    if not tier.notional_from:
        return quantity
    # One lot less than the tier begins with, since a position of exactly that notional lies in it.
    kept = ((tier.notional_from / mark / lot_size).to_integral_value(ROUND_CEILING) - 1) * lot_size
    return quantity - max(kept, ZERO)


def worst_price(
    holding: Holding,
    closing: Decimal,
    mark: Decimal,
    insurance: Decimal,
    fee_rate: Decimal,
    tick_size: Decimal,
    lot_size: Decimal,
) -> Decimal:
    """The worst price at which `closing` may be traded: whole ticks, rounded to the safe side.

    There the loss and the trading fee use up what stands behind this part of the position, and what the insurance
    fund grants it (`insurance_needed`); but never beyond PROTECTION_BAND of mark. ROUNDING_PER_LOT is kept back.
    """
    share = closing / abs(holding.signed_quantity)
    backing = holding.margin * share + insurance - closing / lot_size * ROUNDING_PER_LOT
    entry = holding.entry_notional * share
    if holding.signed_quantity > 0:
        price = max((entry - backing) / (closing * (1 - fee_rate)), mark * (1 - PROTECTION_BAND))
        return (price / tick_size).to_integral_value(ROUND_CEILING) * tick_size
    price = min((entry + backing) / (closing * (1 + fee_rate)), mark * (1 + PROTECTION_BAND))
    return (price / tick_size).to_integral_value(ROUND_FLOOR) * tick_size


def insurance_needed(holding: Holding, closing: Decimal, mark: Decimal) -> Decimal:
    """What the fund may be asked for (>= 0): what `closing` of the position is worth below zero at `mark`, no more.

    With equity at the mark it is nothing: then the position is sold no worse than where its own margin ends.
    """
    return max(ZERO, -holding.equity(mark) * closing / abs(holding.signed_quantity))


def justifying_price(holding: Holding, closing: Decimal, mark: Decimal, needed: Decimal) -> Decimal:
    """The price at which what is closed is worth nothing any more: where `needed` ends, seen from `mark`, or without
    need the bankruptcy price (0 if there is none). 8 decimals, rounded away from the mark."""
    long = holding.signed_quantity > 0
    if needed:
        price = mark + needed / closing if long else mark - needed / closing
    else:
        price = bankruptcy_price(holding.signed_quantity, holding.entry_notional, holding.margin) or ZERO
    return round_up(price) if long else round_down(price)


def deleverage_price(holding: Holding, tick_size: Decimal) -> Decimal:
    """The bankruptcy price in whole ticks, rounded so that the insurance fund pays nothing for it; one tick at least.

    The counterparties lose less than a tick by it.
    Source: dYdX v4, contract loss mechanism (deleveraging at the bankruptcy price of the loser).
    """
    price = bankruptcy_price(holding.signed_quantity, holding.entry_notional, holding.margin) or ZERO
    rounding = ROUND_CEILING if holding.signed_quantity > 0 else ROUND_FLOOR
    return max((price / tick_size).to_integral_value(rounding) * tick_size, tick_size)


def deleverage_score(holding: Holding, mark: Decimal) -> Decimal:
    """Rank in auto-deleveraging, highest first: profit per entry notional times effective leverage; a loss counts
    the less the higher the leverage is. Unrounded.

    Effective leverage = |mark value| / (mark value - bankruptcy value), which is what is left of the position.
    Source: BitMEX, auto-deleveraging.
    """
    notional = abs(holding.signed_quantity) * mark
    equity = holding.equity(mark)
    profit = unrealized_pnl(holding.signed_quantity, holding.entry_notional, mark) / holding.entry_notional
    if equity <= ZERO:
        # Bankrupt itself: nothing can be taken from it that it still has.
        return Decimal("-Infinity")
    leverage = notional / equity
    return profit * leverage if profit > ZERO else profit / leverage

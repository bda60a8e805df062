"""Mark price: the index, moved by what the book is willing to pay, within a limit.

fair price = mid of the impact bid and the impact ask; premium index = (fair - index) / index;
mark price = index * (1 + clamp(premium index + funding basis, +-limit)).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal

from domain.money import AMOUNT_STEP, ZERO

# What a taker with this margin at full leverage moves: thinner quotes say nothing about the price.
IMPACT_MARGIN = Decimal(500)
# How far book and funding may carry the mark away from the index.
MARK_DEVIATION_MAX = Decimal("0.005")
RATE_STEP = Decimal("1e-12")
# A mark older than this says nothing about now: the market process, or what it follows, stands still. The one rule of
# age, for order entry, the engine, risk and liquidation.
MARK_AGE_MAX = timedelta(seconds=10)


@dataclass(frozen=True, slots=True)
class MarkPrice:
    """Prices in quote per base, 8 decimals; `premium_index` and `funding_basis` as fractions, 12 decimals."""

    index_price: Decimal
    fair_price: Decimal
    mark_price: Decimal
    premium_index: Decimal
    funding_basis: Decimal


def impact_notional(initial_margin_fraction: Decimal, margin: Decimal = IMPACT_MARGIN) -> Decimal:
    """Quote value that impact prices are taken over: `margin` at the highest leverage."""
    return margin / initial_margin_fraction


def impact_price(levels: Iterable[tuple[Decimal, Decimal]], notional: Decimal) -> Decimal | None:
    """Average price of trading `notional` quote into `levels` (price, quantity; best first); None if too thin."""
    missing = notional
    bought = ZERO
    for price, quantity in levels:
        taken = min(missing, price * quantity)
        bought += taken / price
        missing -= taken
        if not missing:
            return notional / bought
    return None


def fair_price(impact_bid: Decimal | None, impact_ask: Decimal | None, index: Decimal) -> Decimal:
    """Mid of the impact prices; the index where one is missing, so that a thin book claims no premium."""
    if impact_bid is None or impact_ask is None:
        return index
    return (impact_bid + impact_ask) / 2


def premium_index(fair: Decimal, index: Decimal) -> Decimal:
    """By which fraction the book is above the index."""
    return (fair - index) / index


def funding_basis(funding_rate: Decimal, until_funding: timedelta, interval: timedelta) -> Decimal:
    """The part of `funding_rate` that is still to be paid: it shrinks to zero as its settlement comes nearer."""
    return funding_rate * (until_funding // timedelta(milliseconds=1)) / (interval // timedelta(milliseconds=1))


def next_funding_time(now: datetime, interval: timedelta) -> datetime:
    """The first multiple of `interval` since the Unix epoch that lies after `now`."""
    epoch = datetime.fromtimestamp(0, now.tzinfo)
    return epoch + ((now - epoch) // interval + 1) * interval


def mark_price(index: Decimal, premium: Decimal, basis: Decimal, limit: Decimal = MARK_DEVIATION_MAX) -> Decimal:
    """The index moved by premium and basis, by no more than the fraction `limit`; 8 decimals."""
    moved = max(-limit, min(limit, premium + basis))
    return (index * (1 + moved)).quantize(AMOUNT_STEP)


def calculate(index: Decimal, fair: Decimal, basis: Decimal, limit: Decimal = MARK_DEVIATION_MAX) -> MarkPrice:
    """All published figures from their three inputs, rounded half-even to the decimals they are kept at."""
    premium = premium_index(fair, index)
    return MarkPrice(
        index_price=index.quantize(AMOUNT_STEP),
        fair_price=fair.quantize(AMOUNT_STEP),
        mark_price=mark_price(index, premium, basis, limit),
        premium_index=premium.quantize(RATE_STEP),
        funding_basis=basis.quantize(RATE_STEP),
    )

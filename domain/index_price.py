"""Index price: what several spot exchanges say an asset is worth, so that no single one of them decides it.

index = sum of weight_i * price_i, each price smoothed by VWAP. Outliers are filtered: stale sources are dropped, each
of the others is clamped to the median +- 2 %, fewer than two give no index. Prices are quote per base at 8 decimals,
rounded half-even; weights are relative, those of the sources in use are scaled to a sum of one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from decimal import Decimal
from statistics import median
from typing import NamedTuple

from domain.money import AMOUNT_STEP, ZERO

# How far from the median a source is believed.
DEVIATION_MAX = Decimal("0.02")
SOURCES_MIN = 2
# A market in which nobody trades for so long says nothing about the price of now; the same for one from the future.
QUIET_MAX = timedelta(minutes=2)
# The same bound as that of a price an operator may set.
PRICE_MAX = Decimal("1e12")


class InsanePriceError(ValueError):
    """A price or quantity that cannot be one: not a number, not positive, or absurdly large."""


class SpotTrade(NamedTuple):
    """One trade at a source: price in quote per base, quantity in base."""

    price: Decimal
    quantity: Decimal
    at: datetime


@dataclass(frozen=True, slots=True)
class Quote:
    """A source's smoothed price, the time of its latest trade, and when the source told us."""

    price: Decimal
    traded_at: datetime
    received_at: datetime


@dataclass(frozen=True, slots=True)
class Source:
    """One source of one instrument: its last good `quote`, and what went wrong since, if anything did."""

    name: str
    weight: Decimal
    quote: Quote | None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class UsedSource:
    """A source in an index: its price, that price as clamped, its share of all weights."""

    name: str
    price: Decimal
    clamped: Decimal
    weight: Decimal


@dataclass(frozen=True, slots=True)
class IndexPrice:
    """`price` is None when there is no fresh index; `dropped` says why a source was left out."""

    price: Decimal | None
    used: tuple[UsedSource, ...] = ()
    dropped: Mapping[str, str] = field(default_factory=dict)


def vwap(trades: Sequence[SpotTrade], now: datetime, window: timedelta) -> Decimal:
    """Volume-weighted average price: sum of price * quantity / sum of quantity, over the last `window`.

    Older trades count only where there is no other: then the latest stands alone. `trades` come oldest first, at least
    one. Raises InsanePriceError when any of them is none, since the rest of such an answer is worth no more.
    """
    for trade in trades:
        _require_sane(trade.price)
        _require_sane(trade.quantity)
    recent = [trade for trade in trades if trade.at > now - window] or trades[-1:]
    value = sum((trade.price * trade.quantity for trade in recent), ZERO)
    return (value / sum(trade.quantity for trade in recent)).quantize(AMOUNT_STEP)


def index_price(
    sources: Sequence[Source], now: datetime, stale_after: timedelta, deviation: Decimal = DEVIATION_MAX
) -> IndexPrice:
    """The index from the sources that are live at `now`: those that answered within `stale_after`, and sanely."""
    dropped = {source.name: reason for source in sources if (reason := _flaw(source, now, stale_after))}
    live = [(source, source.quote.price) for source in sources if source.quote and source.name not in dropped]
    if len(live) < SOURCES_MIN:
        return IndexPrice(None, dropped=dropped)
    prices = [price for _, price in live]
    middle = median(prices)
    clamped = [clamp_to_median(price, middle, deviation) for price in prices]
    # Of two that contradict each other, either may be the insane one, and their middle is neither's price.
    if sum(before == after for before, after in zip(prices, clamped, strict=True)) < SOURCES_MIN:
        return IndexPrice(None, dropped=dropped | {source.name: "contradicted" for source, _ in live})
    weights = [source.weight for source, _ in live]
    used = tuple(
        UsedSource(source.name, price, counted, source.weight / sum(weights))
        for (source, price), counted in zip(live, clamped, strict=True)
    )
    return IndexPrice(weighted_average(clamped, weights), used, dropped)


def clamp_to_median(price: Decimal, middle: Decimal, deviation: Decimal) -> Decimal:
    """`price`, moved to at most the fraction `deviation` away from `middle`."""
    lowest, highest = (middle * (1 - deviation)).quantize(AMOUNT_STEP), (middle * (1 + deviation)).quantize(AMOUNT_STEP)
    return min(max(price, lowest), highest)


def weighted_average(prices: Sequence[Decimal], weights: Sequence[Decimal]) -> Decimal:
    """Sum of weight_i * price_i, the weights scaled to a sum of one; 8 decimals."""
    value = sum((price * weight for price, weight in zip(prices, weights, strict=True)), ZERO)
    return (value / sum(weights)).quantize(AMOUNT_STEP)


def _flaw(source: Source, now: datetime, stale_after: timedelta) -> str | None:
    quote = source.quote
    if quote is None:
        return source.error or "no answer yet"
    if now - quote.received_at > stale_after:
        return source.error or "stale"
    if abs(now - quote.traded_at) > QUIET_MAX:
        return "no recent trade"
    if not is_sane(quote.price):
        return "insane price"
    return None


def is_sane(number: Decimal) -> bool:
    """Whether `number` can be a price or a quantity."""
    return number.is_finite() and 0 < number < PRICE_MAX


def _require_sane(number: Decimal) -> None:
    if not is_sane(number):
        raise InsanePriceError(f"Expected a number above 0 and below {PRICE_MAX}, was {number}")

"""Funding rate: what the longs pay the shorts for the perpetual standing above its index.

rate = clamp((P + clamp(I - P, +-0.05 %)) * interval / 8 h, +-cap)

P is the time average of the premium index over the interval: the plain mean of its samples, which are taken at equal
distances; time without samples weighs nothing. I is the interest of 0.01 % per 8 h. As long as P is within 0.05 % of
I, the rate is I. Source of the formula: Binance Futures and Bybit, funding rate; theirs too is divided by 8 / N for an
interval of N hours.

The cap is 75 % of what a position at the highest leverage has above its maintenance margin, so that one settlement
alone never liquidates one that stood at its initial margin. Source: BitMEX, funding rate caps.
"""

from collections.abc import Sequence
from datetime import timedelta
from decimal import Decimal

from domain.margin import Tier
from domain.mark_price import RATE_STEP

INTEREST = Decimal("0.0001")
DAMPER = Decimal("0.0005")
CAP_SHARE = Decimal("0.75")
# INTEREST and the premium are rates of so long a time.
RATE_INTERVAL = timedelta(hours=8)
_MS = timedelta(milliseconds=1)


def funding_rate(premium_average: Decimal, interval: timedelta, cap: Decimal, interest: Decimal = INTEREST) -> Decimal:
    """The rate of one `interval`, at most `cap` either way: longs pay it if positive; 12 decimals, half-even."""
    rate = premium_average + bounded(interest - premium_average, DAMPER)
    return bounded(rate * (interval // _MS) / (RATE_INTERVAL // _MS), cap).quantize(RATE_STEP)


def rate_cap(tiers: Sequence[Tier], share: Decimal = CAP_SHARE) -> Decimal:
    """The highest rate of one settlement: `share` of initial less maintenance margin rate in the lowest tier."""
    lowest = tiers[0]
    return share * (Decimal(1) / lowest.max_leverage - lowest.maintenance_margin_rate)


def bounded(value: Decimal, limit: Decimal) -> Decimal:
    """`value`, but within plus and minus `limit`."""
    return max(-limit, min(limit, value))

"""The funding rate: interest while the premium is small, the premium less the damper beyond, never above the cap."""

from datetime import timedelta
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from domain.funding_rate import DAMPER, INTEREST, bounded, funding_rate, rate_cap
from domain.margin import Tier

D = Decimal
EIGHT_HOURS = timedelta(hours=8)
NO_CAP = D(10)
RATES = st.decimals(D("-0.5"), D("0.5"), places=12)
CAPS = st.decimals(D("0.0001"), D("0.05"), places=6)


@pytest.mark.parametrize(
    ("premium", "rate"),
    [
        ("0", "0.0001"),
        ("0.0006", "0.0001"),
        ("-0.0004", "0.0001"),
        ("0.0007", "0.0002"),
        ("-0.0005", "0"),
        ("-0.001", "-0.0005"),
        ("0.01", "0.0095"),
    ],
)
def test_the_rate_is_the_interest_until_the_premium_leaves_the_damper(premium: str, rate: str) -> None:
    assert funding_rate(D(premium), EIGHT_HOURS, NO_CAP) == D(rate)


def test_a_shorter_interval_pays_its_share_of_eight_hours() -> None:
    assert funding_rate(D("0.001"), timedelta(hours=4), NO_CAP) == D("0.00025")
    assert funding_rate(D("0.001"), timedelta(seconds=60), NO_CAP) == D("0.000001041667")


@given(RATES, CAPS)
def test_no_settlement_is_above_the_cap_either_way(premium: Decimal, cap: Decimal) -> None:
    assert abs(funding_rate(premium, EIGHT_HOURS, cap)) <= cap


@given(RATES, RATES, CAPS)
def test_a_higher_premium_never_costs_the_longs_less(one: Decimal, other: Decimal, cap: Decimal) -> None:
    low, high = sorted((one, other))
    assert funding_rate(low, EIGHT_HOURS, cap) <= funding_rate(high, EIGHT_HOURS, cap)


@given(RATES)
def test_without_a_cap_the_rate_is_within_the_damper_of_the_premium_or_the_interest(premium: Decimal) -> None:
    rate = funding_rate(premium, EIGHT_HOURS, NO_CAP)
    assert rate == INTEREST or abs(rate - premium) == DAMPER


def test_the_cap_leaves_a_quarter_of_what_stands_above_maintenance_margin() -> None:
    tiers = [Tier(D(0), D("0.005"), D(0), 100), Tier(D(250_000), D("0.01"), D(1_250), 50)]
    assert rate_cap(tiers) == D("0.00375")
    assert bounded(D("-0.01"), rate_cap(tiers)) == D("-0.00375")

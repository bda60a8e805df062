"""Mark price rules: published examples, and what happens at the edges."""

from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest

from domain import mark_price
from domain.money import ZERO

HOUR = timedelta(hours=1)


def test_impact_notional_is_the_margin_at_full_leverage() -> None:
    assert mark_price.impact_notional(Decimal("0.10"), Decimal(500)) == 5000


@pytest.mark.parametrize(
    ("index", "rate", "until_funding", "interval", "expected"),
    [("2000", "0.005", HOUR / 2, HOUR, "2005"), ("10000", "0.001", 4 * HOUR, 8 * HOUR, "10005")],
)
def test_the_basis_is_the_funding_still_to_be_paid(
    index: str, rate: str, until_funding: timedelta, interval: timedelta, expected: str
) -> None:
    basis = mark_price.funding_basis(Decimal(rate), until_funding, interval)
    assert mark_price.mark_price(Decimal(index), ZERO, basis) == Decimal(expected)


@pytest.mark.parametrize(
    ("premium", "basis", "expected"),
    [
        ("0.001", "0.0005", "10015"),
        ("-0.001", "0.0005", "9995"),
        ("0.02", "0", "10050"),
        ("-0.02", "0.001", "9950"),
        ("0.02", "-0.02", "10000"),
    ],
)
def test_premium_and_basis_move_the_mark_together_within_the_limit(premium: str, basis: str, expected: str) -> None:
    assert mark_price.mark_price(Decimal(10_000), Decimal(premium), Decimal(basis)) == Decimal(expected)


def test_the_impact_price_is_the_average_over_the_levels_a_taker_needs() -> None:
    levels = [(Decimal(100), Decimal(1)), (Decimal(200), Decimal(10))]
    # 100 buys 1, another 200 buys 1 more: 300 for 2.
    assert mark_price.impact_price(levels, Decimal(300)) == 150
    assert mark_price.impact_price(levels, Decimal(50)) == 100


def test_a_book_thinner_than_the_impact_notional_has_no_impact_price() -> None:
    assert mark_price.impact_price([(Decimal(100), Decimal(1))], Decimal("100.01")) is None
    assert mark_price.impact_price([], Decimal(1)) is None


def test_a_missing_side_means_no_premium() -> None:
    index = Decimal(60_000)
    fair = mark_price.fair_price(Decimal(61_000), None, index)
    assert mark_price.calculate(index, fair, ZERO).mark_price == index
    assert mark_price.premium_index(fair, index) == 0


def test_all_figures_follow_from_index_book_and_basis() -> None:
    fair = mark_price.fair_price(Decimal(60_050), Decimal(60_070), Decimal(60_000))
    mark = mark_price.calculate(Decimal(60_000), fair, Decimal("0.0001"))
    assert mark.fair_price == 60_060
    assert mark.premium_index == Decimal("0.001")
    assert mark.mark_price == 60_066


def test_a_held_index_is_the_mark_whatever_the_book_says() -> None:
    mark = mark_price.calculate(Decimal(60_000), Decimal(61_000), Decimal("0.01"), limit=ZERO)
    assert mark.mark_price == 60_000
    assert mark.premium_index > 0


def test_the_next_funding_time_is_a_multiple_of_the_interval_after_now() -> None:
    assert mark_price.next_funding_time(datetime(2026, 1, 1, 7, 59, tzinfo=UTC), 8 * HOUR).hour == 8
    assert mark_price.next_funding_time(datetime(2026, 1, 1, 8, 0, tzinfo=UTC), 8 * HOUR).hour == 16

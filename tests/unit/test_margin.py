"""Margin of positions: maintenance by tier, liquidation and bankruptcy prices, and what ties them together."""

from collections.abc import Sequence
from decimal import Decimal

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from domain.margin import (
    Tier,
    bankruptcy_price,
    initial_margin,
    liquidation_price,
    maintenance_margin,
    margin_ratio,
    order_margin,
    tier_of,
    unrealized_pnl,
)
from domain.money import AMOUNT_STEP

TINY = Decimal("1e-12")


def tiers_of(*steps: tuple[int, str, int]) -> list[Tier]:
    """Tiers from (notional from, rate, leverage); the cumulative amounts follow, so that there is no jump."""
    tiers: list[Tier] = []
    for notional_from, rate, leverage in steps:
        last = tiers[-1] if tiers else Tier(Decimal(0), Decimal(0), Decimal(0), 0)
        jump = notional_from * (Decimal(rate) - last.maintenance_margin_rate)
        tiers.append(Tier(Decimal(notional_from), Decimal(rate), last.cumulative + jump, leverage))
    return tiers


TIERS = tiers_of((0, "0.005", 100), (250_000, "0.01", 50), (1_000_000, "0.025", 20), (5_000_000, "0.05", 10))
# The rules ask that a tier begins where the one below ends; the seeded tables do.
POSITIONS = st.tuples(
    st.decimals("0.001", 500, places=3),
    st.decimals(1, 100_000, places=1),
    st.integers(1, 100),
    st.sampled_from([1, -1]),
)


def equity(quantity: Decimal, entry_notional: Decimal, margin: Decimal, mark: Decimal) -> Decimal:
    return margin + unrealized_pnl(quantity, entry_notional, mark)


@given(POSITIONS)
def test_equity_is_the_maintenance_margin_at_the_liquidation_price(
    position: tuple[Decimal, Decimal, int, int],
) -> None:
    size, entry, leverage, side = position
    quantity, notional = side * size, size * entry
    margin = initial_margin(notional, leverage)
    price = liquidation_price(quantity, notional, margin, TIERS)
    if price is None:
        assert side > 0, "a short can always be liquidated"
        assert margin >= notional, "a long only cannot be when nothing is borrowed"
        return
    needed = maintenance_margin(size * price, TIERS)
    assert abs(equity(quantity, notional, margin, price) - needed) <= needed * TINY + TINY


@given(POSITIONS, st.decimals("0.001", "0.2", places=3))
def test_only_beyond_the_liquidation_price_is_equity_below_maintenance(
    position: tuple[Decimal, Decimal, int, int], step: Decimal
) -> None:
    size, entry, leverage, side = position
    quantity, notional = side * size, size * entry
    margin = initial_margin(notional, leverage)
    price = liquidation_price(quantity, notional, margin, TIERS)
    assume(price is not None)
    assert price is not None
    better, worse = price * (1 + side * step), price * (1 - side * step)
    assert equity(quantity, notional, margin, better) > maintenance_margin(size * better, TIERS)
    assert equity(quantity, notional, margin, worse) < maintenance_margin(size * worse, TIERS)


@given(POSITIONS)
def test_bankruptcy_comes_after_liquidation_and_leaves_nothing(position: tuple[Decimal, Decimal, int, int]) -> None:
    size, entry, leverage, side = position
    quantity, notional = side * size, size * entry
    margin = initial_margin(notional, leverage)
    bankrupt, liquidated = (
        bankruptcy_price(quantity, notional, margin),
        liquidation_price(quantity, notional, margin, TIERS),
    )
    if bankrupt is None:
        assert side > 0
        assert margin >= notional
        return
    assert abs(equity(quantity, notional, margin, bankrupt)) <= notional * TINY
    assert liquidated is not None
    assert side * (liquidated - bankrupt) > 0


@given(st.integers(0, 10_000_000))
def test_maintenance_margin_is_continuous_and_grows_with_the_position(notional: int) -> None:
    here, next_one = maintenance_margin(Decimal(notional), TIERS), maintenance_margin(Decimal(notional + 1), TIERS)
    assert 0 < next_one - here <= Decimal("0.05")


@pytest.mark.parametrize(
    ("notional", "rate"), [("0", "0.005"), ("249999.99", "0.005"), ("250000", "0.01"), ("1e9", "0.05")]
)
def test_a_tier_holds_from_its_lower_end_up(notional: str, rate: str) -> None:
    assert tier_of(Decimal(notional), TIERS).maintenance_margin_rate == Decimal(rate)


@pytest.mark.parametrize("tiers", [TIERS, TIERS[:1]])
def test_nothing_open_has_no_prices_and_no_ratio(tiers: Sequence[Tier]) -> None:
    zero = Decimal(0)
    assert liquidation_price(zero, zero, zero, tiers) is None
    assert bankruptcy_price(zero, zero, zero) is None
    assert margin_ratio(zero, zero, zero, Decimal(100)) is None
    assert maintenance_margin(zero, tiers) == 0


def test_margin_ratio_is_equity_over_notional_at_mark() -> None:
    assert margin_ratio(Decimal(2), Decimal(200), Decimal(20), Decimal(95)) == Decimal(10) / 190
    assert margin_ratio(Decimal(-2), Decimal(200), Decimal(20), Decimal(95)) == Decimal(30) / 190


@given(st.decimals(0, 10**12, places=8), st.integers(1, 125))
def test_initial_margin_covers_its_share_to_the_last_step(notional: Decimal, leverage: int) -> None:
    margin = initial_margin(notional, leverage)
    assert 0 <= margin * leverage - notional < AMOUNT_STEP * leverage


@given(st.decimals(0, 10**6, places=4), st.decimals(0, 10**6, places=4), st.integers(1, 100))
def test_order_margin_is_the_initial_margin_of_the_larger_side(bids: Decimal, asks: Decimal, leverage: int) -> None:
    assert order_margin(bids, asks, leverage) == initial_margin(max(bids, asks), leverage)

"""How much is liquidated, at which worst price, and in which order others are deleveraged."""

from dataclasses import replace
from decimal import Decimal
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from domain.liquidation import (
    PROTECTION_BAND,
    Holding,
    deleverage_price,
    deleverage_score,
    insurance_needed,
    must_liquidate,
    quantity_to_close,
    risk_status,
    worst_price,
)
from domain.margin import Tier, bankruptcy_price, liquidation_price, maintenance_margin, tier_of
from domain.money import ZERO
from domain.wallet import BookedFill, Wallet, liquidate, margin_after, settle_fills

TICK, LOT = Decimal("0.1"), Decimal("0.001")
TIERS = [
    Tier(ZERO, Decimal("0.005"), ZERO, 100),
    Tier(Decimal(50_000), Decimal("0.01"), Decimal(250), 50),
    Tier(Decimal(500_000), Decimal("0.025"), Decimal(7_750), 20),
]
FEE = Decimal("0.0005")
QUANTITIES = st.decimals("0.001", 50, places=3)
PRICES = st.decimals(1_000, 100_000, places=1)
SHARES = st.decimals("0.001", "0.5", places=3)
SIDES = st.sampled_from([1, -1])


@st.composite
def holdings(draw: st.DrawFn) -> Holding:
    quantity, entry = draw(QUANTITIES), draw(PRICES)
    notional = quantity * entry
    return Holding(draw(SIDES) * quantity, notional, (notional * draw(SHARES)).quantize(Decimal("1e-8")))


def close(holding: Holding, quantity: Decimal, price: Decimal) -> BookedFill:
    """The fill that closes `quantity` of the position at `price`."""
    side = 1 if holding.signed_quantity > 0 else -1
    entry = holding.entry_notional * quantity / abs(holding.signed_quantity)
    return BookedFill(
        before=holding.signed_quantity,
        after=holding.signed_quantity - side * quantity,
        price=price,
        leverage=10,
        realized_pnl=side * (quantity * price - entry),
        fee=quantity * price * FEE,
        is_liquidation=True,
    )


@given(holdings())
def test_a_position_is_liquidated_exactly_when_mark_crosses_its_liquidation_price(holding: Holding) -> None:
    price = liquidation_price(holding.signed_quantity, holding.entry_notional, holding.margin, TIERS)
    assume(price is not None)
    assert price is not None
    side = 1 if holding.signed_quantity > 0 else -1
    step = Decimal("1e-6") * price
    assert must_liquidate(holding, price - side * step, TIERS)
    assert not must_liquidate(holding, price + side * step, TIERS)


@pytest.mark.parametrize(
    ("mark", "status"), [("60000", "OPEN"), ("54400", "WARNING"), ("54270", "LIQUIDATION_PENDING")]
)
def test_a_warning_comes_before_the_liquidation(mark: str, status: str) -> None:
    holding = Holding(Decimal("0.5"), Decimal(30_000), Decimal(3_000))
    assert risk_status(holding, Decimal(mark), TIERS) == status


@given(holdings(), PRICES)
def test_a_large_position_is_reduced_by_one_tier_at_a_time(holding: Holding, mark: Decimal) -> None:
    quantity = abs(holding.signed_quantity)
    closing = quantity_to_close(holding, mark, TIERS, LOT)
    assert 0 < closing <= quantity
    assert closing % LOT == 0
    before, after = tier_of(quantity * mark, TIERS), tier_of((quantity - closing) * mark, TIERS)
    if before is TIERS[0]:
        assert closing == quantity
    else:
        assert after is TIERS[TIERS.index(before) - 1]
        # One lot less would not have been enough.
        assert tier_of((quantity - closing + LOT) * mark, TIERS) is before


@given(holdings(), PRICES, st.decimals(0, 1_000_000, places=2))
def test_a_fill_at_the_worst_price_costs_the_fund_no_more_than_it_granted(
    holding: Holding, mark: Decimal, insurance: Decimal
) -> None:
    quantity = abs(holding.signed_quantity)
    price = worst_price(holding, quantity, mark, insurance, FEE, TICK, LOT)
    settled = liquidate(Wallet(position_margin=holding.margin), close(holding, quantity, price))
    assert settled.insurance <= insurance
    low, high = mark * (1 - PROTECTION_BAND), mark * (1 + PROTECTION_BAND)
    assert price >= low if holding.signed_quantity > 0 else price <= high
    assert price % TICK == 0


@given(holdings(), PRICES)
def test_the_fund_is_asked_for_no_more_than_the_position_is_worth_below_zero_at_the_mark(
    holding: Holding, mark: Decimal
) -> None:
    quantity = abs(holding.signed_quantity)
    needed = insurance_needed(holding, quantity, mark)
    assert needed == max(ZERO, -holding.equity(mark))
    price = worst_price(holding, quantity, mark, needed, FEE, TICK, LOT)
    side = 1 if holding.signed_quantity > 0 else -1
    exact = bankruptcy_price(holding.signed_quantity, holding.entry_notional, holding.margin) or ZERO
    # Neither beyond where its margin ends nor, if that is beyond the mark, beyond the mark.
    assert side * (price - (exact if not needed else mark)) >= -Decimal("1e-8") or exact == 0


@given(holdings())
def test_deleveraging_costs_the_fund_nothing_and_its_counterparties_less_than_a_tick(holding: Holding) -> None:
    exact = bankruptcy_price(holding.signed_quantity, holding.entry_notional, holding.margin) or ZERO
    price = deleverage_price(holding, TICK)
    if holding.signed_quantity > 0:
        # They buy.
        assert exact <= price < exact + TICK or price == TICK
    else:
        assert exact - TICK < price <= exact


@pytest.mark.parametrize("side", [1, -1])
def test_a_position_that_has_equity_is_sold_no_worse_than_where_its_margin_ends(side: int) -> None:
    """Long 4 BTC at 60000 and 100x: bankrupt at 59400, due at 59690, where it is worth 1160. And its mirror image."""
    holding = Holding(side * Decimal(4), Decimal(240_000), Decimal(2_400))
    mark = 60_000 - side * Decimal(310)
    assert holding.equity(mark) == 1_160
    assert must_liquidate(holding, mark, TIERS)
    assert insurance_needed(holding, Decimal(4), mark) == 0
    price = worst_price(holding, Decimal(4), mark, ZERO, FEE, TICK, LOT)
    # 30 more for the trading fee.
    assert price == Decimal("59429.8" if side > 0 else "60569.7")
    assert deleverage_price(holding, TICK) == 60_000 - side * 600


@given(holdings(), st.lists(SHARES, min_size=1, max_size=4), PRICES)
def test_a_liquidation_touches_nothing_but_the_margin_and_the_fund(
    holding: Holding, parts: list[Decimal], price: Decimal
) -> None:
    wallet = Wallet(Decimal(1_000), Decimal(50), holding.margin)
    fills, quantity = [], holding.signed_quantity
    for part in parts:
        closing = max((abs(quantity) * part).quantize(LOT), LOT)
        if closing >= abs(quantity):
            break
        fills.append(
            close(Holding(quantity, holding.entry_notional * quantity / holding.signed_quantity, ZERO), closing, price)
        )
        quantity = fills[-1].after
    fills.append(
        close(
            Holding(quantity, holding.entry_notional * quantity / holding.signed_quantity, ZERO), abs(quantity), price
        )
    )
    settled = settle_fills(wallet, fills, ZERO)
    after = settled.wallet
    assert (after.available, after.order_margin, after.position_margin) == (Decimal(1_000), Decimal(50), ZERO)
    cash = sum(fill.cash for fill in fills)
    assert holding.margin + cash + settled.insurance == settled.liquidation_fee + settled.surplus
    assert min(settled.insurance, settled.liquidation_fee, settled.surplus) >= 0


@given(holdings(), SHARES, PRICES)
def test_the_rest_of_a_position_is_bankrupt_at_no_better_price_than_the_whole_was(
    holding: Holding, part: Decimal, price: Decimal
) -> None:
    """Counterparties of a deleveraging that follows a partial fill, however bad that was, are not the worse for it."""
    closing = max((abs(holding.signed_quantity) * part).quantize(LOT), LOT)
    assume(closing < abs(holding.signed_quantity))
    fill = close(holding, closing, price)
    margin = liquidate(Wallet(position_margin=holding.margin), fill).wallet.position_margin
    entry = holding.entry_notional * abs(fill.after) / abs(holding.signed_quantity)
    before = bankruptcy_price(holding.signed_quantity, holding.entry_notional, holding.margin) or ZERO
    after = bankruptcy_price(fill.after, entry, margin) or ZERO
    side = 1 if holding.signed_quantity > 0 else -1
    assert side * (after - before) <= Decimal("1e-8") / abs(fill.after)


def test_a_partial_liquidation_leaves_its_surplus_with_the_position() -> None:
    wallet = Wallet(Decimal(100), ZERO, Decimal(1_000))
    holding = Holding(Decimal(2), Decimal(20_000), Decimal(1_000))
    settled = liquidate(wallet, close(holding, Decimal(1), Decimal(9_600)))
    # A loss of 400, 4.80 of trading fee and 48 of liquidation fee.
    assert settled.wallet == Wallet(Decimal(100), ZERO, Decimal("547.2"))
    assert (settled.liquidation_fee, settled.surplus, settled.insurance) == (Decimal(48), ZERO, ZERO)


def test_what_came_before_a_liquidation_in_the_same_range_is_settled_first() -> None:
    opening = BookedFill(ZERO, Decimal(1), Decimal(10_000), 10, ZERO, Decimal(5))
    forced = close(Holding(Decimal(1), Decimal(10_000), Decimal(1_000)), Decimal(1), Decimal(9_000))
    settled = settle_fills(Wallet(available=Decimal(5_000)), [opening, forced], ZERO)
    assert settled.wallet == Wallet(Decimal(3_995), ZERO, ZERO)
    assert settled.insurance == Decimal("4.5")


def test_cross_margin_stands_behind_a_liquidation_with_all_it_has() -> None:
    fill = close(Holding(Decimal(1), Decimal(10_000), ZERO), Decimal(1), Decimal(8_000))
    crossed = replace(fill, is_cross=True)
    settled = settle_fills(Wallet(Decimal(3_000), ZERO, Decimal(1_000)), [crossed], ZERO)
    assert settled.insurance == settled.surplus == ZERO
    assert settled.liquidation_fee == Decimal(40)
    assert settled.wallet == Wallet(Decimal(4_000) - 2_000 - 4 - 40, ZERO, ZERO)


@given(QUANTITIES, PRICES, PRICES, st.lists(QUANTITIES, min_size=1, max_size=8), SIDES)
def test_margin_falls_with_the_quantity_and_never_below_its_share(
    size: Decimal, entry: Decimal, exit_price: Decimal, parts: list[Decimal], side: int
) -> None:
    opened = margin_after(ZERO, BookedFill(ZERO, side * size, entry, 10, ZERO, ZERO))
    margin, held = opened, size
    for count, part in enumerate(parts, 1):
        closing = min(part, held)
        if not closing:
            break
        margin = margin_after(margin, BookedFill(side * held, side * (held - closing), exit_price, 10, ZERO, ZERO))
        held -= closing
        share = opened * held / size
        assert -Decimal("1e-16") <= margin - share <= count * Decimal("1e-8")


@given(QUANTITIES, QUANTITIES, PRICES, SIDES)
def test_after_a_flip_only_the_new_position_is_backed(
    size: Decimal, beyond: Decimal, price: Decimal, side: int
) -> None:
    flipped = margin_after(Decimal(77), BookedFill(side * size, -side * beyond, price, 10, ZERO, ZERO))
    assert flipped == margin_after(ZERO, BookedFill(ZERO, -side * beyond, price, 10, ZERO, ZERO))


def test_the_most_profitable_and_most_leveraged_are_deleveraged_first() -> None:
    mark = Decimal(110)
    rich = Holding(Decimal(1), Decimal(100), Decimal(10))
    unlevered = Holding(Decimal(1), Decimal(100), Decimal(100))
    losing = Holding(Decimal(-1), Decimal(100), Decimal(50))
    losing_more = Holding(Decimal(-1), Decimal(100), Decimal(20))
    bankrupt = Holding(Decimal(-1), Decimal(100), Decimal(5))
    ranked = sorted([losing, bankrupt, unlevered, losing_more, rich], key=lambda h: -deleverage_score(h, mark))
    assert ranked == [rich, unlevered, losing_more, losing, bankrupt]


def test_maintenance_grows_without_a_jump_where_a_tier_begins() -> None:
    for lower, upper in pairwise(TIERS):
        edge = upper.notional_from
        assert edge * lower.maintenance_margin_rate - lower.cumulative == maintenance_margin(edge, TIERS)

"""What open orders need beside the position."""

from decimal import Decimal

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from domain.exposure import Exposure, Side
from domain.money import ZERO, round_up
from domain.order_entry import amendment_claim

FEE = Decimal("0.0005")
SIDES = st.sampled_from(["BUY", "SELL"])
QUANTITIES = st.decimals("0.001", 10, places=3)
PRICES = st.decimals("0.1", 200_000, places=1)
ORDERS = st.lists(st.tuples(SIDES, QUANTITIES, PRICES), max_size=8)
HELD = st.tuples(st.sampled_from([-1, 0, 1]), QUANTITIES, PRICES)


def exposure(held: tuple[int, Decimal, Decimal], leverage: int = 10) -> Exposure:
    side, quantity, entry = held
    return Exposure(leverage, side * quantity, abs(side) * quantity * entry)


def with_orders(state: Exposure, orders: list[tuple[Side, Decimal, Decimal]]) -> Exposure:
    for side, quantity, price in orders:
        state = state.with_order(side, quantity, price)
    return state


@given(HELD, ORDERS, SIDES, QUANTITIES, PRICES)
def test_one_more_order_never_needs_less(
    held: tuple[int, Decimal, Decimal],
    orders: list[tuple[Side, Decimal, Decimal]],
    side: Side,
    quantity: Decimal,
    price: Decimal,
) -> None:
    before = with_orders(exposure(held), orders)
    after = before.with_order(side, quantity, price)
    assert 0 <= before.order_margin(FEE) <= after.order_margin(FEE)
    assert before.worst_notional <= after.worst_notional


@given(HELD, ORDERS, SIDES, QUANTITIES, PRICES)
def test_taking_an_order_out_again_restores_the_state(
    held: tuple[int, Decimal, Decimal],
    orders: list[tuple[Side, Decimal, Decimal]],
    side: Side,
    quantity: Decimal,
    price: Decimal,
) -> None:
    before = with_orders(exposure(held), orders)
    assert before.with_order(side, quantity, price).without_order(side, quantity, price) == before


@given(HELD, ORDERS, SIDES, QUANTITIES, QUANTITIES, PRICES)
def test_an_order_filled_in_parts_leaves_nothing_behind(
    held: tuple[int, Decimal, Decimal],
    orders: list[tuple[Side, Decimal, Decimal]],
    side: Side,
    first: Decimal,
    second: Decimal,
    price: Decimal,
) -> None:
    before = with_orders(exposure(held), orders)
    after = before.with_order(side, first + second, price).with_fill(side, first, price).with_fill(side, second, price)
    assert after.with_order_closed() == before


@given(HELD, ORDERS, SIDES, QUANTITIES, PRICES, QUANTITIES, PRICES, QUANTITIES)
def test_an_order_and_the_claim_of_its_amendment_cover_the_amended_order_whatever_is_filled_before(
    held: tuple[int, Decimal, Decimal],
    orders: list[tuple[Side, Decimal, Decimal]],
    side: Side,
    old_quantity: Decimal,
    old_price: Decimal,
    new_quantity: Decimal,
    new_price: Decimal,
    filled: Decimal,
) -> None:
    filled = min(filled - Decimal("0.001"), old_quantity, new_quantity)
    claimed, notional = amendment_claim(old_quantity, old_price, new_quantity, new_price)
    others = with_orders(exposure(held), orders)
    reserved = others.with_order(side, old_quantity - filled, old_price).with_claim(side, claimed, notional, 0)
    amended = others.with_order(side, new_quantity - filled, new_price)
    assert amended.order_margin(FEE) <= reserved.order_margin(FEE)
    assert amended.open_orders == reserved.open_orders


@given(QUANTITIES, PRICES, QUANTITIES, PRICES)
def test_an_amendment_that_is_not_larger_and_not_dearer_claims_nothing(
    old_quantity: Decimal, old_price: Decimal, new_quantity: Decimal, new_price: Decimal
) -> None:
    claim = amendment_claim(old_quantity, old_price, new_quantity, new_price)
    assert min(claim) >= 0
    if new_quantity <= old_quantity and new_quantity * new_price <= old_quantity * old_price:
        assert claim == (ZERO, ZERO)


@given(HELD, st.lists(st.tuples(QUANTITIES, PRICES), min_size=1, max_size=5))
def test_orders_that_can_only_reduce_need_nothing_at_any_price(
    held: tuple[int, Decimal, Decimal], orders: list[tuple[Decimal, Decimal]]
) -> None:
    state = exposure(held)
    assume(state.signed_quantity)
    side: Side = "SELL" if state.signed_quantity > 0 else "BUY"
    left = abs(state.signed_quantity)
    for quantity, price in orders:
        state = state.with_order(side, min(quantity, left), price)
        left -= min(quantity, left)
        assert state.order_margin(FEE) == 0
        assert state.worst_notional == state.entry_notional


@given(ORDERS.filter(bool), st.integers(1, 100))
def test_without_a_position_the_larger_side_is_backed_and_both_pay_fees(
    orders: list[tuple[Side, Decimal, Decimal]], leverage: int
) -> None:
    state = with_orders(Exposure(leverage), orders)
    larger, both = max(state.bid_notional, state.ask_notional), state.bid_notional + state.ask_notional
    assert state.order_margin(FEE) == round_up(larger / leverage + both * FEE)
    assert state.open_orders == len(orders)


@pytest.mark.parametrize(("held", "side"), [(1, "SELL"), (-1, "BUY")])
def test_an_order_through_zero_is_backed_for_all_that_it_opens(held: int, side: Side) -> None:
    before = Exposure(10, Decimal(held), Decimal(100))
    after = before.with_order(side, Decimal(3), Decimal(100))
    assert after.opening(side) == 2
    # None of the old position's margin: closing at a loss uses that up.
    assert after.order_margin(Decimal(0)) == Decimal(20)
    assert after.worst_notional == Decimal(200)


@given(HELD, ORDERS)
def test_the_position_is_replaced_and_orders_stay(
    held: tuple[int, Decimal, Decimal], orders: list[tuple[Side, Decimal, Decimal]]
) -> None:
    state = with_orders(Exposure(10), orders)
    moved = state.with_position(held[0] * held[1], abs(held[0]) * held[1] * held[2])
    assert moved.with_position(Decimal(0), Decimal(0)) == state
    assert abs(moved.signed_notional) == moved.entry_notional

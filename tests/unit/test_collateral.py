"""Laws of the free collateral, and of moving money within it."""

from decimal import Decimal

from hypothesis import given
from hypothesis import strategies as st

from domain.collateral import Collateral
from domain.money import ZERO
from domain.wallet import Wallet, settle, settle_within

amounts = st.decimals(0, 1_000_000, places=8)
changes = st.decimals(-1_000_000, 1_000_000, places=8)


@given(amounts, changes, amounts)
def test_a_loss_and_funding_take_from_it_and_a_profit_does_not_add(
    available: Decimal, loss: Decimal, owed: Decimal
) -> None:
    collateral = Collateral(available, loss, owed)
    assert collateral.free <= available
    assert collateral.free == available - max(loss, ZERO) - owed
    assert Collateral(available, loss, owed + 1).free == collateral.free - 1


@given(amounts, changes, amounts, changes)
def test_what_leaves_leaves_the_loss_and_the_funding_behind(
    available: Decimal, loss: Decimal, owed: Decimal, amount: Decimal
) -> None:
    collateral = Collateral(available, loss, owed)
    if not collateral.covers(amount):
        assert amount > 0
        assert available - amount < max(loss, ZERO) + owed
    elif amount > 0:
        assert available - amount >= max(loss, ZERO) + owed


@given(amounts, amounts, amounts, amounts, changes, changes)
def test_a_division_within_the_free_collateral_leaves_the_rest_available(
    available: Decimal, orders: Decimal, position: Decimal, free: Decimal, more: Decimal, order_delta: Decimal
) -> None:
    wallet, margin = Wallet(available, orders, position), max(ZERO, position + more)
    order_delta = max(order_delta, -orders)
    moved = settle_within(wallet, free, margin, order_delta)
    assert moved.available >= available - free
    assert moved.available + moved.reserved == wallet.available + wallet.reserved
    # What orders require does not depend on what can be held.
    assert moved.order_margin + moved.order_short == orders + order_delta
    if free >= available:
        assert moved == settle(wallet, ZERO, margin, order_delta).wallet

"""Money of a user divided into available, order margin and position margin."""

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from domain.wallet import Settled, Wallet, freeze, leave_to_user, return_margin, settle

MONEY = st.decimals(0, 10**9, places=8)
CASH = st.decimals(-(10**9), 10**9, places=8)
# What orders lack, or (negative) what is on its way to them but needed no more.
SHORT = st.decimals(-(10**9), 10**9, places=8)
WALLETS = st.builds(Wallet, MONEY, MONEY, MONEY, SHORT)


def total(wallet: Wallet) -> Decimal:
    return wallet.available + wallet.order_margin + wallet.position_margin


def required(wallet: Wallet) -> Decimal:
    return wallet.order_margin + wallet.order_short


@given(WALLETS, MONEY)
def test_freezing_moves_money_and_makes_none(wallet: Wallet, amount: Decimal) -> None:
    frozen = freeze(wallet, amount)
    if frozen is None:
        assert amount + min(wallet.order_short, Decimal(0)) > wallet.available
        return
    assert total(frozen) == total(wallet)
    assert required(frozen) == required(wallet) + amount
    assert frozen.position_margin == wallet.position_margin
    assert frozen.available >= 0


@given(st.builds(Wallet, MONEY, MONEY, MONEY), MONEY)
def test_exactly_what_is_available_can_be_frozen(wallet: Wallet, more: Decimal) -> None:
    assert freeze(wallet, wallet.available) == Wallet(
        Decimal(0), wallet.order_margin + wallet.available, wallet.position_margin
    )
    assert freeze(wallet, wallet.available + more + Decimal("0.00000001")) is None


@given(WALLETS, CASH, MONEY, CASH)
def test_settling_conserves_money_and_nobody_goes_negative(
    wallet: Wallet, cash: Decimal, position_margin: Decimal, delta: Decimal
) -> None:
    settled = settle(wallet, cash, position_margin, delta)
    after = settled.wallet
    assert total(after) == total(wallet) + cash + settled.insurance
    assert min(after.available, after.order_margin, after.position_margin, settled.insurance) >= 0
    assert required(after) == required(wallet) + delta
    assert after.reserved == after.order_margin + after.position_margin


@given(WALLETS, CASH, MONEY, CASH)
def test_the_position_comes_first_then_orders_then_the_rest_is_available(
    wallet: Wallet, cash: Decimal, position_margin: Decimal, delta: Decimal
) -> None:
    after = settle(wallet, cash, position_margin, delta).wallet
    if after.position_margin < position_margin:
        assert after.order_margin == after.available == 0
    else:
        assert after.position_margin == position_margin
    if after.order_short > 0:
        assert after.available == 0


@given(WALLETS, CASH, MONEY, CASH)
def test_the_insurance_fund_pays_only_what_nobody_else_can(
    wallet: Wallet, cash: Decimal, position_margin: Decimal, delta: Decimal
) -> None:
    settled = settle(wallet, cash, position_margin, delta)
    if settled.insurance:
        assert total(settled.wallet) == 0
        assert settled.insurance == -(total(wallet) + cash)


@given(st.builds(Wallet, MONEY, MONEY, MONEY), MONEY)
def test_what_was_frozen_comes_back_to_the_last_step(wallet: Wallet, amount: Decimal) -> None:
    frozen = freeze(wallet, amount)
    if frozen is not None:
        assert settle(frozen, Decimal(0), wallet.position_margin, -amount).wallet == wallet


@given(st.builds(Wallet, MONEY, MONEY, MONEY), MONEY, MONEY)
def test_a_hold_that_comes_after_its_release_ends_the_same(wallet: Wallet, amount: Decimal, freed: Decimal) -> None:
    """Settlement may free an order's margin between the order's check and its freeze."""
    change = -(wallet.order_margin + freed)
    early = settle(wallet, Decimal(0), wallet.position_margin, change).wallet
    assert early.order_short == -freed
    late = freeze(early, freed + amount)
    if amount <= early.available:
        assert late == Wallet(early.available - amount, amount, wallet.position_margin)
    else:
        assert late is None


def test_a_loss_takes_the_money_of_orders_before_that_of_the_position() -> None:
    wallet = Wallet(Decimal(5), Decimal(20), Decimal(30))
    settled = settle(wallet, Decimal(-10), Decimal(30), Decimal(0))
    assert settled.wallet == Wallet(Decimal(0), Decimal(15), Decimal(30), Decimal(5))
    repaid = settle(settled.wallet, Decimal(7), Decimal(30), Decimal(0))
    assert repaid.wallet == Wallet(Decimal(2), Decimal(20), Decimal(30), Decimal(0))


@given(WALLETS, MONEY, MONEY, MONEY)
def test_what_a_liquidation_leaves_to_the_fund_can_stay_with_its_user(
    wallet: Wallet, fee: Decimal, surplus: Decimal, amount: Decimal
) -> None:
    before = Settled(wallet, liquidation_fee=fee, surplus=surplus)
    after = leave_to_user(before, amount)
    left = min(amount, fee + surplus)
    assert after.wallet.available == wallet.available + left
    assert after.liquidation_fee + after.surplus == fee + surplus - left
    # The fee is touched only when nothing else is left.
    assert 0 <= after.surplus <= surplus
    assert after.liquidation_fee == fee or not after.surplus


@pytest.mark.parametrize(
    ("available", "margin", "stands", "expected"),
    [
        # All that the fill took stands for a loss, or a part of it, or nothing.
        ("80", "130", "100", ("100", "110")),
        ("80", "130", "90", ("90", "120")),
        ("80", "130", "80", ("80", "130")),
        # No more than it took, nor than it put behind the position: a loss that was paid is not made good.
        ("80", "130", "500", ("100", "110")),
        ("80", "105", "100", ("85", "100")),
        ("80", "90", "100", ("80", "90")),
    ],
)
def test_a_fill_gives_back_what_stands_for_a_loss(
    available: str, margin: str, stands: str, expected: tuple[str, str]
) -> None:
    before = Wallet(Decimal(100), Decimal(10), Decimal(100))
    wallet = return_margin(Wallet(Decimal(available), Decimal(0), Decimal(margin)), before, Decimal(stands))
    assert (wallet.available, wallet.position_margin) == (Decimal(expected[0]), Decimal(expected[1]))


@given(WALLETS, CASH, MONEY, CASH)
def test_what_a_position_lacks_of_its_margin_is_told(
    wallet: Wallet, cash: Decimal, margin: Decimal, more: Decimal
) -> None:
    settled = settle(wallet, cash, margin, more)
    assert settled.wallet.position_margin + settled.margin_short == margin
    assert not settled.margin_short or settled.wallet.available == settled.wallet.order_margin == 0

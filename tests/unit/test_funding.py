"""Laws of funding payments."""

from decimal import Decimal

from hypothesis import given
from hypothesis import strategies as st

from domain.funding import FundingRun, charge, funding_payment
from domain.money import AMOUNT_STEP, ZERO

amounts = st.decimals(0, 1_000_000, places=8)
quantities = st.decimals(-1_000, 1_000, places=8)
marks = st.decimals("0.00000001", 200_000, places=8)
rates = st.decimals("-0.03", "0.03", places=12)


@given(st.lists(quantities, max_size=20), marks, rates)
def test_payments_of_positions_that_sum_to_zero_leave_less_than_a_step_each(
    held: list[Decimal], mark: Decimal, rate: Decimal
) -> None:
    everybody = [*held, -sum(held, ZERO)]
    dust = -sum(funding_payment(quantity, mark, rate) for quantity in everybody)
    assert ZERO <= dust < len(everybody) * AMOUNT_STEP


@given(quantities, marks, rates)
def test_longs_pay_when_the_rate_is_positive_and_get_when_it_is_negative(
    quantity: Decimal, mark: Decimal, rate: Decimal
) -> None:
    payment, exact = funding_payment(quantity, mark, rate), -quantity * mark * rate
    assert exact - AMOUNT_STEP < payment <= exact
    assert payment.as_tuple().exponent == -8
    if quantity * rate > 0:
        assert payment < 0
    else:
        assert payment >= 0


@given(amounts, amounts, amounts)
def test_a_charge_takes_no_more_than_there_is_and_the_fund_only_what_is_missing(
    owed: Decimal, available: Decimal, margin: Decimal
) -> None:
    source = charge(owed, available, margin)
    assert source.available + source.position_margin + source.insurance == owed
    assert ZERO <= source.available <= available
    assert ZERO <= source.position_margin <= margin
    assert source.position_margin == 0 or source.available == available
    assert source.insurance == 0 or source.position_margin == margin


def test_a_run_is_named_by_instrument_and_utc_time() -> None:
    assert FundingRun("BTC-USDT-PERP", "2026-01-01T10:00:00+02:00").reference == "BTC-USDT-PERP:20260101T080000.000000Z"

"""Laws of funding payments."""

from decimal import Decimal
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from domain.contracts.funding import FundingRun
from domain.funding import Holding, charge, funding_payment
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


names = st.sampled_from(["BTC", "ETH", "SOL"])
holdings = st.lists(st.builds(Holding, names, amounts, amounts), max_size=3, unique_by=lambda held: held.instrument_id)


@given(amounts, amounts, holdings)
def test_a_charge_takes_no_more_than_there_is_and_the_fund_pays_only_what_is_missing_anywhere(
    owed: Decimal, available: Decimal, held: list[Holding]
) -> None:
    source = charge(owed, available, "BTC", held)
    there_is = {holding.instrument_id: holding for holding in held}
    taken = sum((draw.order_margin + draw.position_margin for draw in source.draws), ZERO)
    assert source.available + taken + source.insurance == owed
    assert ZERO <= source.available <= available
    assert len({draw.instrument_id for draw in source.draws}) == len(source.draws)
    for draw in source.draws:
        assert ZERO <= draw.order_margin <= there_is[draw.instrument_id].order_margin
        assert ZERO <= draw.position_margin <= there_is[draw.instrument_id].position_margin
        assert draw.order_margin or draw.position_margin
    everything = available + sum((holding.order_margin + holding.position_margin for holding in held), ZERO)
    assert source.insurance == max(ZERO, owed - everything)


@given(amounts, amounts, holdings)
def test_a_charge_touches_nothing_before_what_comes_first_is_used_up(
    owed: Decimal, available: Decimal, held: list[Holding]
) -> None:
    source = charge(owed, available, "BTC", held)
    draws = {draw.instrument_id: draw for draw in source.draws}
    nothing = Holding("")
    own = [holding for holding in held if holding.instrument_id == "BTC"]
    others = [holding for holding in held if holding.instrument_id != "BTC"]
    # (what there is, what was taken of it), in the order of the rule.
    steps = [(available, source.available)]
    steps += [(h.position_margin, draws.get("BTC", nothing).position_margin) for h in own]
    steps += [(sum((h.order_margin for h in held), ZERO), sum((draw.order_margin for draw in source.draws), ZERO))]
    steps += [
        (
            sum((h.position_margin for h in others), ZERO),
            sum((draws.get(h.instrument_id, nothing).position_margin for h in others), ZERO),
        )
    ]
    for (there_is, taken), (_, later) in pairwise(steps):
        assert not later or taken == there_is


@given(amounts, amounts, holdings)
def test_a_charge_does_not_depend_on_the_order_in_which_holdings_are_read(
    owed: Decimal, available: Decimal, held: list[Holding]
) -> None:
    assert charge(owed, available, "BTC", held) == charge(owed, available, "BTC", held[::-1])


def test_a_run_is_named_by_instrument_and_utc_time() -> None:
    assert FundingRun("BTC-USDT-PERP", "2026-01-01T10:00:00+02:00").reference == "BTC-USDT-PERP:20260101T080000.000000Z"

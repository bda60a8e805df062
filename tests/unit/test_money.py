"""Amounts: what rounds which way, how they are written, fees."""

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from domain.instruments import SHIPPED, Instrument
from domain.matching import Trade
from domain.money import AMOUNT_STEP, plain, round_down, round_up
from domain.problems import Problem
from engine.matcher import FEE_UNITS, Matcher
from tests.engine_commands import new

AMOUNTS = st.decimals(min_value=-(10**15), max_value=10**15, places=12)
INSTRUMENTS = st.sampled_from(SHIPPED)


@given(AMOUNTS)
def test_rounding_moves_an_amount_by_less_than_one_step(amount: Decimal) -> None:
    assert 0 <= round_up(amount) - amount < AMOUNT_STEP
    assert 0 <= amount - round_down(amount) < AMOUNT_STEP


@given(AMOUNTS)
def test_what_is_paid_and_what_is_got_mirror_each_other(amount: Decimal) -> None:
    assert round_up(amount) == -round_down(-amount)


@given(st.decimals(min_value=-(10**15), max_value=10**15, places=8))
def test_a_ledger_amount_does_not_change_by_rounding(amount: Decimal) -> None:
    assert round_up(amount) == round_down(amount) == amount


@given(AMOUNTS)
def test_plain_is_the_same_number_without_exponent_or_needless_zeros(amount: Decimal) -> None:
    text = plain(amount)
    assert Decimal(text) == amount
    assert "e" not in text.lower()
    assert text == "0" or not (("." in text and text.endswith("0")) or text.endswith(".") or text == "-0")


@pytest.mark.parametrize(
    ("value", "text"),
    [("1E+3", "1000"), ("-0.000", "0"), ("0E-8", "0"), ("10", "10"), ("1.50", "1.5"), ("-1E-8", "-0.00000001")],
)
def test_plain_of_awkward_numbers(value: str, text: str) -> None:
    assert plain(Decimal(value)) == text


@given(INSTRUMENTS, st.integers(1, 10**7), st.integers(1, 10**7))
def test_steps_of_price_and_quantity_are_exact_both_ways(instrument: Instrument, ticks: int, lots: int) -> None:
    assert instrument.price_to_ticks(instrument.ticks_to_price(ticks)) == ticks
    assert instrument.quantity_to_lots(instrument.lots_to_quantity(lots)) == lots


@given(INSTRUMENTS, st.integers(1, 10**7))
def test_a_fraction_of_a_step_is_refused(instrument: Instrument, steps: int) -> None:
    with pytest.raises(Problem, match="PRICE_NOT_ON_TICK"):
        instrument.price_to_ticks(instrument.ticks_to_price(steps) + instrument.tick_size / 10)
    with pytest.raises(Problem, match="QUANTITY_NOT_ON_LOT"):
        instrument.quantity_to_lots(instrument.lots_to_quantity(steps) + instrument.lot_size / 10)


@given(INSTRUMENTS, st.integers(1, 10**7), st.integers(1, 10**6))
def test_the_engine_charges_the_fee_that_the_instrument_states(instrument: Instrument, ticks: int, lots: int) -> None:
    matcher = Matcher(instrument)
    matcher.apply(new(1, "SELL", ticks, lots))
    trade = matcher.apply(new(2, "BUY", ticks, lots))[0]
    assert isinstance(trade, Trade)
    assert Decimal(trade.maker_fee) / FEE_UNITS == instrument.fee(ticks, lots, instrument.maker_fee_rate)
    assert Decimal(trade.taker_fee) / FEE_UNITS == instrument.fee(ticks, lots, instrument.taker_fee_rate)


@given(INSTRUMENTS, st.integers(1, 10**6), st.integers(1, 10**4), st.integers(1, 10**4))
def test_splitting_a_fill_never_saves_fees(instrument: Instrument, ticks: int, lots: int, more: int) -> None:
    rate = instrument.taker_fee_rate
    assert instrument.fee(ticks, lots, rate) + instrument.fee(ticks, more, rate) >= instrument.fee(
        ticks, lots + more, rate
    )

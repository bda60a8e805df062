"""What an order must be to be taken in."""

from dataclasses import replace
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from domain.instruments import SHIPPED, Instrument
from domain.order_entry import (
    MARKET_PROTECTION,
    QUANTITY_MAX,
    OpenOrder,
    OrderRequest,
    Reference,
    amendment,
    bound_price,
    new_order,
)
from domain.problems import Problem

BTC, ETH, SOL = SHIPPED
MARK = Reference(Decimal(60_000))
PRICES = st.decimals("1", 100_000, places=8)
REFERENCES = st.builds(Reference, PRICES)


def limit(price: str = "60000", quantity: str = "1", **terms: Any) -> OrderRequest:
    return OrderRequest(
        BTC.instrument_id, terms.pop("side", "BUY"), "LIMIT", Decimal(quantity), Decimal(price), **terms
    )


def market(side: Any, quantity: str = "1", instrument: Instrument = BTC) -> OrderRequest:
    return OrderRequest(instrument.instrument_id, side, "MARKET", Decimal(quantity))


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (limit(quantity="0"), "VALIDATION_FAILED"),
        (limit(quantity="-1"), "VALIDATION_FAILED"),
        (limit(quantity=str(QUANTITY_MAX + 1)), "VALIDATION_FAILED"),
        (limit(quantity="0.0005"), "QUANTITY_NOT_ON_LOT"),
        (limit(quantity="1.0001"), "QUANTITY_NOT_ON_LOT"),
        (limit(price="60000.05"), "PRICE_NOT_ON_TICK"),
        (limit(price="0"), "VALIDATION_FAILED"),
        (limit(price="-60000"), "VALIDATION_FAILED"),
        (replace(limit(), price=None), "VALIDATION_FAILED"),
        (replace(market("BUY"), price=Decimal(60_000)), "VALIDATION_FAILED"),
        (limit(price="63000.1"), "PRICE_OUT_OF_BAND"),
        (limit(price="29999.9"), "PRICE_OUT_OF_BAND"),
        (limit(price="56999.9", side="SELL"), "PRICE_OUT_OF_BAND"),
        (limit(price="90000.1", side="SELL"), "PRICE_OUT_OF_BAND"),
        (limit(price="1e30"), "PRICE_OUT_OF_BAND"),
    ],
)
def test_an_order_that_breaks_a_rule_is_refused_with_its_code(request_: OrderRequest, code: str) -> None:
    with pytest.raises(Problem) as refused:
        bound_price(request_, BTC, MARK)
    assert refused.value.code == code


@pytest.mark.parametrize("state", ["HALTED", "CANCEL_ONLY"])
def test_an_instrument_that_does_not_trade_takes_nothing(state: str) -> None:
    with pytest.raises(Problem, match="INSTRUMENT_NOT_TRADING"):
        bound_price(limit(), replace(BTC, state=state), MARK)


@pytest.mark.parametrize("request_", [limit(price="4000", quantity="0.001"), market("SELL", "0.001")])
def test_a_notional_below_the_minimum_is_refused(request_: OrderRequest) -> None:
    with pytest.raises(Problem, match="MIN_NOTIONAL"):
        bound_price(request_, BTC, Reference(Decimal(4000)))


@pytest.mark.parametrize(
    ("price", "side"),
    [("30000", "BUY"), ("60000", "BUY"), ("63000", "BUY"), ("57000", "SELL"), ("60000", "SELL"), ("90000", "SELL")],
)
def test_a_limit_up_to_the_edge_of_the_band_is_its_own_bound(price: str, side: str) -> None:
    assert bound_price(limit(price=price, side=side), BTC, MARK) == Decimal(price)


@pytest.mark.parametrize(("price", "side"), [("66000.1", "BUY"), ("53999.9", "SELL")])
def test_an_instrument_may_have_another_band(price: str, side: str) -> None:
    wide = replace(BTC, price_band=Decimal("0.1"))
    with pytest.raises(Problem, match="PRICE_OUT_OF_BAND"):
        bound_price(limit(price=price, side=side), wide, MARK)
    assert bound_price(limit(price="66000"), wide, MARK) == 66_000


def test_a_notional_of_exactly_the_minimum_is_enough() -> None:
    assert bound_price(limit(price="5000", quantity="0.001"), BTC, Reference(Decimal(5000))) == 5000


@pytest.mark.parametrize(
    ("side", "reference", "bound"),
    [
        ("BUY", Reference(Decimal("60000.07")), "63000"),
        ("SELL", Reference(Decimal("60000.07")), "57000.1"),
    ],
)
def test_protection_lies_beyond_the_mark_rounded_inwards(side: str, reference: Reference, bound: str) -> None:
    assert bound_price(market(side), BTC, reference) == Decimal(bound)


def test_the_minimum_notional_of_a_market_order_is_measured_at_the_mark() -> None:
    dear = replace(BTC, min_notional=Decimal(60))
    assert bound_price(market("SELL", "0.001"), dear, MARK) == 57_000
    with pytest.raises(Problem, match="MIN_NOTIONAL"):
        bound_price(market("BUY", "0.001"), dear, Reference(Decimal("59999.9")))


@pytest.mark.parametrize(
    ("request_", "reference", "loss", "margin_price"),
    [
        (limit(price="62000"), MARK, "2000", "62000"),
        (limit(price="62000"), Reference(Decimal("60000.07")), "2000", "62000"),
        (limit(price="59000"), MARK, "0", "59000"),
        (limit(price="58000", side="SELL"), MARK, "2000", "60000"),
        (limit(price="58000", side="SELL"), Reference(Decimal("60000.07")), "2000.1", "60000.1"),
        (limit(price="61000", side="SELL"), MARK, "0", "61000"),
        (market("BUY"), MARK, "0", "63000"),
        (market("SELL"), MARK, "0", "60000"),
        (limit(price="62000", reduce_only=True), MARK, "0", "62000"),
    ],
)
def test_open_loss_is_held_at_the_limit_and_a_sale_is_backed_at_the_mark(
    request_: OrderRequest, reference: Reference, loss: str, margin_price: str
) -> None:
    order = new_order(1, request_, BTC, reference)
    assert (order.open_loss, order.margin_price) == (Decimal(loss), Decimal(margin_price))


@given(st.sampled_from(["BUY", "SELL"]), st.sampled_from(SHIPPED), REFERENCES)
def test_protection_is_on_tick_and_never_worse_than_allowed(
    side: str, instrument: Instrument, reference: Reference
) -> None:
    bound = bound_price(market(side, "1000", instrument), instrument, reference)
    instrument.price_to_ticks(bound)
    if side == "BUY":
        assert bound <= reference.mark * (1 + instrument.price_band)
        assert bound <= reference.mark * (1 + MARKET_PROTECTION)
    else:
        assert bound >= reference.mark * (1 - instrument.price_band)
        assert bound >= reference.mark * (1 - MARKET_PROTECTION)


def stop(kind: Any, stop_price: str, price: str | None = None, **terms: Any) -> OrderRequest:
    limit_price = None if price is None else Decimal(price)
    side = terms.pop("side", "BUY")
    return OrderRequest(BTC.instrument_id, side, kind, Decimal(1), limit_price, stop_price=Decimal(stop_price), **terms)


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (limit(stop_price=Decimal(60_000)), "VALIDATION_FAILED"),
        (replace(stop("STOP_MARKET", "61000"), stop_price=None), "VALIDATION_FAILED"),
        (stop("STOP_MARKET", "61000", "61000"), "VALIDATION_FAILED"),
        (stop("STOP_LIMIT", "61000"), "VALIDATION_FAILED"),
        (stop("STOP_MARKET", "61000.05"), "PRICE_NOT_ON_TICK"),
        (stop("TAKE_PROFIT_MARKET", "90000.1"), "PRICE_OUT_OF_BAND"),
        (stop("TAKE_PROFIT_LIMIT", "61000", "90000.1"), "PRICE_OUT_OF_BAND"),
        (limit(post_only=True, time_in_force="IOC"), "VALIDATION_FAILED"),
        (replace(market("BUY"), post_only=True), "VALIDATION_FAILED"),
    ],
)
def test_terms_that_do_not_go_together_are_refused(request_: OrderRequest, code: str) -> None:
    with pytest.raises(Problem, match=code):
        bound_price(request_, BTC, MARK)


@pytest.mark.parametrize(
    ("request_", "bound"),
    [
        (stop("STOP_MARKET", "70000"), "73500"),
        (stop("TAKE_PROFIT_MARKET", "50000", side="SELL"), "47500"),
        (stop("STOP_LIMIT", "61000", "61500"), "61500"),
    ],
)
def test_a_stop_is_bound_by_its_limit_or_beyond_its_stop_price(request_: OrderRequest, bound: str) -> None:
    assert bound_price(request_, BTC, MARK) == Decimal(bound)


def test_what_only_reduces_may_be_smaller_than_the_minimum() -> None:
    small = replace(limit(price="4000", quantity="0.001"), reduce_only=True)
    assert bound_price(small, BTC, Reference(Decimal(4000))) == 4000


@pytest.mark.parametrize(
    ("request_", "loss", "margin_price"),
    [
        (stop("STOP_LIMIT", "61000", "62000"), "1000", "62000"),
        (stop("STOP_LIMIT", "59000", "58000", side="SELL"), "1000", "59000"),
        (stop("STOP_MARKET", "61000"), "0", "64050"),
        (stop("TAKE_PROFIT_MARKET", "61000", side="SELL"), "0", "61000"),
        # Due already: it sells at the mark, so that is where it is backed.
        (stop("TAKE_PROFIT_MARKET", "31000", side="SELL"), "0", "60000"),
        (stop("TAKE_PROFIT_LIMIT", "31000", "30500", side="SELL"), "500", "60000"),
        (stop("TAKE_PROFIT_MARKET", "61000"), "0", "64050"),
        (stop("STOP_MARKET", "59000", side="SELL"), "0", "59000"),
    ],
)
def test_what_waits_is_judged_by_its_stop_price(request_: OrderRequest, loss: str, margin_price: str) -> None:
    order = new_order(1, request_, BTC, MARK)
    assert (order.open_loss, order.margin_price) == (Decimal(loss), Decimal(margin_price))


def resting(request: OrderRequest, filled: str = "0") -> OpenOrder:
    price = request.price or MARK.mark
    return OpenOrder(7, 1, request, price, Decimal(filled), price)


def test_less_of_the_same_may_be_asked_for_wherever_the_mark_has_gone() -> None:
    order = replace(resting(limit(price="60000")), margin_price=Decimal(60_000), open_loss=Decimal(100))
    smaller = amendment(order, None, Decimal("0.4"), BTC, Reference(Decimal(40_000)))
    assert (smaller.open_quantity, smaller.margin_price, smaller.open_loss) == (
        Decimal("0.4"),
        Decimal(60_000),
        Decimal(100),
    )
    assert not any((smaller.claimed_quantity, smaller.claimed_notional, smaller.claimed_loss))
    for price, quantity in ((None, "1.1"), ("59999", "0.4")):
        with pytest.raises(Problem, match="PRICE_OUT_OF_BAND"):
            amendment(
                order, None if price is None else Decimal(price), Decimal(quantity), BTC, Reference(Decimal(40_000))
            )


def test_an_amendment_claims_the_open_loss_beyond_that_of_the_order() -> None:
    order = resting(limit(price="60000"))
    dearer = amendment(order, Decimal(61_000), Decimal(2), BTC, MARK)
    assert (dearer.open_loss, dearer.claimed_loss, dearer.claimed_notional) == (
        Decimal(1_000),
        Decimal(2_000),
        Decimal(62_000),
    )
    lower = amendment(resting(limit(price="60000", side="SELL")), Decimal(59_000), None, BTC, MARK)
    assert (lower.open_loss, lower.margin_price) == (Decimal(1_000), Decimal(60_000))
    assert (lower.claimed_loss, lower.claimed_notional) == (Decimal(1_000), Decimal(0))


@pytest.mark.parametrize(
    ("order", "price", "quantity", "code"),
    [
        (resting(limit()), None, None, "VALIDATION_FAILED"),
        (resting(limit()), "60000.0", "1.000", "VALIDATION_FAILED"),
        (resting(limit()), None, "-1", "VALIDATION_FAILED"),
        (resting(limit()), "0", None, "VALIDATION_FAILED"),
        (resting(limit()), "60000.05", None, "PRICE_NOT_ON_TICK"),
        (resting(limit()), None, "0.0005", "QUANTITY_NOT_ON_LOT"),
        (resting(limit()), "90000.1", None, "PRICE_OUT_OF_BAND"),
        (resting(replace(limit(price="30000"))), None, "0.001", ""),
        (resting(limit(), "0.5"), None, "0.5", "ORDER_NOT_AMENDABLE"),
        (resting(limit(), "0.5"), None, "0.1", "ORDER_NOT_AMENDABLE"),
        (resting(limit(), "0.5"), None, "0.501", ""),
        (resting(market("BUY")), None, "2", "ORDER_NOT_AMENDABLE"),
        (resting(replace(market("BUY"), type="STOP_MARKET", stop_price=MARK.mark)), None, "2", "ORDER_NOT_AMENDABLE"),
    ],
)
def test_an_amendment_obeys_the_rules_of_new_orders(
    order: OpenOrder, price: str | None, quantity: str | None, code: str
) -> None:
    changes = None if price is None else Decimal(price), None if quantity is None else Decimal(quantity)
    if not code:
        assert amendment(order, *changes, BTC, MARK).open_quantity == Decimal(quantity or 0) - order.filled_quantity
        return
    with pytest.raises(Problem) as refused:
        amendment(order, *changes, BTC, MARK)
    assert refused.value.code == code


def test_an_amendment_to_less_than_the_minimum_notional_is_refused_unless_it_only_reduces() -> None:
    dear = replace(BTC, min_notional=Decimal(100))
    with pytest.raises(Problem, match="MIN_NOTIONAL"):
        amendment(resting(limit()), None, Decimal("0.001"), dear, MARK)
    reducing = amendment(resting(limit(reduce_only=True)), None, Decimal("0.001"), dear, MARK)
    assert not any((reducing.claimed_quantity, reducing.claimed_notional, reducing.open_loss))

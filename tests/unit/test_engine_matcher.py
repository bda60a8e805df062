"""The matching rules, one by one."""

import dataclasses
from decimal import Decimal
from typing import Any

import msgspec
import pytest

from domain.instruments import SHIPPED, Instrument
from domain.matching import (
    Amend,
    AmendRejected,
    AnyCommand,
    AnyEvent,
    Cancel,
    CancelAll,
    Cancelled,
    CancelReplace,
    MarkPrice,
    SetState,
    Side,
    StateChanged,
    StopPlaced,
    StpMode,
    Trade,
    TradingState,
    Triggered,
    encode,
)
from engine.matcher import Matcher
from tests.engine_commands import AT, new

BTC = SHIPPED[0]


def run(*commands: AnyCommand) -> tuple[Matcher, list[AnyEvent]]:
    """The matcher after all commands, and the events of the last one."""
    matcher, events = Matcher(BTC), []
    for command in commands:
        events = matcher.apply(command)
    return matcher, events


def brief(events: list[AnyEvent]) -> list[tuple[Any, ...]]:
    """Events as (kind, order, ...): what a rule is about, without what it is not."""
    lines: list[tuple[Any, ...]] = []
    for event in events:
        kind = type(event).__name__
        if isinstance(event, Trade):
            lines.append((kind, event.maker_order_id, event.price, event.quantity))
        else:
            fields = msgspec.structs.asdict(event)
            lines.append(
                (kind, fields["order_id"], *(fields[name] for name in ("quantity", "reason") if name in fields))
            )
    return lines


def depth(matcher: Matcher) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    return matcher.book.depth(matcher.book.bids), matcher.book.depth(matcher.book.asks)


def test_an_order_that_crosses_nothing_rests() -> None:
    matcher, events = run(new(1, "BUY", 100, 5))
    assert brief(events) == [("Placed", 1, 5)]
    assert depth(matcher) == ([(100, 5)], [])


def test_a_trade_is_at_the_price_of_the_maker() -> None:
    _, events = run(new(1, "SELL", 100, 5), new(2, "BUY", 103, 5))
    assert brief(events) == [("Trade", 1, 100, 5), ("Filled", 1), ("Filled", 2)]


def test_the_best_price_trades_first_then_the_first_come() -> None:
    _, events = run(
        new(1, "SELL", 102, 1), new(2, "SELL", 101, 1), new(3, "SELL", 101, 1), new(4, "SELL", 100, 1),
        new(9, "BUY", 102, 4),
    )  # fmt: skip
    assert [event.maker_order_id for event in events if isinstance(event, Trade)] == [4, 2, 3, 1]


def test_bids_trade_highest_first() -> None:
    _, events = run(new(1, "BUY", 99, 1), new(2, "BUY", 101, 1), new(3, "BUY", 100, 1), new(9, "SELL", 99, 3))
    assert [event.maker_order_id for event in events if isinstance(event, Trade)] == [2, 3, 1]


def test_a_partial_fill_keeps_the_place_in_the_queue() -> None:
    _, events = run(
        new(1, "SELL", 100, 3), new(2, "SELL", 100, 3), new(3, "BUY", 100, 1), new(4, "BUY", 100, 3)
    )  # fmt: skip
    assert brief(events) == [("Trade", 1, 100, 2), ("Filled", 1), ("Trade", 2, 100, 1), ("Filled", 4)]


def test_the_rest_of_a_limit_order_rests_after_its_trades() -> None:
    matcher, events = run(new(1, "SELL", 100, 2), new(2, "BUY", 101, 5))
    assert brief(events) == [("Trade", 1, 100, 2), ("Filled", 1), ("Placed", 2, 3)]
    assert depth(matcher) == ([(101, 3)], [])


def test_a_trade_tells_both_sides_what_remains_and_the_terms_of_the_taker() -> None:
    _, events = run(new(1, "SELL", 600_000, 7), new(2, "BUY", 600_010, 3, liquidation=True))
    assert events[0] == Trade(
        at=AT, trade_id=2 * 1024 + 1, price=600_000, quantity=3, taker_side="BUY",
        maker_order_id=1, maker_user_id=1, maker_remaining=4, maker_fee=3_600_000,
        taker_order_id=2, taker_user_id=2, taker_remaining=0, taker_fee=9_000_000,
        taker_price=600_010, taker_liquidation=True,
    )  # fmt: skip


@pytest.mark.parametrize("instrument", SHIPPED, ids=lambda instrument: instrument.instrument_id)
@pytest.mark.parametrize(("price", "quantity"), [(1, 1), (333_333, 7), (999_999_937, 123_457)])
def test_fees_are_those_of_the_instrument_to_the_last_digit(instrument: Instrument, price: int, quantity: int) -> None:
    matcher = Matcher(instrument)
    matcher.apply(new(1, "SELL", price, quantity))
    trade = matcher.apply(new(2, "BUY", price, quantity))[0]
    assert isinstance(trade, Trade)
    assert Decimal(trade.maker_fee).scaleb(-8) == instrument.fee(price, quantity, instrument.maker_fee_rate)
    assert Decimal(trade.taker_fee).scaleb(-8) == instrument.fee(price, quantity, instrument.taker_fee_rate)


@pytest.mark.parametrize(("rate", "fee"), [("0.00000001", 1), ("0.00010001", 10_000), ("-0.00010001", -9_999)])
def test_what_a_user_pays_rounds_up_and_a_rebate_rounds_down(rate: str, fee: int) -> None:
    dear = dataclasses.replace(BTC, tick_size=Decimal("0.9999"), maker_fee_rate=Decimal(rate))
    matcher = Matcher(dear)
    matcher.apply(new(1, "SELL", 1, 1000))
    trade = matcher.apply(new(2, "BUY", 1, 1000))[0]
    assert isinstance(trade, Trade)
    assert trade.maker_fee == fee


@pytest.mark.parametrize("terms", [{"time_in_force": "IOC"}, {"time_in_force": "FOK"}])
def test_an_immediate_order_that_is_filled_is_filled(terms: dict[str, Any]) -> None:
    _, events = run(new(1, "SELL", 100, 5), new(2, "BUY", 100, 5, **terms))
    assert brief(events) == [("Trade", 1, 100, 5), ("Filled", 1), ("Filled", 2)]


def test_the_rest_of_an_ioc_order_expires() -> None:
    matcher, events = run(new(1, "SELL", 100, 2), new(2, "BUY", 100, 5, time_in_force="IOC"))
    assert brief(events) == [("Trade", 1, 100, 2), ("Filled", 1), ("Expired", 2, 3, "IOC")]
    assert depth(matcher) == ([], [])


def test_a_fok_order_that_cannot_be_filled_touches_nothing() -> None:
    matcher, events = run(new(1, "SELL", 100, 4), new(2, "SELL", 102, 4), new(3, "BUY", 101, 5, time_in_force="FOK"))
    assert brief(events) == [("Expired", 3, 5, "FOK_NOT_FILLABLE")]
    assert depth(matcher) == ([], [(100, 4), (102, 4)])


def test_a_fok_order_fills_across_levels() -> None:
    _, events = run(new(1, "BUY", 101, 4), new(2, "BUY", 100, 4), new(3, "SELL", 100, 5, time_in_force="FOK"))
    assert brief(events) == [("Trade", 1, 101, 4), ("Filled", 1), ("Trade", 2, 100, 1), ("Filled", 3)]


@pytest.mark.parametrize(
    ("stp_mode", "fills"), [("EXPIRE_TAKER", False), ("EXPIRE_BOTH", False), ("EXPIRE_MAKER", True)]
)
def test_a_fok_order_does_not_count_what_self_trade_prevention_keeps_from_it(stp_mode: StpMode, fills: bool) -> None:
    book = [new(1, "SELL", 100, 2), new(2, "SELL", 100, 2, user_id=7), new(3, "SELL", 100, 3)]
    matcher, events = run(*book, new(4, "BUY", 100, 5, user_id=7, time_in_force="FOK", stp_mode=stp_mode))
    if fills:
        assert brief(events)[-1] == ("Filled", 4)
    else:
        assert brief(events) == [("Expired", 4, 5, "FOK_NOT_FILLABLE")]
        assert depth(matcher) == ([], [(100, 7)])


def test_a_fok_order_filled_before_its_own_order_is_filled() -> None:
    _, events = run(
        new(1, "SELL", 100, 5), new(2, "SELL", 100, 2, user_id=7), new(3, "BUY", 100, 5, user_id=7, time_in_force="FOK")
    )
    assert brief(events) == [("Trade", 1, 100, 5), ("Filled", 1), ("Filled", 3)]


def test_a_market_order_takes_what_there_is_and_the_rest_expires() -> None:
    _, events = run(new(1, "SELL", 100, 2), new(2, "BUY", 150, 5, type="MARKET", time_in_force="IOC"))
    assert brief(events) == [("Trade", 1, 100, 2), ("Filled", 1), ("Expired", 2, 3, "NO_LIQUIDITY")]


def test_a_market_order_stops_at_its_protection_price() -> None:
    matcher, events = run(
        new(1, "SELL", 100, 2), new(2, "SELL", 151, 2), new(3, "BUY", 150, 5, type="MARKET", time_in_force="IOC")
    )
    assert brief(events) == [("Trade", 1, 100, 2), ("Filled", 1), ("Expired", 3, 3, "PROTECTION_PRICE")]
    assert depth(matcher) == ([], [(151, 2)])


def test_a_market_order_never_rests_whatever_its_time_in_force() -> None:
    matcher, events = run(new(1, "SELL", 100, 5, type="MARKET", time_in_force="GTC"))
    assert brief(events) == [("Expired", 1, 5, "NO_LIQUIDITY")]
    assert depth(matcher) == ([], [])


def self_trade(stp_mode: StpMode) -> tuple[Matcher, list[AnyEvent]]:
    """User 7 buys 6: the book sells 1 of another, 2 of user 7, 4 of a third."""
    return run(
        new(1, "SELL", 100, 1), new(2, "SELL", 101, 2, user_id=7), new(3, "SELL", 102, 4),
        new(4, "BUY", 102, 6, user_id=7, stp_mode=stp_mode),
    )  # fmt: skip


def test_expire_taker_ends_the_taker_at_its_own_order() -> None:
    matcher, events = self_trade("EXPIRE_TAKER")
    assert brief(events) == [("Trade", 1, 100, 1), ("Filled", 1), ("Expired", 4, 5, "SELF_TRADE")]
    assert depth(matcher) == ([], [(101, 2), (102, 4)])


def test_expire_maker_ends_the_resting_order_and_goes_on() -> None:
    matcher, events = self_trade("EXPIRE_MAKER")
    assert brief(events) == [
        ("Trade", 1, 100, 1), ("Filled", 1), ("Expired", 2, 2, "SELF_TRADE"),
        ("Trade", 3, 102, 4), ("Filled", 3), ("Placed", 4, 1),
    ]  # fmt: skip
    assert depth(matcher) == ([(102, 1)], [])


def test_expire_both_ends_the_resting_order_then_the_taker() -> None:
    matcher, events = self_trade("EXPIRE_BOTH")
    assert brief(events) == [
        ("Trade", 1, 100, 1), ("Filled", 1), ("Expired", 2, 2, "SELF_TRADE"), ("Expired", 4, 5, "SELF_TRADE")
    ]  # fmt: skip
    assert depth(matcher) == ([], [(102, 4)])


def test_own_orders_that_do_not_cross_are_left_alone() -> None:
    matcher, events = run(new(1, "SELL", 101, 2, user_id=7), new(2, "BUY", 100, 1, user_id=7))
    assert brief(events) == [("Placed", 2, 1)]
    assert depth(matcher) == ([(100, 1)], [(101, 2)])


@pytest.mark.parametrize("gone", [1, 2, 3])
def test_a_cancel_takes_one_order_out_wherever_it_stands(gone: int) -> None:
    book = [new(order_id, "SELL", 100, order_id) for order_id in (1, 2, 3)]
    matcher, events = run(*book, Cancel(at=AT, order_id=gone, user_id=gone))
    assert brief(events) == [("Cancelled", gone, gone, "USER_REQUEST")]
    rest = [order_id for order_id in (1, 2, 3) if order_id != gone]
    assert [order.new.order_id for order in matcher.book.resting(matcher.book.asks)] == rest
    assert depth(matcher) == ([], [(100, 6 - gone)])
    fills = matcher.apply(new(9, "BUY", 100, 6))
    assert [event.maker_order_id for event in fills if isinstance(event, Trade)] == rest


def test_a_cancel_gives_back_what_remains() -> None:
    _, events = run(new(1, "SELL", 100, 5), new(2, "BUY", 100, 2), Cancel(at=AT, order_id=1, user_id=1))
    assert brief(events) == [("Cancelled", 1, 3, "USER_REQUEST")]


@pytest.mark.parametrize(
    ("order_id", "user_id"), [(2, 1), (1, 2), (2, 2)], ids=["unknown order", "order of another user", "neither"]
)
def test_a_cancel_of_no_order_of_the_user_does_nothing(order_id: int, user_id: int) -> None:
    matcher, events = run(new(1, "SELL", 100, 5), Cancel(at=AT, order_id=order_id, user_id=user_id))
    assert events == []
    assert depth(matcher) == ([], [(100, 5)])


def test_an_ended_order_cannot_be_cancelled() -> None:
    _, events = run(new(1, "SELL", 100, 5), new(2, "BUY", 100, 5), Cancel(at=AT, order_id=1, user_id=1))
    assert events == []


def test_cancel_all_takes_every_order_of_one_user_in_order_of_entry() -> None:
    matcher, events = run(
        new(3, "SELL", 105, 1, user_id=7), new(1, "BUY", 90, 2, user_id=7), new(2, "SELL", 101, 3, user_id=8),
        new(4, "SELL", 100, 4, user_id=7), CancelAll(at=AT, user_id=7, reason="LIQUIDATION"),
    )  # fmt: skip
    assert brief(events) == [("Cancelled", n, q, "LIQUIDATION") for n, q in ((3, 1), (1, 2), (4, 4))]
    assert depth(matcher) == ([], [(101, 3)])
    assert matcher.apply(CancelAll(at=AT, user_id=7)) == []


def test_the_same_command_twice_leaves_the_order_that_rests_alone() -> None:
    matcher, events = run(new(1, "SELL", 100, 5), new(1, "SELL", 100, 5))
    assert events == []
    assert depth(matcher) == ([], [(100, 5)])


@pytest.mark.parametrize(("price", "quantity"), [(0, 1), (-1, 1), (1, 0), (1, -1)])
def test_an_order_without_price_or_quantity_is_rejected(price: int, quantity: int) -> None:
    matcher, events = run(new(1, "SELL", price, quantity))
    assert brief(events) == [("Rejected", 1, quantity, "INVALID_ORDER")]
    assert depth(matcher) == ([], [])


def test_trade_ids_are_the_seq_of_their_event_and_differ_between_instruments() -> None:
    ids = set()
    for instrument in SHIPPED:
        matcher = Matcher(instrument)
        matcher.apply(new(1, "SELL", 100, 5))
        for order_id in (2, 3):
            first_seq = matcher.event_seq + 1
            trade = matcher.apply(new(order_id, "BUY", 100, 1))[0]
            assert isinstance(trade, Trade)
            assert trade.trade_id == first_seq * 1024 + instrument.number
            ids.add(trade.trade_id)
    assert len(ids) == 2 * len(SHIPPED)


def test_events_carry_the_time_of_their_command() -> None:
    _, events = run(new(1, "SELL", 100, 2), new(2, "BUY", 100, 3, at=AT + 5))
    assert {event.at for event in events} == {AT + 5}


def long_position(user_id: int, lots: int, price: int = 100) -> list[AnyCommand]:
    """User `user_id` buys `lots` from user 900: orders 901 and 902."""
    return [new(901, "SELL", price, lots, user_id=900), new(902, "BUY", price, lots, user_id=user_id)]


def test_a_post_only_order_that_would_take_is_rejected_and_touches_nothing() -> None:
    matcher, events = run(new(1, "SELL", 100, 5), new(2, "BUY", 100, 5, post_only=True))
    assert brief(events) == [("Rejected", 2, 5, "POST_ONLY_WOULD_CROSS")]
    assert depth(matcher) == ([], [(100, 5)])


def test_a_post_only_order_that_takes_nothing_rests() -> None:
    _, events = run(new(1, "SELL", 100, 5), new(2, "BUY", 99, 5, post_only=True))
    assert brief(events) == [("Placed", 2, 5)]


@pytest.mark.parametrize("terms", [{"type": "MARKET"}, {"time_in_force": "IOC"}, {"time_in_force": "FOK"}])
def test_a_post_only_order_that_can_only_take_is_rejected(terms: dict[str, Any]) -> None:
    _, events = run(new(1, "BUY", 99, 5, post_only=True, **terms))
    assert brief(events) == [("Rejected", 1, 5, "INVALID_ORDER")]


def test_an_amendment_that_only_lowers_the_quantity_keeps_the_place_in_the_queue() -> None:
    matcher, events = run(
        new(1, "SELL", 100, 5), new(2, "SELL", 100, 5), Amend(at=AT, order_id=1, user_id=1, quantity=2)
    )
    assert brief(events) == [("Amended", 1, 2, "USER_REQUEST")]
    assert [order.new.order_id for order in matcher.book.resting(matcher.book.asks)] == [1, 2]
    assert depth(matcher) == ([], [(100, 7)])


@pytest.mark.parametrize("change", [{"quantity": 6}, {"price": 101}, {"price": 101, "quantity": 1}])
def test_any_other_amendment_goes_to_the_end_of_its_queue(change: dict[str, int]) -> None:
    book = [new(1, "SELL", 100, 5), new(2, "SELL", 100, 5), new(3, "SELL", 101, 5)]
    matcher, events = run(*book, Amend(at=AT, order_id=1, user_id=1, **change))
    quantity, price = change.get("quantity", 5), change.get("price", 100)
    assert brief(events) == [("Amended", 1, quantity, "USER_REQUEST"), ("Placed", 1, quantity)]
    at_price = [order.new.order_id for order in matcher.book.resting(matcher.book.asks) if order.price == price]
    assert at_price[-1] == 1


def test_an_amended_order_that_crosses_trades() -> None:
    _, events = run(new(1, "SELL", 100, 2), new(2, "BUY", 99, 5), Amend(at=AT, order_id=2, user_id=2, price=100))
    assert brief(events) == [("Amended", 2, 5, "USER_REQUEST"), ("Trade", 1, 100, 2), ("Filled", 1), ("Placed", 2, 3)]


def test_a_post_only_order_cannot_be_amended_into_a_taker() -> None:
    book = [new(1, "SELL", 100, 2), new(2, "BUY", 99, 5, post_only=True)]
    matcher, events = run(*book, Amend(at=AT, order_id=2, user_id=2, price=100))
    assert brief(events) == [("AmendRejected", 2, "POST_ONLY_WOULD_CROSS")]
    assert depth(matcher) == ([(99, 5)], [(100, 2)])


@pytest.mark.parametrize(("order_id", "user_id"), [(2, 1), (1, 2)], ids=["unknown order", "order of another user"])
def test_an_amendment_of_no_order_of_the_user_is_rejected(order_id: int, user_id: int) -> None:
    amend = Amend(at=AT, order_id=order_id, user_id=user_id, quantity=1, amendment_id=9)
    matcher, events = run(new(1, "SELL", 100, 5), amend)
    assert events == [
        AmendRejected(at=AT, order_id=order_id, user_id=user_id, reason="ORDER_NOT_FOUND", amendment_id=9)
    ]
    assert depth(matcher) == ([], [(100, 5)])


def test_the_quantity_of_an_amendment_is_that_of_the_whole_order() -> None:
    book = [new(1, "SELL", 100, 5), new(2, "BUY", 100, 3)]
    matcher, events = run(*book, Amend(at=AT, order_id=1, user_id=1, quantity=8))
    assert brief(events) == [("Amended", 1, 5, "USER_REQUEST"), ("Placed", 1, 5)]
    again = matcher.apply(Amend(at=AT, order_id=1, user_id=1, quantity=4))
    assert brief(again) == [("Amended", 1, 1, "USER_REQUEST")]
    assert depth(matcher) == ([], [(100, 1)])


@pytest.mark.parametrize("quantity", [1, 3])
def test_an_amendment_to_no_more_than_was_filled_is_rejected(quantity: int) -> None:
    book = [new(1, "SELL", 100, 5), new(2, "BUY", 100, 3)]
    matcher, events = run(*book, Amend(at=AT, order_id=1, user_id=1, quantity=quantity))
    assert brief(events) == [("AmendRejected", 1, "QUANTITY_ALREADY_FILLED")]
    assert depth(matcher) == ([], [(100, 2)])


def test_a_fill_of_an_order_is_not_forgotten_when_its_price_is_amended_or_it_is_shrunk() -> None:
    matcher, _ = run(*long_position(7, 12), new(1, "SELL", 110, 6, user_id=7, reduce_only=True), new(2, "BUY", 110, 2))
    matcher.apply(Amend(at=AT, order_id=1, user_id=7, price=111))
    # The position is 3 then, so one lot of the four goes.
    shrunk = [*matcher.apply(new(3, "BUY", 99, 7)), *matcher.apply(new(4, "SELL", 99, 7, user_id=7))]
    assert ("Amended", 1, 3, "REDUCE_ONLY") in brief(shrunk)
    assert brief(matcher.apply(Amend(at=AT, order_id=1, user_id=7, quantity=2)))[0][0] == "AmendRejected"
    assert brief(matcher.apply(Amend(at=AT, order_id=1, user_id=7, quantity=3))) == [("Amended", 1, 1, "USER_REQUEST")]


def test_cancel_replace_enters_the_new_order_in_place_of_the_old() -> None:
    matcher, events = run(
        new(1, "SELL", 100, 5, user_id=7),
        CancelReplace(at=AT, cancel_order_id=1, order=new(2, "SELL", 99, 4, user_id=7)),
    )
    assert brief(events) == [("Cancelled", 1, 5, "REPLACED"), ("Placed", 2, 4)]
    assert depth(matcher) == ([], [(99, 4)])


def test_cancel_replace_of_an_order_that_is_gone_does_not_enter_the_new_one() -> None:
    matcher, events = run(CancelReplace(at=AT, cancel_order_id=1, order=new(2, "SELL", 99, 4)))
    assert brief(events) == [("Rejected", 2, 4, "REPLACED_ORDER_NOT_FOUND")]
    assert depth(matcher) == ([], [])


@pytest.mark.parametrize("state", ["CANCEL_ONLY", "HALTED"])
def test_orders_only_leave_while_trading_is_closed(state: TradingState) -> None:
    matcher, events = run(new(1, "SELL", 100, 5), SetState(at=AT, state=state))
    assert events == [StateChanged(at=AT, state=state)]
    assert brief(matcher.apply(new(2, "BUY", 100, 5))) == [("Rejected", 2, 5, "INSTRUMENT_NOT_TRADING")]
    amended = matcher.apply(Amend(at=AT, order_id=1, user_id=1, quantity=1))
    assert brief(amended) == [("AmendRejected", 1, "INSTRUMENT_NOT_TRADING")]
    replaced = matcher.apply(CancelReplace(at=AT, cancel_order_id=1, order=new(3, "SELL", 99, 4, user_id=1)))
    assert brief(replaced) == [("Rejected", 3, 4, "INSTRUMENT_NOT_TRADING")]
    cancelled = matcher.apply(Cancel(at=AT, order_id=1, user_id=1))
    assert brief(cancelled) == [("Cancelled", 1, 5, "USER_REQUEST")]


@pytest.mark.parametrize(
    ("kind", "side", "short_of", "reached"),
    [
        ("STOP_LIMIT", "BUY", 104, 105), ("STOP_LIMIT", "SELL", 106, 105),
        ("TAKE_PROFIT_LIMIT", "BUY", 106, 105), ("TAKE_PROFIT_LIMIT", "SELL", 104, 105),
    ],
)  # fmt: skip
def test_a_stop_waits_for_its_price_from_its_side(kind: str, side: Side, short_of: int, reached: int) -> None:
    matcher, events = run(new(1, side, 100, 5, type=kind, stop_price=105))
    assert [type(event) for event in events] == [StopPlaced]
    assert matcher.apply(MarkPrice(at=AT, price=short_of)) == []
    assert depth(matcher) == ([], [])
    assert brief(matcher.apply(MarkPrice(at=AT, price=reached))) == [("Triggered", 1, 5), ("Placed", 1, 5)]


def test_a_stop_whose_price_is_there_already_is_triggered_at_once() -> None:
    _, events = run(MarkPrice(at=AT, price=105), new(1, "BUY", 100, 5, type="STOP_LIMIT", stop_price=105))
    assert brief(events) == [("Triggered", 1, 5), ("Placed", 1, 5)]


def test_a_triggered_stop_market_order_takes_what_there_is() -> None:
    stop = new(2, "SELL", 90, 5, type="STOP_MARKET", time_in_force="IOC", stop_price=95)
    _, events = run(new(1, "BUY", 93, 3), stop, MarkPrice(at=AT, price=94))
    assert brief(events) == [
        ("Triggered", 2, 5), ("Trade", 1, 93, 3), ("Filled", 1), ("Expired", 2, 2, "NO_LIQUIDITY")
    ]  # fmt: skip


def test_stops_on_the_last_price_set_each_other_off_in_order() -> None:
    stops = [
        new(10 + n, "SELL", 100 - n, 1, type="STOP_LIMIT", stop_price=101 - n, working_type="LAST") for n in (1, 2, 3)
    ]
    bids = [new(n, "BUY", 100 - n, 1) for n in (1, 2, 3)]
    _, events = run(*stops, *bids, new(20, "BUY", 100, 1), new(21, "SELL", 100, 1))
    triggered = [event.order_id for event in events if isinstance(event, Triggered)]
    traded = [event.price for event in events if isinstance(event, Trade)]
    assert (triggered, traded) == ([11, 12, 13], [100, 99, 98, 97])


def test_a_long_cascade_of_stops_does_not_recurse() -> None:
    matcher = Matcher(BTC)
    for n in range(1, 5_001):
        matcher.apply(new(n, "BUY", 10_000 - n, 1))
        matcher.apply(new(10_000 + n, "SELL", 1, 1, type="STOP_LIMIT", stop_price=10_000 - n, working_type="LAST"))
    events = matcher.apply(new(20_000, "SELL", 1, 1))
    assert sum(isinstance(event, Triggered) for event in events) == 5_000
    assert matcher.book.bids.best is None


def test_stops_wait_while_trading_is_closed_and_are_triggered_when_it_opens() -> None:
    matcher, events = run(
        new(1, "BUY", 100, 5, type="STOP_LIMIT", stop_price=105),
        SetState(at=AT, state="HALTED"),
        MarkPrice(at=AT, price=105),
    )
    assert events == []
    opened = matcher.apply(SetState(at=AT, state="TRADING"))
    assert brief(opened[1:]) == [("Triggered", 1, 5), ("Placed", 1, 5)]


def test_a_waiting_stop_can_be_cancelled_and_amended() -> None:
    matcher, _ = run(new(1, "BUY", 100, 5, type="STOP_LIMIT", stop_price=105))
    assert brief(matcher.apply(Amend(at=AT, order_id=1, user_id=1, price=99, quantity=9))) == [
        ("Amended", 1, 9, "USER_REQUEST")
    ]
    assert depth(matcher) == ([], [])
    assert brief(matcher.apply(CancelAll(at=AT, user_id=1))) == [("Cancelled", 1, 9, "USER_REQUEST")]
    assert matcher.apply(MarkPrice(at=AT, price=105)) == []


def test_a_reduce_only_order_without_a_position_to_reduce_is_rejected() -> None:
    _, events = run(*long_position(7, 5), new(1, "BUY", 90, 5, user_id=7, reduce_only=True))
    assert brief(events) == [("Rejected", 1, 5, "REDUCE_ONLY_REJECTED")]


def test_a_reduce_only_order_is_cut_to_the_position_at_entry() -> None:
    _, events = run(*long_position(7, 5), new(1, "SELL", 110, 9, user_id=7, reduce_only=True))
    assert brief(events) == [("Amended", 1, 5, "REDUCE_ONLY"), ("Placed", 1, 5)]


def test_a_reduce_only_market_order_closes_the_position_and_never_flips_it() -> None:
    matcher, events = run(
        *long_position(7, 5), new(1, "BUY", 99, 50), new(2, "SELL", 1, 9, type="MARKET", user_id=7, reduce_only=True)
    )
    assert brief(events) == [("Amended", 2, 5, "REDUCE_ONLY"), ("Trade", 1, 99, 5), ("Filled", 2)]
    assert matcher.book.accounts[7].position == 0


def test_the_newest_reduce_only_orders_give_way_when_the_position_shrinks() -> None:
    orders = [new(n, "SELL", 110, 4, user_id=7, reduce_only=True) for n in (1, 2, 3)]
    matcher, events = run(
        *long_position(7, 12), *orders, new(4, "BUY", 99, 6), new(5, "SELL", 99, 6, user_id=7)
    )  # fmt: skip
    assert brief(events) == [
        ("Trade", 4, 99, 6), ("Filled", 4), ("Expired", 3, 4, "REDUCE_ONLY"),
        ("Amended", 2, 2, "REDUCE_ONLY"), ("Filled", 5),
    ]  # fmt: skip
    assert depth(matcher) == ([], [(110, 6)])


def test_a_position_that_flips_ends_every_reduce_only_order() -> None:
    _, events = run(
        *long_position(7, 5), new(1, "SELL", 110, 5, user_id=7, reduce_only=True),
        new(2, "BUY", 99, 20), new(3, "SELL", 99, 20, user_id=7),
    )  # fmt: skip
    assert ("Expired", 1, 5, "REDUCE_ONLY") in brief(events)


def test_a_fok_order_does_not_count_reduce_only_orders_that_its_own_trades_would_end() -> None:
    book = [new(1, "SELL", 101, 5, user_id=7), new(2, "SELL", 102, 5, user_id=7, reduce_only=True)]
    _, events = run(*long_position(7, 5), *book, new(3, "BUY", 102, 10, time_in_force="FOK"))
    assert brief(events) == [("Expired", 3, 10, "FOK_NOT_FILLABLE")]


def test_trades_and_ends_tell_which_orders_only_reduce() -> None:
    matcher, _ = run(*long_position(7, 5), new(1, "SELL", 110, 5, user_id=7, reduce_only=True))
    trade = matcher.apply(new(2, "BUY", 110, 1))[0]
    assert isinstance(trade, Trade)
    assert (trade.maker_reduce_only, trade.taker_reduce_only) == (True, False)
    cancelled = matcher.apply(Cancel(at=AT, order_id=1, user_id=7))[0]
    assert isinstance(cancelled, Cancelled)
    assert cancelled.reduce_only


def test_the_bytes_of_orders_and_events_without_the_newer_terms_are_those_of_old_logs() -> None:
    assert encode(new(1, "BUY", 100, 5)) == (
        b'{"kind":"NEW","at":1700000000000,"order_id":1,"user_id":1,"side":"BUY","type":"LIMIT",'
        b'"time_in_force":"GTC","price":100,"quantity":5}'
    )
    matcher, placed = run(new(1, "BUY", 100, 5))
    trade, _ = matcher.apply(new(2, "SELL", 100, 1))
    cancelled = matcher.apply(Cancel(at=AT, order_id=1, user_id=1))
    assert [encode(event) for event in (*placed, trade, *cancelled)] == [
        b'{"kind":"PLACED","at":1700000000000,"order_id":1,"user_id":1,"side":"BUY","price":100,"quantity":5}',
        b'{"kind":"TRADE","at":1700000000000,"trade_id":2049,"price":100,"quantity":1,"taker_side":"SELL",'
        b'"maker_order_id":1,"maker_user_id":1,"maker_remaining":4,"maker_fee":200,"taker_order_id":2,'
        b'"taker_user_id":2,"taker_remaining":0,"taker_fee":500,"taker_price":100,"taker_liquidation":false}',
        b'{"kind":"CANCELLED","at":1700000000000,"order_id":1,"user_id":1,"side":"BUY","price":100,"quantity":4,'
        b'"reason":"USER_REQUEST"}',
    ]
    amend = Amend(at=AT, order_id=3, user_id=3, price=99)
    assert encode(amend) == b'{"kind":"AMEND","at":1700000000000,"order_id":3,"user_id":3,"price":99}'
    assert [encode(event) for event in matcher.apply(amend)] == [
        b'{"kind":"AMEND_REJECTED","at":1700000000000,"order_id":3,"user_id":3,"reason":"ORDER_NOT_FOUND"}'
    ]

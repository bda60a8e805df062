"""The matching rules, one by one."""

import dataclasses
from decimal import Decimal
from typing import Any

import msgspec
import pytest

from domain.instruments import SHIPPED, Instrument
from domain.matching import AnyCommand, AnyEvent, Cancel, CancelAll, StpMode, Trade
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

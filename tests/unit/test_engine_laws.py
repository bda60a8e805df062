"""Laws that hold after every command of any log, and agreement with the reference book."""

import random
from collections import defaultdict
from typing import TypeGuard

import msgspec
import pytest
from hypothesis import settings

from domain.instruments import SHIPPED
from domain.matching import (
    Amend,
    Amended,
    AmendRejected,
    AnyCommand,
    AnyEvent,
    Cancel,
    Cancelled,
    CancelReplace,
    Expired,
    Filled,
    New,
    Placed,
    Rejected,
    Side,
    Trade,
    encode,
)
from engine.book import EMPTY_LEVELS_MIN
from engine.matcher import Matcher
from tests.engine_agreement import Agreement, assert_same_book, assert_sound
from tests.engine_commands import AT, any_commands, random_commands
from tests.reference_book import ReferenceMatcher

TestAgreement = Agreement.TestCase
TestAgreement.settings = settings(max_examples=400, stateful_step_count=60, deadline=None)


@pytest.mark.parametrize("seed", range(50))
def test_the_engine_and_the_reference_book_agree_on_every_kind_of_command(seed: int) -> None:
    matcher, reference = Matcher(SHIPPED[0]), ReferenceMatcher(SHIPPED[0])
    for command in any_commands(400, seed):
        assert matcher.apply(command) == reference.apply(command)
        assert_same_book(matcher, reference)
        assert_sound(matcher)


def test_logs_of_every_kind_of_command_have_every_kind_of_event() -> None:
    found: set[tuple[str, str]] = set()
    for seed in range(10):
        matcher = Matcher(SHIPPED[0])
        for command in any_commands(400, seed):
            found.update((type(event).__name__, getattr(event, "reason", "")) for event in matcher.apply(command))
    assert found >= {
        ("Amended", "USER_REQUEST"),
        ("Amended", "REDUCE_ONLY"),
        ("AmendRejected", "INVALID_ORDER"),
        ("AmendRejected", "INSTRUMENT_NOT_TRADING"),
        ("AmendRejected", "ORDER_NOT_FOUND"),
        ("AmendRejected", "QUANTITY_ALREADY_FILLED"),
        ("Cancelled", "REPLACED"),
        ("Expired", "POST_ONLY_WOULD_CROSS"),
        ("Expired", "REDUCE_ONLY"),
        ("Rejected", "INSTRUMENT_NOT_TRADING"),
        ("Rejected", "INVALID_ORDER"),
        ("Rejected", "POST_ONLY_WOULD_CROSS"),
        ("Rejected", "REDUCE_ONLY_REJECTED"),
        ("Rejected", "REPLACED_ORDER_NOT_FOUND"),
        ("StateChanged", ""),
        ("StopPlaced", ""),
        ("Triggered", ""),
    }


def test_the_engine_and_the_reference_book_agree_over_a_long_log() -> None:
    matcher, reference = Matcher(SHIPPED[2]), ReferenceMatcher(SHIPPED[2])
    kinds: set[tuple[str, str]] = set()
    for command in random_commands(5_000, seed=7):
        events = matcher.apply(command)
        assert events == reference.apply(command)
        kinds.update((type(event).__name__, getattr(event, "reason", "")) for event in events)
    assert_same_book(matcher, reference)
    # The log is worth something only if it has everything in it.
    assert kinds >= {
        ("Placed", ""),
        ("Trade", ""),
        ("Filled", ""),
        ("Cancelled", "USER_REQUEST"),
        ("Expired", "IOC"),
        ("Expired", "FOK_NOT_FILLABLE"),
        ("Expired", "SELF_TRADE"),
        ("Expired", "PROTECTION_PRICE"),
        ("Expired", "NO_LIQUIDITY"),
    }


@pytest.mark.parametrize("log", [random_commands(5_000, seed=11), any_commands(5_000, seed=11)], ids=["plain", "any"])
def test_every_lot_submitted_is_filled_open_or_ended(log: list[AnyCommand]) -> None:
    matcher = Matcher(SHIPPED[0])
    submitted: dict[int, int] = defaultdict(int)
    left: dict[int, int] = defaultdict(int)
    for command in log:
        new = command if isinstance(command, New) else command.order if isinstance(command, CancelReplace) else None
        is_there = new is not None and (new.order_id in matcher.book.orders or new.order_id in matcher.stops.orders)
        if new is not None and not is_there:
            submitted[new.order_id] += new.quantity
        for event in matcher.apply(command):
            if isinstance(event, Trade):
                left[event.maker_order_id] += event.quantity
                left[event.taker_order_id] += event.quantity
            elif isinstance(event, Cancelled | Expired | Rejected):
                left[event.order_id] += event.quantity
            elif isinstance(event, Amended):
                submitted[event.order_id] += event.quantity - event.old_quantity
    for order in (*matcher.book.orders.values(), *matcher.stops.orders.values()):
        left[order.new.order_id] += order.remaining
    assert left == submitted


@pytest.mark.parametrize("seed", range(10))
def test_every_amendment_has_one_answer_and_never_leaves_more_open_than_asked(seed: int) -> None:
    matcher = Matcher(SHIPPED[0])
    filled: dict[int, int] = defaultdict(int)
    for command in any_commands(1_000, seed):
        events = matcher.apply(command)
        if isinstance(command, Amend):
            answers = [event for event in events if isinstance(event, AmendRejected) or _is_by_user(event)]
            assert [answer.amendment_id for answer in answers] == [command.amendment_id]
            if isinstance(answers[0], Amended) and command.quantity is not None:
                assert filled[command.order_id] + answers[0].quantity <= command.quantity
        for event in events:
            if isinstance(event, Trade):
                filled[event.maker_order_id] += event.quantity
                filled[event.taker_order_id] += event.quantity
            elif isinstance(event, Cancelled | Expired | Rejected | Filled):
                # Its id may come again.
                filled.pop(event.order_id, None)


def _is_by_user(event: AnyEvent) -> TypeGuard[Amended]:
    return isinstance(event, Amended) and event.reason == "USER_REQUEST"


def test_prices_that_come_and_go_are_forgotten_and_those_in_use_are_not() -> None:
    dice = random.Random(5)
    matcher, live = Matcher(SHIPPED[0]), list[New]()
    for order_id in range(1, 4 * EMPTY_LEVELS_MIN):
        side: Side = "BUY" if dice.random() < 0.5 else "SELL"
        away = dice.randint(1, 10**6)
        price = 2 * 10**6 + (away if side == "SELL" else -away)
        order = New(
            at=AT,
            order_id=order_id,
            user_id=order_id % 7,
            side=side,
            type="LIMIT",
            time_in_force="GTC",
            price=price,
            quantity=1,
        )
        assert [type(event) for event in matcher.apply(order)] == [Placed]
        live.append(order)
        if len(live) > 50:
            gone = live.pop(dice.randrange(len(live)))
            matcher.apply(Cancel(at=AT, order_id=gone.order_id, user_id=gone.user_id))
        if order_id % 100 == 0:
            assert_sound(matcher)
    for side_of_book in (matcher.book.bids, matcher.book.asks):
        assert len(side_of_book.levels) <= EMPTY_LEVELS_MIN + 2 * 50
    assert_sound(matcher)
    assert matcher.book.orders.keys() == {order.order_id for order in live}


def test_the_same_log_gives_the_same_bytes() -> None:
    def replay() -> list[bytes]:
        matcher = Matcher(SHIPPED[0])
        events: list[AnyEvent] = []
        for command in any_commands(5_000, seed=3):
            events += matcher.apply(command)
        return [encode(event) for event in events]

    first = replay()
    assert len(first) > 5_000
    assert replay() == first


def test_no_taker_passes_over_a_better_or_an_earlier_order() -> None:
    matcher = Matcher(SHIPPED[0])
    traded_count = 0
    for command in random_commands(3_000, seed=5):
        book = matcher.book
        if not isinstance(command, New):
            matcher.apply(command)
            continue
        opposite = book.asks if command.side == "BUY" else book.bids
        queue = [order.new.order_id for order in book.resting(opposite) if order.new.user_id != command.user_id]
        traded = [event.maker_order_id for event in matcher.apply(command) if isinstance(event, Trade)]
        assert traded == queue[: len(traded)]
        traded_count += len(traded)
    assert traded_count > 500


def test_a_matcher_loaded_from_a_dump_at_any_point_goes_on_with_the_same_bytes() -> None:
    log = any_commands(1_500, seed=13)
    whole = Matcher(SHIPPED[0])
    loaded = Matcher(SHIPPED[0])
    for seq, command in enumerate(log):
        if seq % 7 == 0:
            assert loaded.dump() == whole.dump()
            loaded = Matcher.load(SHIPPED[0], loaded.dump())
            assert_sound(loaded)
        expected = [encode(event) for event in whole.apply(command)]
        assert [encode(event) for event in loaded.apply(command)] == expected
    assert loaded.dump() == whole.dump()


@pytest.mark.parametrize("state", [b"", b"nonsense", msgspec.msgpack.encode([999, 0, []])])
def test_a_dump_that_is_malformed_or_of_another_version_is_refused(state: bytes) -> None:
    with pytest.raises(ValueError):
        Matcher.load(SHIPPED[0], state)

"""Laws that hold after every command of any log, and agreement with the reference book."""

import random
from collections import defaultdict
from typing import TypeGuard

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from msgspec import structs

from domain.instruments import SHIPPED
from domain.matching import (
    Amend,
    Amended,
    AmendRejected,
    AnyCommand,
    AnyEvent,
    Cancel,
    CancelAll,
    Cancelled,
    CancelReplace,
    Deleverage,
    Expired,
    Filled,
    MarkPrice,
    New,
    Placed,
    Rejected,
    SetState,
    Side,
    Trade,
    TradingState,
    decode_event,
    encode,
)
from engine.book import EMPTY_LEVELS_MIN, Order
from engine.matcher import Matcher
from tests.engine_commands import AT, STOP_TYPES, any_commands, random_commands
from tests.reference_book import Live, ReferenceMatcher

# Few ids, users and prices: collisions, self-trades and duplicates are then frequent.
ORDER_IDS = st.integers(1, 40)
USERS = st.integers(1, 4)
PRICES = st.one_of(st.integers(97, 103), st.integers(97, 103), st.integers(97, 103), st.integers(-1, 0))
NEW_ORDERS = st.builds(
    New,
    at=st.integers(AT, AT + 9),
    order_id=ORDER_IDS,
    user_id=USERS,
    side=st.sampled_from(["BUY", "SELL"]),
    type=st.sampled_from(["LIMIT", "LIMIT", "LIMIT", "LIMIT", "MARKET", *STOP_TYPES]),
    time_in_force=st.sampled_from(["GTC", "GTC", "GTC", "GTC", "IOC", "FOK"]),
    price=PRICES,
    quantity=st.integers(0, 12),
    stp_mode=st.sampled_from(["EXPIRE_TAKER", "EXPIRE_MAKER", "EXPIRE_BOTH"]),
    liquidation=st.booleans(),
    post_only=st.sampled_from([False, False, False, True]),
    reduce_only=st.sampled_from([False, False, True]),
    stop_price=PRICES,
    working_type=st.sampled_from(["MARK", "LAST"]),
)
CHANGES = st.one_of(
    st.builds(Cancel, at=st.just(AT), order_id=ORDER_IDS, user_id=USERS),
    st.builds(CancelAll, at=st.just(AT), user_id=USERS),
    st.builds(
        Amend,
        at=st.just(AT),
        order_id=ORDER_IDS,
        user_id=USERS,
        price=st.none() | PRICES,
        quantity=st.none() | st.integers(-1, 12),
        amendment_id=st.integers(0, 2),
    ),
    st.builds(CancelReplace, at=st.just(AT), cancel_order_id=ORDER_IDS, order=NEW_ORDERS),
    st.builds(MarkPrice, at=st.just(AT), price=PRICES),
    st.builds(
        Deleverage,
        at=st.just(AT),
        user_id=USERS,
        side=st.sampled_from(["BUY", "SELL"]),
        price=PRICES,
        quantity=st.integers(-1, 20),
        counterparties=st.lists(USERS, max_size=5),
    ),
)
COMMANDS = st.one_of(NEW_ORDERS, NEW_ORDERS, CHANGES)


def as_told(order: Order | Live) -> tuple[New, int, int, int]:
    """An order's terms apart from price and quantity, its price, what was filled and what is open."""
    filled = order.filled if isinstance(order, Live) else order.new.quantity - order.remaining
    return structs.replace(order.new, price=0, quantity=0), order.price, filled, order.remaining


def assert_same_book(matcher: Matcher, reference: ReferenceMatcher) -> None:
    book = matcher.book
    for side in (book.bids, book.asks):
        fast = [as_told(order) for order in book.resting(side)]
        assert fast == [as_told(order) for order in reference.queue(side.name)]
        assert book.depth(side) == reference.depth(side.name)
    assert [as_told(order) for order in matcher.stops.orders.values()] == [
        as_told(order) for order in reference.waiting
    ]
    accounts = book.accounts
    assert {user: account.position for user, account in accounts.items() if account.position} == {
        user: lots for user, lots in reference.positions.items() if lots
    }
    assert (matcher.event_seq, matcher.state) == (reference.event_seq, reference.state)


def assert_sound(matcher: Matcher) -> None:
    """Never crossed, nothing negative, every sum and every index right, no reduce-only order beyond the position."""
    book = matcher.book
    if book.bids.best is not None and book.asks.best is not None:
        assert book.bids.best.price < book.asks.best.price
    for side in (book.bids, book.asks):
        assert sorted(side.heap) == sorted(level.key for level in side.levels.values() if level.queued)
        live = sorted((level for level in side.levels.values() if level.lots), key=lambda level: level.key)
        assert list(side) == live
        assert side.best is (live[0] if live else None)
        assert all(price == level.price and level.key == side.sign * price for price, level in side.levels.items())
        assert all(level.queued for level in live)
        for level in side.levels.values():
            assert level.lots == sum(order.remaining for order in level)
            assert all(order.remaining >= 0 for order in level.queue)
            assert level.gone == sum(not order.remaining for order in level.queue)
    resting = {order.new.order_id: order for side in (book.bids, book.asks) for order in book.resting(side)}
    assert book.orders == resting
    resting_of = {user: account.orders for user, account in book.accounts.items()}
    for users, orders in ((resting_of, book.orders), (matcher.stops.users, matcher.stops.orders)):
        assert {key: order for own in users.values() for key, order in own.items()} == orders
        assert all({order.new.user_id for order in own.values()} <= {user} for user, own in users.items())
    assert all(matcher.stops.users.values())
    assert not resting.keys() & matcher.stops.orders.keys()
    assert_reducing(matcher)


def assert_reducing(matcher: Matcher) -> None:
    reductions = matcher.reductions
    reducing = {key: order for key, order in matcher.book.orders.items() if order.new.reduce_only}
    assert {key: order for user in reductions.users.values() for key, order in user.orders.items()} == reducing
    for user_id, reducers in reductions.users.items():
        assert {(order.new.user_id, order.new.side) for order in reducers.orders.values()} == {(user_id, reducers.side)}
        assert reducers.lots == sum(order.remaining for order in reducers.orders.values())
        assert 0 < reducers.lots <= reductions.reducible(user_id, reducers.side)


class Agreement(RuleBasedStateMachine):
    """The engine and the reference book side by side, and a second engine that lives from dump to dump."""

    def __init__(self) -> None:
        super().__init__()
        self.matcher, self.loaded = Matcher(SHIPPED[0]), Matcher(SHIPPED[0])
        self.reference = ReferenceMatcher(SHIPPED[0])

    @rule(command=COMMANDS)
    def apply(self, command: AnyCommand) -> None:
        events = self.matcher.apply(command)
        assert events == self.reference.apply(command)
        assert self.loaded.apply(command) == events
        assert [decode_event(encode(event)) for event in events] == events

    @rule(state=st.sampled_from(["TRADING", "TRADING", "TRADING", "CANCEL_ONLY", "HALTED"]))
    def trading_is_open_or_not(self, state: TradingState) -> None:
        self.apply(SetState(at=AT, state=state))

    @rule()
    def dump_and_load(self) -> None:
        self.loaded = Matcher.load(SHIPPED[0], self.loaded.dump())
        assert self.loaded.dump() == self.matcher.dump()

    @invariant()
    def same_book(self) -> None:
        assert_same_book(self.matcher, self.reference)
        assert_sound(self.matcher)
        assert_sound(self.loaded)


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

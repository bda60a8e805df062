"""Only what is backed with initial margin opens a position: each case for bids and for asks."""

from typing import Any

import msgspec
import pytest

from domain.instruments import SHIPPED
from domain.matching import (
    Amend,
    AnyEvent,
    Cancel,
    Cancelled,
    CancelReplace,
    Deleverage,
    Expired,
    MarkPrice,
    Rejected,
    SetCover,
    SetState,
    SetTerms,
    Side,
    Trade,
)
from engine.guards import ONE
from engine.matcher import Matcher
from tests.engine_commands import AT, new

# The side on which user A closes a position, and may open one.
SIDES = pytest.mark.parametrize("side", ["BUY", "SELL"])
OPPOSITE: dict[Side, Side] = {"BUY": "SELL", "SELL": "BUY"}
A, B, C = 1, 2, 3
MARK = 1000


class Scene:
    """A trades at 10x; everybody else has all they need. `better` are ticks in favour of who trades on `side`."""

    def __init__(self, side: Side, *, held: int = 0, terms_first: bool = True) -> None:
        self.matcher, self.side, self.last_id = Matcher(SHIPPED[0]), side, 100
        self.matcher.apply(MarkPrice(at=AT, price=MARK))
        if terms_first:
            self.set_terms()
        if held:
            self.grow(held)

    def set_terms(self, user: int = A, maintenance: int = 10_000, *, cross: bool = False) -> None:
        terms = SetTerms(at=AT, user_id=user, leverage=10, maintenance=maintenance, cross=cross, bankruptcy=MARK * ONE)
        self.matcher.apply(terms)

    def grow(self, lots: int) -> None:
        """A gets a position which orders on `side` close."""
        self.send(lots, user=B)
        self.send(lots, side=OPPOSITE[self.side], time_in_force="IOC")

    def price(self, better: int) -> int:
        return MARK - better if self.side == "BUY" else MARK + better

    def send(
        self, lots: int, better: int = 0, *, user: int = A, side: Side | None = None, backed: int = -1, **terms: Any
    ) -> list[AnyEvent]:
        """A new order, of A and on `side` if nothing else is said."""
        self.last_id += 1
        order = new(self.last_id, side or self.side, self.price(better), lots, user_id=user, backed=backed, **terms)
        return self.matcher.apply(order)

    def sweep(self, lots: int, better: int = 0) -> list[AnyEvent]:
        """B takes what A has resting."""
        return self.send(lots, better, user=B, side=OPPOSITE[self.side], time_in_force="IOC")

    def reload(self) -> None:
        """The engine is started again from a snapshot."""
        dump = self.matcher.dump()
        self.matcher = Matcher.load(SHIPPED[0], dump)
        assert self.matcher.dump() == dump

    @property
    def turned(self) -> int:
        """A's lots of `side`; below 0 as long as there is something to close."""
        position = self.matcher.book.accounts[A].position
        return position if self.side == "BUY" else -position

    @property
    def counted(self) -> tuple[int, int]:
        """(open, backed) lots of A's orders on `side`."""
        account = self.matcher.book.accounts[A]
        if self.side == "BUY":
            return account.bids, account.bids_backed
        return account.asks, account.asks_backed


def traded(events: list[AnyEvent]) -> int:
    return sum(event.quantity for event in events if isinstance(event, Trade))


def ends(events: list[AnyEvent]) -> list[tuple[str, int]]:
    """Why orders ended, with how many lots open."""
    return [(event.reason, event.quantity) for event in events if isinstance(event, Cancelled | Expired | Rejected)]


@SIDES
def test_of_two_closers_swept_by_one_taker_the_second_opens_nothing(side: Side) -> None:
    for reduces in (True, False):
        scene = Scene(side, held=4)
        scene.send(4, 0, reduce_only=reduces, backed=0)
        scene.send(4, 1, backed=0)
        events = scene.sweep(8, 1)
        assert traded(events) == 4
        assert ("MARGIN_AT_MARK", 4) in ends(events)
        assert scene.turned == 0
        assert scene.counted == (0, 0)


@SIDES
def test_a_reduce_only_order_and_a_plain_one_that_is_backed_are_both_filled(side: Side) -> None:
    scene = Scene(side, held=4)
    scene.send(4, 0, reduce_only=True)
    scene.send(4, 1, backed=0)
    # This one could open three lots, and so the side can, whichever order comes first.
    scene.send(3, 2, backed=3)
    events = scene.sweep(11, 2)
    assert traded(events) == 4 + 3
    assert scene.turned == 3


@SIDES
def test_a_closer_left_behind_opens_nothing_whoever_closed_the_position(side: Side) -> None:
    for way in ("reduce-only", "plain", "deleveraged", "liquidated"):
        scene = Scene(side, held=4)
        scene.send(4, 1, backed=0)
        if way == "deleveraged":
            scene.matcher.apply(Deleverage(at=AT, user_id=A, side=side, price=MARK, quantity=4, counterparties=[B]))
        else:
            scene.send(4, user=C, side=OPPOSITE[side])
            reduces, liquidates = way != "plain", way == "liquidated"
            scene.send(4, backed=0, reduce_only=reduces, liquidation=liquidates, time_in_force="IOC")
        assert scene.turned == 0
        events = scene.sweep(4, 1)
        assert (traded(events), ends(events)[0]) == (0, ("MARGIN_AT_MARK", 4))


@SIDES
def test_a_flip_opens_what_is_backed_as_maker_and_as_taker(side: Side) -> None:
    for backed, opened in ((0, 0), (2, 2), (6, 6), (-1, 6)):
        scene = Scene(side, held=4)
        scene.send(10, backed=backed)
        assert scene.counted == (10, opened)
        scene.sweep(10)
        assert scene.turned == opened
        scene = Scene(side, held=4)
        for lots in (3, 7):
            scene.send(lots, user=C, side=OPPOSITE[side])
        events = scene.send(10, backed=backed)
        assert scene.turned == opened
        assert ends(events) == ([("MARGIN_AT_MARK", 6 - opened)] if opened < 6 else [])
        assert scene.counted == (0, 0)


@SIDES
def test_a_fill_or_kill_order_opens_all_or_nothing(side: Side) -> None:
    for backed, opened in ((5, -4), (6, 6)):
        scene = Scene(side, held=4)
        for lots in (3, 7):
            scene.send(lots, user=C, side=OPPOSITE[side])
        events = scene.send(10, backed=backed, time_in_force="FOK")
        assert scene.turned == opened
        assert ends(events) == ([("FOK_NOT_FILLABLE", 10)] if opened < 0 else [])


@SIDES
def test_a_fill_or_kill_order_does_not_count_on_makers_that_may_not_open(side: Side) -> None:
    taker: dict[str, Any] = {"user": B, "side": OPPOSITE[side], "time_in_force": "FOK"}
    for backed, filled in ((1, 0), (2, 6)):
        scene = Scene(side, held=4)
        scene.send(6, backed=backed)
        assert traded(scene.send(6, **taker)) == filled
    # One that only reduces may close the position first; itself it opens nothing.
    scene = Scene(side, held=4)
    scene.send(4, 0, reduce_only=True)
    scene.send(6, 1, backed=2)
    assert traded(scene.send(10, 1, **taker)) == 0
    assert traded(scene.send(4, 1, **taker)) == 4


@SIDES
def test_a_cancelled_order_takes_its_backing_along_and_no_more(side: Side) -> None:
    scene = Scene(side, held=4)
    scene.send(4, 1, backed=0)
    scene.send(6, 2, backed=6)
    assert scene.counted == (10, 6)
    first, second = scene.last_id - 1, scene.last_id
    # What remains could open two lots now, and for those there is margin.
    scene.matcher.apply(Cancel(at=AT, order_id=first, user_id=A))
    assert scene.counted == (6, 2)
    scene.reload()
    scene.matcher.apply(Cancel(at=AT, order_id=second, user_id=A))
    assert scene.counted == (0, 0)
    # It is gone for good.
    scene.send(4, 1, backed=0)
    scene.send(6, 2, backed=0)
    assert scene.counted == (10, 0)


@SIDES
def test_a_replaced_order_hands_on_no_backing(side: Side) -> None:
    for replaced, counted in ((True, (6, 1)), (False, (5, 5))):
        scene = Scene(side)
        scene.send(5)
        order = new(500, side, scene.price(1), 6, user_id=A, backed=1)
        scene.matcher.apply(CancelReplace(at=AT, cancel_order_id=scene.last_id if replaced else 77, order=order))
        assert scene.counted == counted
        scene.reload()
        assert scene.counted == counted


@SIDES
def test_an_amendment_backs_what_it_adds(side: Side) -> None:
    for price in (None, 1):
        for backed, opened in ((-1, 5), (0, 2), (1, 3)):
            scene = Scene(side, held=4)
            scene.send(6, 2, backed=2)
            amend = Amend(
                at=AT,
                order_id=scene.last_id,
                user_id=A,
                price=price and scene.price(price),
                quantity=9,
                backed=backed,
            )
            scene.matcher.apply(amend)
            assert scene.counted == (9, opened)
            scene.sweep(9, price or 2)
            assert scene.turned == opened


@SIDES
def test_an_amendment_that_trades_at_once_opens_what_it_has_backed(side: Side) -> None:
    scene = Scene(side, held=4)
    scene.send(5, 2, backed=1)
    scene.send(20, user=C, side=OPPOSITE[side])
    amend = Amend(at=AT, order_id=scene.last_id - 1, user_id=A, price=scene.price(0), quantity=9, backed=1)
    events = scene.matcher.apply(amend)
    assert (scene.turned, ends(events)) == (2, [("MARGIN_AT_MARK", 3)])


@SIDES
def test_a_smaller_order_gives_backing_back(side: Side) -> None:
    scene = Scene(side, held=4)
    scene.send(9, 2, backed=5)
    scene.matcher.apply(Amend(at=AT, order_id=scene.last_id, user_id=A, quantity=6, backed=-1))
    assert scene.counted == (6, 2)
    scene.matcher.apply(Amend(at=AT, order_id=scene.last_id, user_id=A, quantity=9, backed=0))
    assert scene.counted == (9, 2)


@SIDES
def test_a_position_that_grows_takes_backing_away_for_good(side: Side) -> None:
    scene = Scene(side)
    scene.send(6, 5)
    assert scene.counted == (6, 6)
    scene.grow(4)
    assert scene.counted == (6, 2)
    scene.send(4, user=C, side=OPPOSITE[side])
    scene.send(4, reduce_only=True, time_in_force="IOC")
    assert (scene.turned, scene.counted) == (0, (6, 2))
    scene.reload()
    events = scene.sweep(6, 5)
    assert (scene.turned, ends(events)[0]) == (2, ("MARGIN_AT_MARK", 4))


@SIDES
def test_waiting_and_triggered_orders_count(side: Side) -> None:
    scene = Scene(side, held=4)
    rises = side == "BUY"
    scene.send(6, type="STOP_LIMIT", stop_price=MARK + 5 if rises else MARK - 5, backed=2)
    assert scene.counted == (6, 2)
    scene.reload()
    assert scene.counted == (6, 2)
    scene.matcher.apply(MarkPrice(at=AT, price=MARK + 5 if rises else MARK - 5))
    assert scene.counted == (6, 2)
    scene.matcher.apply(MarkPrice(at=AT, price=MARK))
    scene.sweep(6)
    assert (scene.turned, scene.counted) == (2, (0, 0))


@SIDES
def test_all_that_is_open_when_a_user_gets_terms_is_backed(side: Side) -> None:
    scene = Scene(side, held=4, terms_first=False)
    scene.send(6, 1, backed=0)
    scene.send(3, 5, reduce_only=True)
    scene.send(1, type="STOP_LIMIT", stop_price=MARK + 50 if side == "BUY" else MARK - 50, backed=0)
    scene.set_terms()
    assert scene.counted == (7, 3)
    # Later terms change nothing.
    scene.send(5, 4, backed=0)
    scene.set_terms(maintenance=9_000)
    assert scene.counted == (12, 3)


@SIDES
def test_all_is_backed_in_a_snapshot_of_before(side: Side) -> None:
    scene = Scene(side, held=4)
    scene.send(6, 1, backed=0)
    *others, guarded = msgspec.msgpack.decode(scene.matcher.dump())
    before = [kept[:-2] for kept in guarded]
    scene.matcher = Matcher.load(SHIPPED[0], msgspec.msgpack.encode([*others, before]))
    assert scene.counted == (6, 2)


@SIDES
def test_an_order_that_is_refused_leaves_what_was_backed(side: Side) -> None:
    scene = Scene(side, held=4)
    scene.send(6, 3, backed=2)
    scene.send(5, user=C, side=OPPOSITE[side])
    assert ends(scene.send(7, 0, post_only=True)) == [("POST_ONLY_WOULD_CROSS", 7)]
    assert ends(scene.send(7, 0, time_in_force="FOK")) == [("FOK_NOT_FILLABLE", 7)]
    scene.matcher.apply(SetState(at=AT, state="HALTED"))
    assert ends(scene.send(7, 0)) == [("INSTRUMENT_NOT_TRADING", 7)]
    assert scene.counted == (6, 2)


@SIDES
def test_liquidation_orders_count_as_others_do(side: Side) -> None:
    # Those of the exchange only reduce, and count for nothing. One that could open is counted in and out.
    for reduces in (True, False):
        scene = Scene(side, held=4)
        scene.send(5, 3)
        scene.send(2, user=C, side=OPPOSITE[side])
        events = scene.send(4, liquidation=True, reduce_only=reduces, time_in_force="IOC")
        assert (traded(events), ends(events)) == (2, [("IOC", 2)])
        assert scene.counted == (5, 3 if not reduces else 1)
        scene.reload()


@SIDES
def test_fill_or_kill_knows_what_has_ended_before_it_in_the_same_command(side: Side) -> None:
    # A stop of B meets A's order, which is beyond its guard. Then a fill-or-kill stop of C meets A's next.
    scene, away = Scene(side), OPPOSITE[side]
    scene.send(5, -200, backed=0)
    scene.send(3, 5, backed=3)
    stop = MARK - 3 if away == "SELL" else MARK + 3
    terms: dict[str, Any] = {"side": away, "type": "STOP_LIMIT", "stop_price": stop}
    scene.send(1, 4, user=B, time_in_force="IOC", **terms)
    scene.send(3, 5, user=C, time_in_force="FOK", **terms)
    events = scene.matcher.apply(MarkPrice(at=AT, price=stop))
    assert (traded(events), scene.turned) == (3, 3)


@SIDES
def test_what_a_fill_makes_due_does_not_grow_at_the_same_price(side: Side) -> None:
    # The account lacks more than the first lots bring.
    scene = Scene(side)
    scene.set_terms(cross=True)
    scene.matcher.apply(SetCover(at=AT, user_id=A, cover=-500 * ONE, after_seq=0))
    for lots in (3, 7):
        scene.send(lots, user=C, side=OPPOSITE[side])
    events = scene.send(10, time_in_force="IOC")
    assert (traded(events), ends(events)) == (3, [("MARGIN_AT_MARK", 7)])


@SIDES
def test_fill_or_kill_does_not_begin_in_an_account_that_lacks_something(side: Side) -> None:
    # What ten lots need: a taker's fee of 500 millionths each, and their maintenance margin.
    needed = 10 * MARK * (500 + 10_000)
    for cover, filled in ((needed - 1, 0), (needed, 10)):
        scene = Scene(side)
        scene.set_terms(cross=True)
        scene.matcher.apply(SetCover(at=AT, user_id=A, cover=cover, after_seq=0))
        for lots in (3, 7):
            scene.send(lots, user=C, side=OPPOSITE[side])
        assert traded(scene.send(10, time_in_force="FOK")) == filled


@SIDES
def test_fill_or_kill_counts_on_nothing_of_a_maker_that_a_guard_may_stop(side: Side) -> None:
    # The first order is beyond its guard. Had it closed something, there would be less for the second to reduce.
    scene = Scene(side, held=4)
    scene.send(6, -200, backed=6)
    scene.send(4, 0, reduce_only=True)
    scene.send(4, 0, user=C)
    taker: dict[str, Any] = {"user": B, "side": OPPOSITE[side], "time_in_force": "FOK"}
    assert traded(scene.send(5, 0, **taker)) == 0
    assert traded(scene.send(4, 0, **taker)) == 4


@SIDES
def test_fill_or_kill_does_not_count_on_makers_that_are_due_after_one_fill(side: Side) -> None:
    # Margin of 10 % and maintenance of 20 %: every lot is due at once, since at the mark no loss goes behind it.
    for maintenance, filled in ((200_000, 0), (100_000, 6)):
        scene = Scene(side)
        scene.set_terms(maintenance=maintenance)
        scene.send(3, loss=200)
        scene.send(3, loss=200)
        events = scene.send(6, user=B, side=OPPOSITE[side], time_in_force="FOK")
        assert traded(events) == filled

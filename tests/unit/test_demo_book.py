"""The book rebuilt from the messages of a market."""

import pytest

from demo.__main__ import RECORDING
from demo.book import ReplayedBook
from demo.calibrate import BTC_STEPS
from demo.messages import BestQuotes, Diff, Message, Snapshot, Trade, read_recording
from demo.replay import Replay

SNAPSHOT = Snapshot(0, 10, ((100, 5), (99, 6), (97, 7)), ((101, 8), (103, 9)))


def book_after(*messages: Message) -> ReplayedBook:
    book = ReplayedBook()
    for message in messages:
        book.apply(message)
    return book


def test_levels_come_best_first() -> None:
    book = book_after(SNAPSHOT)
    assert book.bids(2) == ((100, 5), (99, 6))
    assert book.asks(9) == ((101, 8), (103, 9))
    assert (book.best_bid, book.best_ask) == (100, 101)


def test_an_update_replaces_quantities_and_removes_empty_levels() -> None:
    book = book_after(SNAPSHOT, Diff(1, 10, 12, ((100, 0), (98, 1), (97, 2)), ((101, 4), (200, 0))))
    assert book.bids(9) == ((99, 6), (98, 1), (97, 2))
    assert book.asks(9) == ((101, 4), (103, 9))


def test_updates_before_the_snapshot_count_only_if_they_end_after_it() -> None:
    old, overlapping, following = (
        Diff(0, 5, 10, ((100, 1),), ()),
        Diff(0, 9, 12, ((99, 2),), ()),
        Diff(0, 12, 13, ((97, 3),), ()),
    )
    book = book_after(old, overlapping, following, SNAPSHOT)
    assert book.ready
    assert book.bids(9) == ((100, 5), (99, 2), (97, 3))


@pytest.mark.parametrize("previous_id", [11, 13])
def test_a_missing_update_makes_the_book_unknown_until_the_next_snapshot(previous_id: int) -> None:
    messages: list[Message] = [
        SNAPSHOT,
        Diff(1, 10, 12, (), ()),
        Diff(2, previous_id, 14, (), ()),
        Diff(3, 14, 15, ((100, 1),), ()),
        Snapshot(4, 14, SNAPSHOT.bids, SNAPSHOT.asks),
    ]
    book = ReplayedBook()
    states = []
    for message in messages:
        book.apply(message)
        states.append(book.ready)
    assert states == [True, True, False, False, True]
    assert book.bids(1) == ((100, 1),)


def test_best_quotes_ahead_of_the_updates_take_away_what_is_better() -> None:
    book = book_after(SNAPSHOT, BestQuotes(1, 11, (98, 3), (99, 4)))
    assert book.bids(9) == ((98, 3), (97, 7))
    assert book.asks(9) == ((99, 4), (101, 8), (103, 9))


def test_best_quotes_behind_the_updates_change_nothing() -> None:
    book = book_after(SNAPSHOT, BestQuotes(1, 10, (97, 3), (103, 4)), Trade(2, 0, "BUY", 103, 1))
    assert (book.bids(1), book.asks(1)) == (((100, 5),), ((101, 8),))


def test_a_book_that_crosses_is_not_ready() -> None:
    assert not book_after(SNAPSHOT, Diff(1, 10, 12, ((102, 1),), ())).ready


@pytest.mark.skipif(not RECORDING.exists(), reason="the recording is not beside the repository")
def test_the_recorded_book_is_known_from_its_snapshot_on_and_never_crosses() -> None:
    book = ReplayedBook()
    states = set()
    spreads = []
    for message in read_recording(RECORDING, BTC_STEPS):
        book.apply(message)
        states.add((book.ready, isinstance(message, Snapshot)))
        if book.ready:
            spreads.append(book.best_ask - book.best_bid)
    assert states == {(False, False), (True, True), (True, False)}
    assert min(spreads) == 1
    assert len(spreads) > 90_000


def test_replay_gives_each_trade_once_and_ends_with_the_last_message() -> None:
    trades = [Trade(second * 10**9, 0, "BUY", 101, second) for second in (1, 2, 3)]
    replay = Replay(iter([Trade(0, 0, "SELL", 99, 50), SNAPSHOT, *trades]))
    assert replay.advance(0.5) == []
    assert replay.advance(2.0) == trades[:2]
    assert (replay.is_over, replay.seconds) == (False, 2.0)
    assert replay.advance(9.0) == trades[2:]
    assert (replay.is_over, replay.seconds) == (True, 3.0)

"""A checkpoint at any point and the rest of the log are the whole log."""

from collections.abc import Sequence
from decimal import Decimal

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from domain.instruments import SHIPPED
from domain.matching import AnyEvent
from market.instrument_market import Checkpoint, InstrumentMarket
from tests.engine_commands import AT, any_commands, random_commands
from tests.reference_book import ReferenceMatcher
from tests.unit.test_market_depth import placed, trade

BTC = SHIPPED[0]
DAY_MS = 24 * 3_600_000


def events_of(seed: int) -> list[AnyEvent]:
    matcher = ReferenceMatcher(BTC)
    return [event for c in random_commands(150, seed) + any_commands(150, seed) for event in matcher.apply(c)]


def spread_over_days(events: Sequence[AnyEvent], step_ms: int) -> list[AnyEvent]:
    """The same events with `step_ms` between one and the next, so that the window of 24 hours moves over them."""
    return [msgspec.structs.replace(event, at=AT + number * step_ms) for number, event in enumerate(events)]


def reloaded(market: InstrumentMarket) -> InstrumentMarket:
    return InstrumentMarket.load(BTC, market.dump())


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), cut=st.floats(0, 1), step_ms=st.sampled_from([1, 1_000, 300_000, DAY_MS // 50]))
def test_a_checkpoint_and_the_rest_of_the_log_give_what_the_whole_log_gives(
    seed: int, cut: float, step_ms: int
) -> None:
    events = spread_over_days(events_of(seed), step_ms)
    at = round(cut * len(events))
    whole, first = InstrumentMarket(BTC), InstrumentMarket(BTC)
    whole.apply(1, events)
    first.apply(1, events[:at])
    # Publishing in between, as a running market does, changes nothing of what is kept.
    first.take_publication(AT)
    second = reloaded(first)
    second.apply(at + 1, events[at:])
    assert msgspec.msgpack.decode(second.dump()) == msgspec.msgpack.decode(whole.dump())
    now = AT + len(events) * step_ms
    assert second.overview(20, now) == whole.overview(20, now)
    assert second.take_publication(now).keys == whole.take_publication(now).keys
    assert (second.bids(), second.asks()) == (whole.bids(), whole.asks())


def test_the_test_logs_leave_something_of_every_kind_in_a_checkpoint() -> None:
    checkpoints = []
    for seed in range(10):
        market = InstrumentMarket(BTC)
        market.apply(1, events_of(seed))
        checkpoints.append(msgspec.msgpack.decode(market.dump(), type=Checkpoint))
    for member in ("orders", "waiting_for_mark", "seconds", "last_price", "trades"):
        assert any(getattr(checkpoint, member) for checkpoint in checkpoints), member


def test_events_before_the_checkpoint_are_not_counted_again() -> None:
    events: list[AnyEvent] = [placed(1, "BUY", 100, 5), trade(1, 100, 2, maker_remaining=3)]
    market = InstrumentMarket(BTC)
    market.apply(1, events)
    again = reloaded(market)
    again.apply(1, events)
    assert again.dump() == market.dump()
    assert again.overview(20, AT).bids == [("10", "0.003")]


def test_the_first_publication_of_a_restored_market_is_complete_and_begins_a_chain() -> None:
    market = InstrumentMarket(BTC)
    market.apply(1, [placed(1, "BUY", 100, 5), placed(2, "SELL", 110, 5), trade(1, 100, 2, maker_remaining=3)])
    publication = reloaded(market).take_publication(AT)
    assert publication == market.take_publication(AT)
    assert len(publication.keys) == 3


def test_an_overview_has_the_best_levels_only() -> None:
    market = InstrumentMarket(BTC)
    market.apply(1, [placed(n, "BUY", 100 + n, 1) for n in range(1, 6)] + [placed(9, "SELL", 200, 3)])
    overview = market.overview(2, AT)
    assert overview.bids == [("10.5", "0.001"), ("10.4", "0.001")]
    assert overview.asks == [("20", "0.003")]
    assert (overview.last_price, overview.volume_24h) == (None, Decimal(0))


@pytest.mark.parametrize("payload", [b"", b"nonsense", msgspec.msgpack.encode([1, {}, [], {}, "price", []])])
def test_what_is_no_checkpoint_is_refused(payload: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        InstrumentMarket.load(BTC, payload)

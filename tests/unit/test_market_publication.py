"""What the market process says of an instrument: snapshots, and chains of updates that lead from one to the next."""

from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

from domain.instruments import SHIPPED
from domain.matching import AnyEvent
from market.instrument_market import RECENT_TRADES, InstrumentMarket, Publication, SequenceGapError
from tests.engine_commands import AT, new, random_commands
from tests.reference_book import ReferenceMatcher
from tests.unit.test_market_depth import placed, trade

BTC = SHIPPED[0].instrument_id
Document = dict[str, Any]


def events_of(count: int, seed: int) -> list[AnyEvent]:
    matcher = ReferenceMatcher(SHIPPED[0])
    return [event for command in random_commands(count, seed) for event in matcher.apply(command)]


def message(publication: Publication, channel: str) -> Document | None:
    found = [payload for name, payload in publication.messages if name == f"ws:{channel}:{BTC}"]
    return msgspec.json.decode(found[0]) if found else None


def snapshot(publication: Publication, key: str) -> Document:
    decoded: Document = msgspec.json.decode(publication.keys[f"market:{key}:{BTC}"])
    return decoded


def market_of(events: Sequence[AnyEvent]) -> InstrumentMarket:
    market = InstrumentMarket(SHIPPED[0])
    market.apply(1, events)
    return market


@pytest.mark.parametrize("seed", range(10))
def test_snapshot_and_updates_give_the_book_that_a_recomputation_gives(seed: int) -> None:
    events = events_of(300, seed)
    market = InstrumentMarket(SHIPPED[0])
    first = snapshot(market.take_publication(AT), "depth")
    sides = {side: dict(first["data"][side]) for side in ("bids", "asks")}
    seq = first["seq"]
    for start in range(0, len(events), 7):
        market.apply(start + 1, events[start : start + 7])
        publication = market.take_publication(AT)
        update = message(publication, "depth")
        if update is None:
            continue
        assert update["prevSeq"] == seq
        seq = update["seq"]
        for side, levels in sides.items():
            levels.update(update["data"][side])
            sides[side] = {price: quantity for price, quantity in levels.items() if quantity != "0"}
        full = snapshot(market_of(events[: market.seq]).take_publication(AT), "depth")
        assert full["data"] == snapshot(publication, "depth")["data"]
        assert sides == {side: dict(full["data"][side]) for side in sides}


def test_levels_are_decimal_strings_best_first() -> None:
    market = market_of([placed(1, "BUY", 100, 1), placed(2, "BUY", 101, 20), placed(3, "SELL", 110, 3)])
    depth = snapshot(market.take_publication(AT), "depth")
    assert depth["seq"] == 3
    assert depth["data"] == {"bids": [["10.1", "0.02"], ["10", "0.001"]], "asks": [["11", "0.003"]]}


def test_what_did_not_change_is_not_published() -> None:
    market = market_of([placed(1, "BUY", 100, 1)])
    market.take_publication(AT)
    assert market.take_publication(AT) == Publication()


def test_changes_between_two_publications_are_conflated() -> None:
    market = market_of([placed(1, "BUY", 100, 5)])
    market.take_publication(AT)
    market.apply(2, [trade(1, 100, 1, maker_remaining=4), trade(1, 100, 1, maker_remaining=3)])
    publication = market.take_publication(AT)
    depth, trades = message(publication, "depth"), message(publication, "trades")
    assert depth is not None
    assert depth["data"] == {"bids": [["10", "0.003"]], "asks": []}
    assert trades is not None
    assert len(trades["data"]) == 2


def test_a_broken_chain_starts_again_from_the_snapshot() -> None:
    market = market_of([placed(1, "BUY", 100, 5)])
    market.take_publication(AT)
    market.apply(2, [placed(2, "BUY", 99, 5)])
    market.take_publication(AT)
    market.break_chains()
    again = message(market.take_publication(AT), "depth")
    assert again is not None
    assert (again["prevSeq"], again["seq"]) == (2, 2)
    assert again["data"] == {"bids": [], "asks": []}


def test_more_trades_than_are_kept_break_the_chain_of_trades() -> None:
    market = market_of([placed(1, "BUY", 100, RECENT_TRADES + 10)])
    market.take_publication(AT)
    left = range(RECENT_TRADES + 9, 8, -1)
    market.apply(2, [trade(1, 100, 1, maker_remaining=remaining) for remaining in left])
    publication = market.take_publication(AT)
    update = message(publication, "trades")
    assert update is not None
    assert update["prevSeq"] == update["seq"] == market.seq
    assert update["data"] == []
    assert len(snapshot(publication, "trades")["data"]) == RECENT_TRADES


def test_the_ticker_tells_the_last_24_hours() -> None:
    market = market_of(
        [
            placed(1, "BUY", 100, 5),
            trade(1, 100, 1, maker_remaining=4),
            placed(2, "BUY", 103, 5),
            trade(2, 103, 2, maker_remaining=3),
        ]
    )
    ticker = snapshot(market.take_publication(AT), "ticker")["data"]
    assert ticker["lastPrice"] == ticker["high24h"] == ticker["bestBid"] == "10.3"
    assert ticker["low24h"] == "10"
    assert ticker["volume24h"] == "0.003"
    assert ticker["priceChange24h"] == "0.3"
    assert ticker["bestAsk"] is None
    later = message(market.take_publication(AT + 24 * 3_600_000), "tickers")
    assert later is not None
    assert later["data"]["lastPrice"] == "10.3"
    assert later["data"]["volume24h"] == "0"
    assert later["data"]["high24h"] is None


def test_events_known_already_are_skipped_and_a_gap_is_refused() -> None:
    matcher = ReferenceMatcher(SHIPPED[0])
    events = [event for order in range(1, 6) for event in matcher.apply(new(order, "BUY", 100, 1))]
    market = market_of(events[:3])
    market.apply(2, events[1:5])
    assert market.seq == 5
    assert market.book.bids == {100: 5}
    market.apply(1, events[:2])
    assert market.book.bids == {100: 5}
    with pytest.raises(SequenceGapError):
        market.apply(7, events)

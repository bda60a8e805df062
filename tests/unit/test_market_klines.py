"""Klines are those of a slow recomputation from all trades, whatever comes late and wherever a process starts anew."""

from collections.abc import Sequence
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from domain.money import ZERO
from domain.periods import PERIODS_MS
from market.klines import CLOSE_GRACE_MS, FILLED_MAX, Kline, Traded, advance, merge, oldest_touched

MINUTE = 60_000
START = 1_700_000_040_000  # The beginning of a minute.


def recomputed(trades: Sequence[Traded], period: int, now: int) -> list[Kline]:
    """Every bucket from the first traded one to that of `now`, each looked up among all trades."""
    if not trades:
        return []
    first = min(trade.at_ms for trade in trades) // period * period
    last = max(now, *(trade.at_ms for trade in trades)) // period * period
    klines: list[Kline] = []
    for open_ms in range(first, last + 1, period):
        inside = [trade for trade in trades if open_ms <= trade.at_ms < open_ms + period]
        prices = [trade.price for trade in inside] or [klines[-1].close]
        klines.append(
            Kline(
                open_ms=open_ms,
                open=prices[0],
                high=max(prices),
                low=min(prices),
                close=prices[-1],
                volume=sum((trade.quantity for trade in inside), ZERO),
                trade_count=len(inside),
                last_seq=inside[-1].seq if inside else klines[-1].last_seq,
                closed=open_ms + period + CLOSE_GRACE_MS <= now,
            )
        )
    return klines


def trade(seq: int, at_ms: int, price: int = 100, quantity: int = 1) -> Traded:
    return Traded(seq, at_ms, Decimal(price), Decimal(quantity))


class Store:
    """What a process writes, and how much of it one knows that has just started."""

    def __init__(self, period: int) -> None:
        self.period = period
        # How many it remembers: the newest so many of all there are, or all if there are fewer.
        self.kept = 4
        self.klines: list[Kline] = []
        self.recent: list[Kline] = []
        self.closings: list[int] = []

    def step(self, trades: Sequence[Traded], now: int) -> None:
        known = self.recent
        oldest = oldest_touched(known, trades, self.period)
        if oldest is not None:
            known = [kline for kline in self.klines if kline.open_ms >= oldest] or known
        was_closed = {kline.open_ms for kline in self.klines if kline.closed}
        changed = advance(known, trades, self.period, now)
        self.closings += [kline.open_ms for kline in changed if kline.closed and kline.open_ms not in was_closed]
        self.klines = merge(self.klines, changed)
        self.recent = merge(self.recent, changed)[-self.kept :]

    def restart(self, kept: int) -> None:
        self.kept = kept
        self.recent = self.klines[-kept:]


# A clock may be ahead of ours, so that three buckets are open: no start knows fewer.
# A step: trades of some time around the clock, then the clock moves on; now and then the process starts anew.
OFFSETS = st.one_of(
    st.integers(-200, 200), st.sampled_from([-7 * MINUTE, -MINUTE, -MINUTE - 1, -1, 0, MINUTE - 1, MINUTE])
)
STEPS = st.lists(
    st.tuples(
        st.lists(st.tuples(OFFSETS, st.integers(90, 110), st.integers(1, 9)), max_size=4),
        st.sampled_from([0, 1, 999, 1_000, 20_000, MINUTE - 1, MINUTE, 7 * MINUTE]),
        st.one_of(st.none(), st.integers(3, 5)),
        st.integers(0, 2),
    ),
    max_size=25,
)


@given(STEPS, st.sampled_from([MINUTE, 5 * MINUTE]))
def test_klines_equal_a_recomputation_at_every_moment(
    steps: list[tuple[list[tuple[int, int, int]], int, int | None, int]], period: int
) -> None:
    store, trades, now = Store(period), list[Traded](), START
    for new, passed, restart, repeated in steps:
        fresh = [
            trade(len(trades) + number, now + offset, price, quantity)
            for number, (offset, price, quantity) in enumerate(new, 1)
        ]
        # Some of those counted already are given again: a start does not know exactly how far the last one came.
        store.step([*trades[len(trades) - repeated :], *fresh] if repeated else fresh, now)
        trades += fresh
        assert store.klines == recomputed(trades, period, now)
        assert sorted(store.closings) == [kline.open_ms for kline in store.klines if kline.closed]
        now += passed
        if restart is not None:
            store.restart(restart)


def test_a_bucket_closes_on_time_without_trades() -> None:
    known = advance([], [trade(1, START + 10)], MINUTE, START + 20)
    assert advance(known, [], MINUTE, START + MINUTE - 1) == []
    (opened,) = advance(known, [], MINUTE, START + MINUTE)
    assert (opened.open_ms, opened.volume, opened.trade_count, opened.closed) == (START + MINUTE, ZERO, 0, False)
    known = merge(known, [opened])
    assert advance(known, [], MINUTE, START + MINUTE + CLOSE_GRACE_MS - 1) == []
    (closed,) = advance(known, [], MINUTE, START + MINUTE + CLOSE_GRACE_MS)
    assert (closed.open_ms, closed.closed, closed.trade_count) == (START, True, 1)


def test_a_trade_at_the_edge_opens_the_next_bucket() -> None:
    changed = advance([], [trade(1, START + MINUTE - 1), trade(2, START + MINUTE)], MINUTE, START + MINUTE)
    assert [(kline.open_ms, kline.last_seq) for kline in changed] == [(START, 1), (START + MINUTE, 2)]


def test_a_trade_after_the_close_amends_its_bucket_and_the_flat_ones_after_it() -> None:
    known = advance([], [trade(1, START, 100)], MINUTE, START + 3 * MINUTE)
    changed = advance(known, [trade(2, START + 5, 120)], MINUTE, START + 3 * MINUTE)
    assert {kline.close for kline in changed} == {120}
    assert [(kline.trade_count, kline.closed) for kline in changed] == [(2, True), (0, True), (0, False), (0, False)]
    assert {kline.last_seq for kline in changed} == {2}


def test_a_long_silence_is_filled_in_parts() -> None:
    known, now = advance([], [trade(1, START)], MINUTE, START), START + 3 * FILLED_MAX * MINUTE
    for part in range(1, 4):
        known = merge(known, advance(known, [], MINUTE, now))
        assert len(known) == part * FILLED_MAX + 1
    assert [kline.open_ms for kline in advance(known, [], MINUTE, now + MINUTE)][-1] == now + MINUTE


def test_what_is_too_old_to_be_kept_is_not_filled_but_still_gives_the_price() -> None:
    horizon = START + 10 * MINUTE
    changed = advance([], [trade(1, START, 77)], MINUTE, START + 12 * MINUTE, horizon)
    assert [kline.open_ms for kline in changed] == [horizon, horizon + MINUTE, horizon + 2 * MINUTE]
    assert {kline.open for kline in changed} == {77}
    years_later = advance([], [trade(1, START, 77)], MINUTE, START + 10**6 * MINUTE, START + (10**6 - 1) * MINUTE)
    assert [kline.open_ms for kline in years_later] == [START + (10**6 - 1) * MINUTE, START + 10**6 * MINUTE]


@pytest.mark.parametrize("period", PERIODS_MS.values())
def test_every_period_divides_the_day_and_starts_at_midnight_utc(period: int) -> None:
    assert PERIODS_MS["1d"] % period == 0
    (kline,) = advance([], [trade(1, START)], period, START)
    assert kline.open_ms % period == 0
    assert kline.open_ms <= START < kline.open_ms + period

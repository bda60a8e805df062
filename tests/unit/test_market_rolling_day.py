"""The 24 h statistics are those of the trades in the window."""

import random

import pytest

from market.rolling_day import WINDOW_SECONDS, RollingDay

Trades = list[tuple[int, int, int]]


def statistics(trades: Trades, now_ms: int) -> tuple[int | None, int | None, int | None, int]:
    """open, high, low and volume of the seconds that end less than 24 hours before `now_ms`."""
    inside = [trade for trade in trades if trade[0] // 1000 > now_ms // 1000 - WINDOW_SECONDS]
    if not inside:
        return None, None, None, 0
    first = min(inside, key=lambda trade: trade[0] // 1000)
    prices = [price for _, price, _ in inside]
    return first[1], max(prices), min(prices), sum(lots for _, _, lots in inside)


def of(day: RollingDay) -> tuple[int | None, int | None, int | None, int]:
    return day.open, day.high, day.low, day.lots


@pytest.mark.parametrize("seed", range(10))
def test_statistics_equal_a_recomputation_at_every_moment(seed: int) -> None:
    dice = random.Random(seed)
    day, trades, now_ms = RollingDay(), Trades(), 1_700_000_000_000
    for _ in range(400):
        now_ms += dice.choice([1, 300, 1_000, 600_000, 3_600_000])
        if dice.random() < 0.8:
            trade = (now_ms, dice.randint(90, 110), dice.randint(1, 9))
            trades.append(trade)
            day.add(*trade)
        day.expire(now_ms)
        assert of(day) == statistics(trades, now_ms)


def test_a_trade_that_comes_a_little_late_counts_in_its_second() -> None:
    day = RollingDay()
    day.add(10_000, 100, 1)
    day.add(9_000, 90, 2)
    assert of(day) == (90, 100, 90, 3)
    day.expire(9_000 + WINDOW_SECONDS * 1000)
    assert of(day) == (100, 100, 100, 1)


def test_a_trade_older_than_the_window_counts_for_nothing() -> None:
    day = RollingDay()
    day.add(WINDOW_SECONDS * 2000, 100, 1)
    day.add(1_000, 50, 5)
    assert of(day) == (100, 100, 100, 1)


def test_a_long_replay_keeps_no_more_than_the_window() -> None:
    day = RollingDay()
    for hour in range(100):
        day.add(hour * 3_600_000, hour, 1)
    assert day.lots == 24
    assert (day.low, day.high) == (76, 99)

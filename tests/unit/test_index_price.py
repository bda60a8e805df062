"""The index from several sources: laws, and who is left out."""

import random
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from domain.index_price import (
    DEVIATION_MAX,
    PRICE_MAX,
    QUIET_MAX,
    InsanePriceError,
    Quote,
    Source,
    SpotTrade,
    index_price,
    vwap,
)

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
STALE = timedelta(seconds=10)
WINDOW = timedelta(seconds=10)
DUST = Decimal("1e-8")

prices = st.decimals("0.00000001", "1000000", places=8)
near = st.decimals("59900", "60100", places=2)
weights = st.decimals("0.001", "100", places=3)
some_sources = st.lists(st.tuples(prices, weights), min_size=2, max_size=6)


def source(name: str, price: Decimal | int | str, weight: Decimal | int = 1, **more: datetime) -> Source:
    quote = Quote(Decimal(price), more.get("traded_at", NOW), more.get("received_at", NOW))
    return Source(name, Decimal(weight), quote)


def named(pairs: Sequence[tuple[Decimal, Decimal]]) -> list[Source]:
    return [source(f"s{number}", price, weight) for number, (price, weight) in enumerate(pairs)]


@given(some_sources)
def test_the_index_lies_between_the_clamped_prices_which_lie_near_the_median(
    pairs: list[tuple[Decimal, Decimal]],
) -> None:
    index = index_price(named(pairs), NOW, STALE)
    if index.price is None:
        return
    clamped = [used.clamped for used in index.used]
    assert min(clamped) <= index.price <= max(clamped)
    middle = median(price for price, _ in pairs)
    assert all(abs(price - middle) <= middle * DEVIATION_MAX + DUST for price in clamped)
    assert abs(sum((used.weight for used in index.used), Decimal(-1))) < Decimal("1e-20")


@given(some_sources, st.randoms(use_true_random=False))
def test_the_order_of_the_sources_does_not_matter(pairs: list[tuple[Decimal, Decimal]], order: random.Random) -> None:
    sources = named(pairs)
    expected = index_price(sources, NOW, STALE).price
    order.shuffle(sources)
    assert index_price(sources, NOW, STALE).price == expected


@given(near, near, prices, st.tuples(weights, weights, weights))
def test_one_insane_source_of_three_moves_the_index_by_its_share_of_two_percent_at_most(
    first: Decimal, second: Decimal, insane: Decimal, shares: tuple[Decimal, Decimal, Decimal]
) -> None:
    all_prices = [first, second, insane]
    index = index_price(named(list(zip(all_prices, shares, strict=True))), NOW, STALE).price
    middle = median(all_prices)
    honest = index_price(named(list(zip([first, second, middle], shares, strict=True))), NOW, STALE).price
    assert index is not None
    assert honest is not None
    assert min(first, second) <= middle <= max(first, second)
    assert abs(index - honest) <= shares[2] / sum(shares) * DEVIATION_MAX * middle + 2 * DUST


@given(near, weights, st.integers(2, 6))
def test_sources_that_agree_give_their_price_whatever_their_weights(
    price: Decimal, weight: Decimal, count: int
) -> None:
    pairs = [(price, weight * number) for number in range(1, count + 1)]
    assert index_price(named(pairs), NOW, STALE).price == price


@given(st.lists(st.tuples(near, weights), min_size=3, max_size=5), st.integers(1, 1000))
def test_only_the_proportions_of_the_weights_matter(pairs: list[tuple[Decimal, Decimal]], factor: int) -> None:
    scaled = [(price, weight * factor) for price, weight in pairs]
    assert index_price(named(pairs), NOW, STALE).price == index_price(named(scaled), NOW, STALE).price


@pytest.mark.parametrize(
    ("flawed", "reason"),
    [
        (Source("flawed", Decimal(1), None), "no answer yet"),
        (Source("flawed", Decimal(1), None, "RequestTimeout"), "RequestTimeout"),
        (source("flawed", 100, received_at=NOW - STALE - timedelta(milliseconds=1)), "stale"),
        (source("flawed", 100, traded_at=NOW - QUIET_MAX - timedelta(milliseconds=1)), "no recent trade"),
        (source("flawed", 100, traded_at=NOW + QUIET_MAX + timedelta(milliseconds=1)), "no recent trade"),
        (source("flawed", 0), "insane price"),
        (source("flawed", -100), "insane price"),
        (source("flawed", "NaN"), "insane price"),
        (source("flawed", "Infinity"), "insane price"),
        (source("flawed", PRICE_MAX), "insane price"),
    ],
)
def test_a_source_with_a_flaw_is_dropped_and_the_others_share_its_weight(flawed: Source, reason: str) -> None:
    index = index_price([source("a", 100, 1), flawed, source("b", 101, 3)], NOW, STALE)
    assert index.price == Decimal("100.75")
    assert index.dropped == {"flawed": reason}
    assert [(used.name, used.weight) for used in index.used] == [("a", Decimal("0.25")), ("b", Decimal("0.75"))]


def test_a_quote_counts_until_the_very_end_of_its_time() -> None:
    late = source("late", 102, received_at=NOW - STALE, traded_at=NOW - QUIET_MAX)
    assert index_price([source("a", 100), late], NOW, STALE).price == 101


def test_an_error_alone_does_not_drop_a_source_whose_last_answer_is_fresh() -> None:
    fresh = source("late", 102)
    failed = Source("late", Decimal(1), fresh.quote, "RequestTimeout")
    assert index_price([source("a", 100), failed], NOW, STALE).price == 101
    later = NOW + STALE + timedelta(seconds=1)
    assert index_price([failed], later, STALE).dropped == {"late": "RequestTimeout"}


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_live_sources_give_no_index(count: int) -> None:
    index = index_price([source(f"s{number}", 100) for number in range(count)], NOW, STALE)
    assert (index.price, index.used) == (None, ())


def test_two_sources_that_contradict_each_other_give_no_index_and_a_third_decides() -> None:
    two = [source("a", 100), source("b", 200)]
    index = index_price(two, NOW, STALE)
    assert (index.price, index.dropped) == (None, {"a": "contradicted", "b": "contradicted"})
    assert index_price([*two, source("c", 101)], NOW, STALE).price == Decimal("101.34")


def trade(price: str, quantity: str, age: float) -> SpotTrade:
    return SpotTrade(Decimal(price), Decimal(quantity), NOW - timedelta(seconds=age))


def test_the_smoothed_price_weighs_trades_of_the_window_by_volume() -> None:
    assert vwap([trade("1", "99", 10), trade("100", "1", 9), trade("103", "2", 0)], NOW, WINDOW) == 102
    assert vwap([trade("1", "1", 0), trade("2", "2", 0)], NOW, WINDOW) == Decimal("1.66666667")


def test_without_trades_in_the_window_the_latest_stands_alone() -> None:
    assert vwap([trade("1", "99", 100), trade("100", "1", 90)], NOW, WINDOW) == 100


@given(st.lists(st.tuples(prices, st.decimals("0.00000001", "1000", places=8)), min_size=1, max_size=20))
def test_the_smoothed_price_lies_between_the_lowest_and_the_highest_trade(pairs: list[tuple[Decimal, Decimal]]) -> None:
    smoothed = vwap([SpotTrade(price, quantity, NOW) for price, quantity in pairs], NOW, WINDOW)
    assert min(price for price, _ in pairs) <= smoothed <= max(price for price, _ in pairs)


@pytest.mark.parametrize("wrong", ["0", "-1", "NaN", "sNaN", "Infinity", "1e12", "1e400"])
@pytest.mark.parametrize("what", ["price", "quantity"])
def test_one_insane_trade_discredits_the_whole_answer(wrong: str, what: str) -> None:
    insane = trade(wrong, "1", 100) if what == "price" else trade("1", wrong, 100)
    with pytest.raises(InsanePriceError):
        vwap([insane, trade("1", "1", 0)], NOW, WINDOW)

"""How makers get from what they quote to what they should."""

from collections import Counter, defaultdict
from collections.abc import Iterable

from hypothesis import given
from hypothesis import strategies as st

from demo.book import ReplayedBook
from demo.messages import Side, Snapshot
from demo.quoting import Level, NewQuote, Quote, Refresh, plan_refresh, target_levels

BOOK = Snapshot(0, 1, ((100, 5), (99, 6)), ((101, 8), (103, 9)))
PLENTY = 10_000


def quotes_of(levels: Iterable[tuple[Level, int]], *, leaving: bool = False) -> list[Quote]:
    return [Quote(f"{number}", *level, lots, leaving) for number, (level, lots) in enumerate(levels)]


def after(quotes: Iterable[Quote], refresh: Refresh) -> list[Quote]:
    kept = [quote for quote in quotes if quote.client_id not in refresh.cancels and not quote.leaving]
    new = [Quote(f"new {n}", q.side, q.price, q.lots) for n, q in enumerate(refresh.places)]
    return [*kept, *new]


def shown(quotes: Iterable[Quote]) -> dict[Level, int]:
    levels: Counter[Level] = Counter()
    for quote in quotes:
        levels[quote.side, quote.price] += quote.lots
    return dict(levels)


def levels(low: int, high: int) -> st.SearchStrategy[Level]:
    sides: st.SearchStrategy[Side] = st.sampled_from(["BUY", "SELL"])
    return st.tuples(sides, st.integers(low, high))


@st.composite
def targets(draw: st.DrawFn) -> dict[Level, int]:
    middle = draw(st.integers(5, 15))
    bids = draw(st.dictionaries(st.integers(1, middle - 1), st.integers(1, 9), max_size=6))
    asks = draw(st.dictionaries(st.integers(middle, 20), st.integers(1, 9), max_size=6))
    target: dict[Level, int] = {("BUY", price): lots for price, lots in bids.items()}
    return target | {("SELL", price): lots for price, lots in asks.items()}


some_quotes = st.lists(st.tuples(levels(1, 20), st.integers(1, 9)), max_size=15).map(quotes_of)


@given(some_quotes, targets())
def test_refreshes_lead_exactly_to_the_target_and_then_rest(quotes: list[Quote], target: dict[Level, int]) -> None:
    first = plan_refresh(quotes, target, PLENTY)
    quotes = after(quotes, first)
    second = plan_refresh(quotes, target, PLENTY)
    quotes = after(quotes, second)
    assert not second.cancels
    assert len(second.places) == first.deferred
    assert shown(quotes) == target
    assert plan_refresh(quotes, target, PLENTY) == Refresh((), (), 0, 0)


@given(some_quotes, targets(), st.integers(1, 5))
def test_a_limit_of_orders_delays_the_target_but_does_not_change_it(
    quotes: list[Quote], target: dict[Level, int], actions_max: int
) -> None:
    for _ in range(len(quotes) + len(target) + 20):
        refresh = plan_refresh(quotes, target, actions_max)
        assert len(refresh.cancels) + len(refresh.places) <= actions_max
        quotes = after(quotes, refresh)
    assert shown(quotes) == target


@given(some_quotes, some_quotes, targets())
def test_no_new_quote_meets_one_of_ours_that_may_still_be_there(
    staying: list[Quote], leaving: list[Quote], target: dict[Level, int]
) -> None:
    gone = [Quote(f"leaving {q.client_id}", q.side, q.price, q.lots, leaving=True) for q in leaving]
    present = [*staying, *gone]
    refresh = plan_refresh(present, target, PLENTY)
    prices: defaultdict[Side, list[int]] = defaultdict(list)
    for quote in present:
        prices[quote.side].append(quote.price)
    for new in refresh.places:
        if new.side == "BUY":
            assert all(new.price < ask for ask in prices["SELL"])
        else:
            assert all(new.price > bid for bid in prices["BUY"])


def test_a_level_that_grows_gets_one_more_order_and_keeps_the_old_one() -> None:
    refresh = plan_refresh(quotes_of([(("BUY", 100), 3)]), {("BUY", 100): 5}, PLENTY)
    assert refresh == Refresh((), (NewQuote("BUY", 100, 2),), 1, 0)


def test_a_level_that_shrinks_loses_its_newest_orders() -> None:
    quotes = quotes_of([(("SELL", 101), 3), (("SELL", 101), 4), (("SELL", 101), 2)])
    refresh = plan_refresh(quotes, {("SELL", 101): 5}, PLENTY)
    assert refresh == Refresh(("1", "2"), (NewQuote("SELL", 101, 2),), 1, 0)


def test_what_stands_on_the_other_sides_ground_goes_first() -> None:
    quotes = quotes_of([(("BUY", 90), 1), (("BUY", 99), 1), (("BUY", 102), 1)])
    refresh = plan_refresh(quotes, {("BUY", 99): 2, ("BUY", 98): 1, ("SELL", 101): 1}, 2)
    assert refresh.cancels == ("2", "0")
    assert refresh.places == ()
    assert refresh.deferred == 1


def test_leaving_orders_neither_count_nor_are_cancelled_again() -> None:
    refresh = plan_refresh(quotes_of([(("BUY", 100), 3)], leaving=True), {("BUY", 100): 3}, PLENTY)
    assert refresh == Refresh((), (NewQuote("BUY", 100, 3),), 0, 0)


def test_the_target_is_the_best_levels_with_what_takers_still_want_on_top_of_the_opposite_best() -> None:
    book = ReplayedBook()
    assert target_levels(book, 2, {"BUY": 7, "SELL": 0}) == {}
    book.apply(BOOK)
    assert target_levels(book, 1, {"BUY": 7, "SELL": 0}) == {("BUY", 100): 5, ("SELL", 101): 15}
    assert target_levels(book, 5, {"BUY": 0, "SELL": 2}) == {
        ("BUY", 100): 7,
        ("BUY", 99): 6,
        ("SELL", 101): 8,
        ("SELL", 103): 9,
    }

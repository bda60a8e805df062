"""Guards of fills in the cases that random commands do not often come upon, each for a long and for a short."""

from typing import Any

import pytest

from domain.instruments import SHIPPED
from domain.mark_price import MARK_AGE_MAX
from domain.matching import (
    AnyCommand,
    AnyEvent,
    Deleverage,
    Event,
    Expired,
    Filled,
    MarkPrice,
    New,
    Rejected,
    SetCover,
    SetTerms,
    Side,
    Trade,
    encode,
)
from engine.guards import ONE
from engine.matcher import Matcher
from tests.engine_commands import AT, new

USER = 1
# How a long is closed and a short; prices are mirrored at 1000.
WAYS = pytest.mark.parametrize("closes", ["SELL", "BUY"])
OPPOSITE: dict[Side, Side] = {"BUY": "SELL", "SELL": "BUY"}


def worse(closes: Side, ticks: int) -> int:
    """The price that is `ticks` worse than 1000 for who closes."""
    return 1000 - ticks if closes == "SELL" else 1000 + ticks


def opened(closes: Side, lots: int, *, bankruptcy: int, cross: bool, maintenance: int = 20_000) -> list[AnyCommand]:
    """A position of `lots` that its user had before there were terms."""
    return [
        new(101, OPPOSITE[closes], 1000, lots, user_id=USER),
        new(102, closes, 1000, lots, user_id=9),
        SetTerms(at=AT, user_id=USER, leverage=10, maintenance=maintenance, cross=cross, bankruptcy=bankruptcy),
    ]


def waiting(closes: Side, *quotes: tuple[int, int]) -> list[AnyCommand]:
    """Orders of others against who closes: (ticks worse than 1000, lots)."""
    opposite = OPPOSITE[closes]
    return [new(200 + n, opposite, worse(closes, ticks), lots) for n, (ticks, lots) in enumerate(quotes)]


def closing(closes: Side, lots: int, **terms: Any) -> New:
    """An order that takes all that the guard allows."""
    return new(300, closes, worse(closes, 50), lots, user_id=USER, **({"time_in_force": "IOC"} | terms))


def run(commands: list[AnyCommand]) -> list[AnyEvent]:
    """What the last of the commands does."""
    matcher = Matcher(SHIPPED[0])
    return [matcher.apply(command) for command in commands][-1]


def end_of(events: list[AnyEvent]) -> tuple[type[Event], str, int]:
    """How the order ended, why, and how many lots were traded before."""
    traded = sum(event.quantity for event in events if isinstance(event, Trade))
    return type(events[-1]), getattr(events[-1], "reason", ""), traded


@WAYS
def test_what_an_account_lacks_is_made_good_by_what_closing_a_part_frees(closes: Side) -> None:
    # Four lots are worth 10 each at the mark, and the rest of the account lacks 20: 4 a lot after the fee.
    account = [
        *opened(closes, 4, bankruptcy=worse(closes, 10) * ONE, cross=True),
        SetCover(at=AT, user_id=USER, cover=-20 * ONE, after_seq=10**6),
        MarkPrice(at=AT, price=1000),
    ]
    for quotes in ([(3, 4)], [(3, 2), (3, 2)], [(2, 2), (3, 2)]):
        for time_in_force in ("IOC", "FOK"):
            order = closing(closes, 4, time_in_force=time_in_force)
            events = run([*account, *waiting(closes, *quotes), order])
            assert end_of(events) == (Filled, "", 4)
    events = run([*account, *waiting(closes, (2, 2), (7, 2)), closing(closes, 4)])
    assert end_of(events) == (Expired, "MARGIN_AT_MARK", 2)


@WAYS
def test_a_fill_or_kill_order_is_guarded_before_any_mark_is_heard(closes: Side) -> None:
    account = opened(closes, 4, bankruptcy=worse(closes, 10) * ONE, cross=False)
    order = closing(closes, 4, time_in_force="FOK", reduce_only=True)
    assert end_of(run([*account, *waiting(closes, (5, 2), (20, 2)), order])) == (Expired, "FOK_NOT_FILLABLE", 0)
    assert end_of(run([*account, *waiting(closes, (5, 2), (6, 2)), order])) == (Filled, "", 4)


@WAYS
def test_what_rounding_may_have_lost_counts_in_the_next_fill_at_the_same_price(closes: Side) -> None:
    # At 990 the position is worth just the fee. Closed in two parts it lacks what is lost by rounding the first.
    fee = 500 if closes == "BUY" else -500
    account = [
        *opened(closes, 4, bankruptcy=worse(closes, 10) * (ONE + fee), cross=False),
        MarkPrice(at=AT, price=1000),
    ]
    assert end_of(run([*account, *waiting(closes, (10, 4)), closing(closes, 4)])) == (Filled, "", 4)
    two = run([*account, *waiting(closes, (10, 2), (10, 2)), closing(closes, 4)])
    assert end_of(two) == (Expired, "MARGIN_AT_MARK", 2)


@WAYS
def test_deleveraging_costs_a_cross_account_no_fee(closes: Side) -> None:
    # Worth nothing at the mark, with 6 in the account: five lots can pay a fee of one tick each.
    account = [
        *opened(closes, 10, bankruptcy=worse(closes, 10) * ONE, cross=True),
        SetCover(at=AT, user_id=USER, cover=6 * ONE, after_seq=10**6),
        MarkPrice(at=AT, price=worse(closes, 10)),
        Deleverage(at=AT, user_id=USER, side=closes, price=worse(closes, 10), quantity=5, counterparties=[9]),
    ]
    assert end_of(run([*account, *waiting(closes, (10, 5)), closing(closes, 5)])) == (Filled, "", 5)
    assert end_of(run([*account, *waiting(closes, (11, 5)), closing(closes, 5)])) == (Expired, "MARGIN_AT_MARK", 0)


@WAYS
def test_a_cover_told_before_the_terms_is_in_the_dump(closes: Side) -> None:
    told, loaded = Matcher(SHIPPED[0]), Matcher(SHIPPED[0])
    log = [
        SetCover(at=AT, user_id=USER, cover=-80 * ONE, after_seq=0),
        *opened(closes, 4, bankruptcy=worse(closes, 10) * ONE, cross=True),
        MarkPrice(at=AT, price=1000),
        *waiting(closes, (2, 4)),
        closing(closes, 4),
    ]
    for command in log:
        loaded = Matcher.load(SHIPPED[0], loaded.dump())
        events = told.apply(command)
        assert list(map(encode, loaded.apply(command))) == list(map(encode, events))
    assert end_of(events) == (Expired, "MARGIN_AT_MARK", 0)


@WAYS
def test_a_mark_is_live_to_the_last_millisecond(closes: Side) -> None:
    terms = SetTerms(at=AT, user_id=USER, leverage=10, maintenance=20_000)
    lasts = int(MARK_AGE_MAX.total_seconds() * 1000)
    for at, end in ((AT + lasts, (Filled, "", 4)), (AT + lasts + 1, (Rejected, "MARK_PRICE_UNAVAILABLE", 0))):
        order = new(300, closes, 1000, 4, user_id=USER, at=at)
        assert end_of(run([terms, MarkPrice(at=AT, price=1000), *waiting(closes, (0, 4)), order])) == end


@WAYS
def test_fill_or_kill_counts_on_every_reduce_only_order_that_fits_the_position(closes: Side) -> None:
    account = opened(closes, 8, bankruptcy=worse(closes, 10) * ONE, cross=False)
    reducing = [new(n, closes, 1000, 4, user_id=USER, reduce_only=True) for n in (200, 201)]
    order = new(300, OPPOSITE[closes], 1000, 8, time_in_force="FOK")
    assert end_of(run([*account, *reducing, order])) == (Filled, "", 8)

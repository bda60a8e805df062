"""A position that is due for liquidation does not grow: the guard of what opens on its side."""

from typing import Any

import pytest

from domain.instruments import SHIPPED
from domain.matching import AnyEvent, Cancelled, Expired, MarkPrice, SetCover, SetTerms, Side, Trade
from engine.matcher import Matcher
from tests.engine_commands import AT, new

OPPOSITE: dict[Side, Side] = {"BUY": "SELL", "SELL": "BUY"}
SIDES = pytest.mark.parametrize("side", ["BUY", "SELL"])
MARK, LEVERAGE, MAINTENANCE = 600_000, 100, 5_000
A, B = 1, 2


class Book:
    """A book in which user A trades on terms (100x, maintenance 0.5 %) and B has none."""

    def __init__(self, *, cross: bool = False) -> None:
        self.matcher = Matcher(SHIPPED[0])
        self.orders = 10
        self.say_mark(MARK)
        terms = SetTerms(at=AT, user_id=A, leverage=LEVERAGE, maintenance=MAINTENANCE, cross=cross, bankruptcy=0)
        self.matcher.apply(terms)

    def say_mark(self, price: int) -> None:
        self.matcher.apply(MarkPrice(at=AT, price=price))

    def send(self, user: int, side: Side, quantity: int, price: int, **terms: Any) -> list[AnyEvent]:
        self.orders += 1
        return self.matcher.apply(new(self.orders, side, price, quantity, user_id=user, **terms))

    def trade(self, side: Side, quantity: int, price: int) -> list[AnyEvent]:
        """A takes what B offers."""
        self.send(B, OPPOSITE[side], quantity, price)
        return self.send(A, side, quantity, price, time_in_force="IOC")

    @property
    def position(self) -> int:
        return self.matcher.book.accounts[A].position


def reasons(events: list[AnyEvent]) -> list[str]:
    return [event.reason for event in events if isinstance(event, Cancelled | Expired) and event.reason]


def due_at(side: Side) -> int:
    """The mark at which 1 % of margin is down to less than 0.5 % of the mark: equity 2,980 of 2,985 for a long."""
    return MARK - 3_020 if side == "BUY" else MARK + 2_986


@SIDES
def test_what_is_due_does_not_grow_and_what_is_not_does(side: Side) -> None:
    book, sign = Book(), 1 if side == "BUY" else -1
    book.trade(side, 100, MARK)
    # A tick before, it is not due.
    book.say_mark(due_at(side) + sign * 10)
    book.trade(side, 1, due_at(side) + sign * 10)
    assert book.position == sign * 101
    # The lot that was added has all its margin, so that it takes some ticks more.
    book.say_mark(due_at(side) - sign * 50)
    assert reasons(book.trade(side, 1, due_at(side) - sign * 50)) == ["MARGIN_AT_MARK"]
    assert book.position == sign * 101


@SIDES
def test_a_maker_that_would_let_it_grow_is_cancelled(side: Side) -> None:
    book, sign = Book(), 1 if side == "BUY" else -1
    book.trade(side, 100, MARK)
    price = due_at(side) - sign * 10
    book.send(A, side, 5, price)
    book.say_mark(price)
    events = book.send(B, OPPOSITE[side], 5, price, time_in_force="IOC")
    assert [type(event) for event in events if isinstance(event, Trade)] == []
    assert "MARGIN_AT_MARK" in reasons(events)
    assert book.position == sign * 100


@SIDES
def test_what_is_due_may_be_closed_and_turned(side: Side) -> None:
    book, sign = Book(), 1 if side == "BUY" else -1
    book.trade(side, 100, MARK)
    price = due_at(side) - sign * 10
    book.say_mark(price)
    assert reasons(book.trade(OPPOSITE[side], 130, price)) == []
    assert book.position == -sign * 30


@SIDES
@pytest.mark.parametrize("is_covered", [True, False])
def test_a_cross_account_is_due_by_all_that_covers_the_position(side: Side, is_covered: bool) -> None:
    book, sign = Book(cross=True), 1 if side == "BUY" else -1
    book.trade(side, 100, MARK)
    price = due_at(side) - sign * 10
    book.say_mark(price)
    if is_covered:
        book.matcher.apply(SetCover(at=AT, user_id=A, cover=100 * 20 * 1_000_000, after_seq=1_000))
    assert reasons(book.trade(side, 1, price)) == ([] if is_covered else ["MARGIN_AT_MARK"])
    assert book.position == sign * (101 if is_covered else 100)


@pytest.mark.parametrize(("price", "sold"), [(598_050, 1), (598_049, 0)])
def test_a_sale_is_backed_at_its_basis_less_the_fee_of_what_is_above_that(price: int, sold: int) -> None:
    # 1 % of 500,000, less 0.05 % of the 100,000 above: 4,950 of the 603,000 that 600,000 and its maintenance are.
    book = Book()
    book.send(B, "BUY", 1, price)
    events = book.send(A, "SELL", 1, price, basis=500_000, time_in_force="IOC")
    assert reasons(events) == ([] if sold else ["MARGIN_AT_MARK"])
    assert book.position == -sold


@pytest.mark.parametrize(("price", "bought"), [(600_500, 1), (600_501, 0)])
def test_a_purchase_is_backed_up_to_its_basis(price: int, bought: int) -> None:
    book = Book()
    book.send(B, "SELL", 1, price)
    events = book.send(A, "BUY", 1, price, basis=600_500, time_in_force="IOC")
    assert reasons(events) == ([] if bought else ["MARGIN_AT_MARK"])
    assert book.position == bought

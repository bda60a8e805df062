"""What a fill does to a position, and the laws over all users together."""

from collections import defaultdict
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from domain.margin import unrealized_pnl
from domain.positions import Position, apply_fill

PRICES = st.decimals("0.1", 200_000, places=1)
QUANTITIES = st.decimals("0.001", 100, places=3)
USERS = st.integers(1, 4)
TRADES = st.lists(
    st.tuples(USERS, USERS, QUANTITIES, PRICES).filter(lambda trade: trade[0] != trade[1]), min_size=1, max_size=30
)


def position(quantity: str, notional: str) -> Position:
    return Position(Decimal(quantity), Decimal(notional))


@pytest.mark.parametrize(
    ("before", "quantity", "price", "after", "pnl", "kind"),
    [
        (position("0", "0"), "2", "100", position("2", "200"), "0", "OPEN"),
        (position("0", "0"), "-2", "100", position("-2", "200"), "0", "OPEN"),
        (position("2", "200"), "1", "130", position("3", "330"), "0", "ADD"),
        (position("-2", "200"), "-1", "130", position("-3", "330"), "0", "ADD"),
        (position("4", "400"), "-1", "110", position("3", "300"), "10", "REDUCE"),
        (position("-4", "400"), "1", "110", position("-3", "300"), "-10", "REDUCE"),
        (position("3", "100"), "-1", "30", position("2", "66.66666667"), "-3.33333333", "REDUCE"),
        (position("4", "400"), "-4", "90", position("0", "0"), "-40", "CLOSE"),
        (position("-4", "400"), "4", "90", position("0", "0"), "40", "CLOSE"),
        (position("4", "400"), "-6", "90", position("-2", "180"), "-40", "FLIP"),
        (position("-4", "400"), "6", "90", position("2", "180"), "40", "FLIP"),
    ],
)
def test_a_fill_opens_adds_reduces_closes_or_flips(
    before: Position, quantity: str, price: str, after: Position, pnl: str, kind: str
) -> None:
    fill = apply_fill(before, Decimal(quantity), Decimal(price))
    assert (fill.position, fill.realized_pnl, fill.kind) == (after, Decimal(pnl), kind)


def test_entry_price_is_the_weighted_average() -> None:
    opened = apply_fill(Position(), Decimal(1), Decimal(100)).position
    added = apply_fill(opened, Decimal(3), Decimal(120)).position
    assert added.entry_price == Decimal(115)
    assert apply_fill(added, Decimal(-2), Decimal(500)).position.entry_price == Decimal(115)


@pytest.mark.parametrize(("quantity", "side"), [("1", "LONG"), ("-1", "SHORT"), ("0", None)])
def test_a_side_is_long_short_or_none(quantity: str, side: str | None) -> None:
    held = position(quantity, "100" if side else "0")
    assert held.side == side
    assert held.entry_price == (100 if side else None)
    assert held.signed_notional == Decimal(quantity) * 100


@given(TRADES, PRICES)
def test_whatever_is_traded_users_together_neither_win_nor_lose(
    trades: list[tuple[int, int, Decimal, Decimal]], mark: Decimal
) -> None:
    positions: defaultdict[int, Position] = defaultdict(Position)
    realized = Decimal(0)
    for buyer, seller, quantity, price in trades:
        for user, signed in ((buyer, quantity), (seller, -quantity)):
            fill = apply_fill(positions[user], signed, price)
            assert fill.position.entry_notional >= 0
            realized += fill.realized_pnl
            positions[user] = fill.position
    unrealized = sum(unrealized_pnl(p.signed_quantity, p.entry_notional, mark) for p in positions.values())
    assert realized + unrealized == 0
    assert sum(p.signed_quantity for p in positions.values()) == 0


@given(st.lists(st.tuples(QUANTITIES, PRICES), min_size=1, max_size=10), PRICES, st.sampled_from([1, -1]))
def test_closing_releases_everything_and_realises_all_of_the_profit(
    fills: list[tuple[Decimal, Decimal]], exit_price: Decimal, side: int
) -> None:
    held = Position()
    for quantity, price in fills:
        held = apply_fill(held, side * quantity, price).position
    expected = unrealized_pnl(held.signed_quantity, held.entry_notional, exit_price)
    closed = apply_fill(held, -held.signed_quantity, exit_price)
    assert closed.position == Position()
    assert closed.realized_pnl == expected


@given(QUANTITIES, QUANTITIES, PRICES, PRICES, st.sampled_from([1, -1]))
def test_a_flip_is_a_close_and_an_opening(
    size: Decimal, beyond: Decimal, entry: Decimal, price: Decimal, side: int
) -> None:
    held = apply_fill(Position(), side * size, entry).position
    flipped = apply_fill(held, -side * (size + beyond), price)
    closed = apply_fill(held, -side * size, price)
    assert flipped.realized_pnl == closed.realized_pnl
    assert flipped.position == Position(-side * beyond, beyond * price)

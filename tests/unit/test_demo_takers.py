"""Taker orders behind trades."""

from demo.messages import Side, Trade
from demo.takers import TakerOrder, capped, limit_price, taker_orders, with_backlog


def trade(moment: int, side: Side, price: int, lots: int) -> Trade:
    return Trade(0, moment, side, price, lots)


def test_trades_of_one_moment_and_side_were_one_order_at_its_worst_price() -> None:
    trades = [trade(1, "BUY", 100, 2), trade(1, "BUY", 102, 3), trade(1, "SELL", 99, 1), trade(2, "SELL", 97, 4)]
    assert taker_orders(trades) == [TakerOrder("BUY", 5, 102), TakerOrder("SELL", 1, 99), TakerOrder("SELL", 4, 97)]


def test_too_many_orders_become_one_per_side_in_the_order_of_their_last_trades() -> None:
    trades = [trade(1, "SELL", 99, 1), trade(2, "BUY", 100, 2), trade(3, "SELL", 98, 4)]
    assert taker_orders(trades, orders_max=2) == [TakerOrder("BUY", 2, 100), TakerOrder("SELL", 5, 98)]


def test_no_trades_no_orders() -> None:
    assert taker_orders([]) == taker_orders([], orders_max=0) == []


def test_the_backlog_comes_first_at_the_opposite_best_price() -> None:
    order = TakerOrder("BUY", 1, 90)
    assert with_backlog([order], {"BUY": 0, "SELL": 7}, {"BUY": 101, "SELL": 100}) == [
        TakerOrder("SELL", 7, 100),
        order,
    ]


def test_orders_beyond_the_cap_are_cut() -> None:
    orders = [TakerOrder("BUY", 4, 9), TakerOrder("SELL", 4, 8), TakerOrder("BUY", 1, 9)]
    assert capped(orders, 6) == [TakerOrder("BUY", 4, 9), TakerOrder("SELL", 2, 8)]
    assert capped(orders, 9) == orders


def test_limits_lie_beyond_the_price_on_the_takers_side() -> None:
    assert limit_price(TakerOrder("BUY", 1, 100), 5) == 105
    assert limit_price(TakerOrder("SELL", 1, 100), 5) == 95

"""The public depth is what rests in the engine's book."""

from collections import Counter

import pytest

from domain.instruments import SHIPPED
from domain.matching import Cancelled, Expired, Filled, Placed, Rejected, Side, Trade
from market.depth import DepthBook
from tests.engine_commands import AT, any_commands, random_commands
from tests.reference_book import ReferenceMatcher


def placed(order_id: int, side: Side, price: int, quantity: int) -> Placed:
    return Placed(at=AT, order_id=order_id, user_id=1, side=side, price=price, quantity=quantity)


def trade(maker_order_id: int, price: int, quantity: int, maker_remaining: int) -> Trade:
    return Trade(
        at=AT,
        trade_id=1,
        price=price,
        quantity=quantity,
        taker_side="SELL",
        maker_order_id=maker_order_id,
        maker_user_id=1,
        maker_remaining=maker_remaining,
        maker_fee=0,
        taker_order_id=99,
        taker_user_id=2,
        taker_remaining=0,
        taker_fee=0,
        taker_price=price,
        taker_liquidation=False,
    )


@pytest.mark.parametrize("seed", range(20))
def test_depth_equals_the_resting_orders_after_every_command(seed: int) -> None:
    matcher, book = ReferenceMatcher(SHIPPED[0]), DepthBook()
    for command in random_commands(300, seed) + any_commands(300, seed):
        for event in matcher.apply(command):
            book.apply(event)
        for side, levels in (("BUY", book.bids), ("SELL", book.asks)):
            resting: Counter[int] = Counter()
            for order in matcher.resting:
                if order.new.side == side:
                    resting[order.price] += order.remaining
            assert levels == resting


def test_a_trade_takes_from_its_maker_and_the_last_lot_ends_the_level() -> None:
    book = DepthBook()
    book.apply(placed(1, "BUY", 100, 5))
    book.apply(trade(1, 100, 3, maker_remaining=2))
    assert book.bids == {100: 2}
    book.apply(trade(1, 100, 2, maker_remaining=0))
    book.apply(Filled(at=AT, order_id=1, user_id=1))
    assert book.bids == {}
    assert book.changed_bids == {100}


@pytest.mark.parametrize("kind", [Expired, Cancelled, Rejected])
def test_the_end_of_an_order_that_never_rested_changes_nothing(
    kind: type[Expired] | type[Cancelled] | type[Rejected],
) -> None:
    book = DepthBook()
    book.apply(placed(1, "SELL", 100, 5))
    book.changed_asks.clear()
    book.apply(kind(at=AT, order_id=2, user_id=1, side="SELL", price=100, quantity=5, reason="X"))
    assert book.asks == {100: 5}
    assert not book.changed_asks


def test_a_trade_with_an_unknown_maker_shows_a_broken_log() -> None:
    with pytest.raises(KeyError):
        DepthBook().apply(trade(7, 100, 1, maker_remaining=0))

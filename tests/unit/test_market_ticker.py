"""The 24 h ticker is that of a slow recomputation from all trades, at the edges of the window and after restarts."""

import itertools
from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from domain.instruments import SHIPPED
from domain.matching import Trade
from domain.money import plain
from market.instrument_market import InstrumentMarket
from tests.unit.test_market_depth import placed

INSTRUMENT = SHIPPED[0]
DAY_MS = 24 * 3_600_000
START = 1_700_000_000_000


def recomputed(trades: list[Trade], now_ms: int) -> dict[str, str | None]:
    """Those of the seconds that began less than 24 hours before the second of `now_ms`, each looked at again."""
    first_second = now_ms // 1000 - DAY_MS // 1000 + 1
    inside = [trade for trade in trades if trade.at // 1000 >= first_second]
    # In the order of their seconds, and within one in the order of the log.
    opening = min(inside, key=lambda trade: trade.at // 1000, default=None)
    return {
        "lastPrice": _price(trades[-1].price) if trades else None,
        "volume24h": plain(INSTRUMENT.lots_to_quantity(sum(trade.quantity for trade in inside))),
        "high24h": _price(max(trade.price for trade in inside)) if inside else None,
        "low24h": _price(min(trade.price for trade in inside)) if inside else None,
        "priceChange24h": _price(trades[-1].price - opening.price) if opening else None,
    }


def _price(ticks: int) -> str:
    return plain(INSTRUMENT.ticks_to_price(ticks))


def trade(trade_id: int, at: int, price: int, lots: int) -> Trade:
    return Trade(at, trade_id, price, lots, "SELL", 1, 1, 1, 0, 2, 2, 0, 0, price, taker_liquidation=False)


# Steps around the seconds, and around the day after which a trade leaves.
PASSED = st.sampled_from(
    [0, 1, 999, 1_000, 1_001, 3_600_000, DAY_MS - 1_001, DAY_MS - 1_000, DAY_MS - 999, DAY_MS - 1, DAY_MS, DAY_MS + 1]
)
TRADES = st.lists(st.tuples(st.integers(0, 2_000), st.integers(90, 110), st.integers(1, 9)), max_size=4)


@given(st.lists(st.tuples(PASSED, TRADES, st.booleans()), max_size=20))
def test_the_ticker_equals_a_recomputation_at_every_moment(
    steps: list[tuple[int, list[tuple[int, int, int]], bool]],
) -> None:
    market, now, trades, ids = InstrumentMarket(INSTRUMENT), START, list[Trade](), itertools.count(1)
    market.apply(1, [placed(1, "BUY", 100, 1_000_000)])
    for passed, new, is_restart in steps:
        now += passed
        # A trade carries the time of its order, which may be a little ago.
        fresh = [trade(next(ids), now - age, price, lots) for age, price, lots in new]
        trades += fresh
        market.apply(market.seq + 1, fresh)
        if is_restart:
            market = InstrumentMarket.load(INSTRUMENT, market.dump())
        else:
            market.break_chains()
        shown: dict[str, Any] = msgspec.json.decode(
            market.take_publication(now).keys[f"market:ticker:{INSTRUMENT.instrument_id}"]
        )["data"]
        expected = recomputed(trades, now)
        assert {name: shown[name] for name in expected} == expected

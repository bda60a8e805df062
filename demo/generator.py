"""A market out of a seed: the same kind of messages as a recording has, drawn from what was measured on one."""

import random
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count

from demo.messages import Diff, Levels, Message, Side, Snapshot, Trade

# Shares of all samples below which a quantile lies.
SHARES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 1.0)
STEP_NANOSECONDS = 100_000_000
LEVELS = 25

Quantiles = tuple[float, ...]


@dataclass(frozen=True)
class Calibration:
    """A market in numbers, by steps of STEP_NANOSECONDS. Quantiles are at SHARES; prices in ticks, sizes in lots.

    Levels are the best LEVELS of each side; a level behind the best one is `gap` ticks away from the one before it.
    """

    first_bid: int
    orders_per_step: Quantiles
    order_lots: Quantiles
    moving_steps: float
    move_ticks: Quantiles
    spread_ticks: Quantiles
    best_lots: Quantiles
    level_lots: Quantiles
    gap_ticks: Quantiles
    changing_levels: float


# `python -m demo.calibrate` on 344.8 s of Binance's BTCUSDT perpetual, 2024-08-08 23:54 UTC, in ticks of 0.1 USDT and
# lots of 0.001 BTC: the book once every STEP_NANOSECONDS, and the orders behind the trades in between.
BTCUSDT_20240808 = Calibration(
    first_bid=618_002,
    orders_per_step=(0, 0, 0, 1, 2, 3, 5, 8, 14, 23, 50, 106),
    order_lots=(1, 2, 7, 30, 136, 663, 1491, 3620, 7257, 12_060, 46_000, 69_718),
    moving_steps=0.1132,
    move_ticks=(1, 6, 14, 29, 52, 82, 108, 172, 315, 533, 674, 674),
    spread_ticks=(1, 1, 1, 1, 1, 1, 1, 1, 1, 4, 29, 78),
    best_lots=(1, 390, 1340, 3131, 4771, 7070, 9787, 12_371, 17_886, 20_277, 80_669, 146_535),
    level_lots=(1, 2, 3, 50, 158, 567, 1146, 3033, 5090, 10_868, 17_292, 473_685),
    gap_ticks=(1, 1, 1, 2, 5, 8, 11, 15, 19, 20, 22, 631),
    changing_levels=0.1033,
)


def quantile(quantiles: Quantiles, share: float) -> float:
    """The value below which `share` of the samples lie, between the quantiles at SHARES.

    Interpolated by ratio, by difference from 0 up: sizes have long tails, which straight lines would make too heavy.
    """
    upper = min(bisect_right(SHARES, share), len(SHARES) - 1)
    weight = (share - SHARES[upper - 1]) / (SHARES[upper] - SHARES[upper - 1])
    low, high = quantiles[upper - 1], quantiles[upper]
    return low * (high / low) ** weight if low > 0 else high * weight


def generate(calibration: Calibration, seed: int) -> Iterator[Message]:
    """An endless market that starts with a snapshot; the same seed gives the same one."""
    market = _Generator(calibration, random.Random(seed))
    yield market.snapshot()
    for step in count(1):
        yield from market.step(step)


class _Generator:
    def __init__(self, calibration: Calibration, draws: random.Random) -> None:
        self._calibration = calibration
        self._draws = draws
        self._best_bid = calibration.first_bid
        self._best_ask = calibration.first_bid + max(1, self._draw(calibration.spread_ticks))
        self._bids = self._next_levels({}, self._best_bid, -1)
        self._asks = self._next_levels({}, self._best_ask, 1)

    def snapshot(self) -> Snapshot:
        return Snapshot(0, 0, tuple(self._bids.items()), tuple(self._asks.items()))

    def step(self, number: int) -> Iterator[Message]:
        """Orders trade at the best prices, then the book changes."""
        at = (number - 1) * STEP_NANOSECONDS
        orders = self._draw(self._calibration.orders_per_step)
        for order in range(orders):
            # Each in a moment of its own where there are enough of them, as those of one moment are one order.
            yield self._trade(at + (order + 1) * STEP_NANOSECONDS // (orders + 1))
        self._move()
        bids = self._next_levels(self._bids, self._best_bid, -1)
        asks = self._next_levels(self._asks, self._best_ask, 1)
        yield Diff(
            number * STEP_NANOSECONDS, number - 1, number, _changes(self._bids, bids), _changes(self._asks, asks)
        )
        self._bids, self._asks = bids, asks

    def _trade(self, at: int) -> Trade:
        side: Side = self._draws.choice(("BUY", "SELL"))
        price = self._best_ask if side == "BUY" else self._best_bid
        return Trade(at, at // 1_000_000, side, price, max(1, self._draw(self._calibration.order_lots)))

    def _move(self) -> None:
        if self._draws.random() < self._calibration.moving_steps:
            ticks = max(1, self._draw(self._calibration.move_ticks))
            self._best_bid += self._draws.choice((-ticks, ticks))
        self._best_ask = self._best_bid + max(1, self._draw(self._calibration.spread_ticks))

    def _next_levels(self, levels: dict[int, int], best: int, outwards: int) -> dict[int, int]:
        """A side that starts at `best`. Old levels stay; new ones fill the room before the first and after the last."""
        old = [price for price in levels if (price - best) * outwards > 0]
        prices = [best]
        while len(prices) < LEVELS:
            price = prices[-1] + outwards * max(1, self._draw(self._calibration.gap_ticks))
            if old and (prices[-1] in levels or (old[0] - price) * outwards <= 0):
                price = old[0]
            if old and price == old[0]:
                old.pop(0)
            prices.append(price)
        lots = self._calibration.level_lots
        return {best: self._lots(levels.get(best), self._calibration.best_lots)} | {
            price: self._lots(levels.get(price), lots) for price in prices[1:]
        }

    def _lots(self, present: int | None, quantiles: Quantiles) -> int:
        if present is not None and self._draws.random() >= self._calibration.changing_levels:
            return present
        return max(1, self._draw(quantiles))

    def _draw(self, quantiles: Quantiles) -> int:
        return round(quantile(quantiles, self._draws.random()))


def _changes(old: dict[int, int], new: dict[int, int]) -> Levels:
    gone: Iterable[tuple[int, int]] = ((price, 0) for price in old if price not in new)
    return (*gone, *((price, lots) for price, lots in new.items() if old.get(price) != lots))

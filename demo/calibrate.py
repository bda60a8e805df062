"""`python -m demo.calibrate FILE`: measures a recording of BTC-USDT and prints the numbers the generator draws from."""

import pprint
import sys
from collections.abc import Iterable, Sequence
from decimal import Decimal
from itertools import pairwise
from pathlib import Path

from demo.book import ReplayedBook
from demo.generator import LEVELS, SHARES, STEP_NANOSECONDS, Calibration, Quantiles
from demo.messages import Levels, Message, RecordingError, Steps, Trade, read_recording
from demo.takers import taker_orders

BTC_STEPS = Steps(Decimal("0.1"), Decimal("0.001"))


def measure(messages: Iterable[Message]) -> Calibration:
    """The numbers of a market, sampled at the end of every step in which its book is known. Needs two steps."""
    samples = _Samples()
    book = ReplayedBook()
    step_end: int | None = None
    trades: list[Trade] = []
    for message in messages:
        while step_end is not None and message.at > step_end:
            samples.take(book, trades)
            trades = []
            step_end += STEP_NANOSECONDS
        book.apply(message)
        if isinstance(message, Trade):
            trades.append(message)
        if step_end is None and book.ready:
            samples.take(book, [])
            trades = []
            step_end = message.at + STEP_NANOSECONDS
    return samples.calibration()


class _Samples:
    def __init__(self) -> None:
        self._orders: list[int] = []
        self._order_lots: list[int] = []
        self._bids: list[int] = []
        self._spreads: list[int] = []
        self._best_lots: list[int] = []
        self._level_lots: list[int] = []
        self._gaps: list[int] = []
        self._kept = 0
        self._changed = 0
        self._last: tuple[Levels, Levels] = ((), ())

    def take(self, book: ReplayedBook, trades: Sequence[Trade]) -> None:
        if not book.ready:
            return
        orders = taker_orders(trades, orders_max=sys.maxsize)
        self._orders.append(len(orders))
        self._order_lots += [order.lots for order in orders]
        self._bids.append(book.best_bid)
        self._spreads.append(book.best_ask - book.best_bid)
        sides = book.bids(LEVELS), book.asks(LEVELS)
        for levels, before in zip(sides, self._last, strict=True):
            self._take_side(levels, dict(before))
        self._last = sides

    def calibration(self) -> Calibration:
        moves = [abs(after - before) for before, after in pairwise(self._bids)]
        return Calibration(
            first_bid=self._bids[0],
            orders_per_step=_quantiles(self._orders[1:]),
            order_lots=_quantiles(self._order_lots),
            moving_steps=round(sum(map(bool, moves)) / len(moves), 4),
            move_ticks=_quantiles([move for move in moves if move]),
            spread_ticks=_quantiles(self._spreads),
            best_lots=_quantiles(self._best_lots),
            level_lots=_quantiles(self._level_lots),
            gap_ticks=_quantiles(self._gaps),
            changing_levels=round(self._changed / (self._changed + self._kept), 4),
        )

    def _take_side(self, levels: Levels, before: dict[int, int]) -> None:
        self._best_lots.append(levels[0][1])
        self._level_lots += [lots for _, lots in levels[1:]]
        self._gaps += [abs(price - nearer) for (nearer, _), (price, _) in pairwise(levels)]
        kept = [before[price] == lots for price, lots in levels if price in before]
        self._kept += sum(kept)
        self._changed += len(kept) - sum(kept)


def _quantiles(samples: Sequence[int]) -> Quantiles:
    ordered = sorted(samples)
    return (
        tuple(float(ordered[round(share * (len(ordered) - 1))]) for share in SHARES)
        if ordered
        else (0.0,) * len(SHARES)
    )


def main() -> int:
    """Print the numbers of the named file: 0, or 2 with one line on stderr."""
    if len(sys.argv) != 2:
        print("usage: python -m demo.calibrate FILE", file=sys.stderr)
        return 2
    try:
        pprint.pp(measure(read_recording(Path(sys.argv[1]), BTC_STEPS)), width=110)
    except RecordingError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Trading statistics of the last 24 hours: exact sums over a window that moves in steps of one second."""

from collections.abc import Mapping

import msgspec
from sortedcontainers import SortedDict

WINDOW_SECONDS = 24 * 3600


class Second(msgspec.Struct, array_like=True, gc=False):
    """What was traded within one second of Unix time."""

    open: int
    high: int
    low: int
    lots: int


class RollingDay:
    """Prices in ticks, `lots` traded; `open`, `high` and `low` are None while nothing was traded.

    `seconds`, by number since 1970, are those with trades; the rest follows from them.
    """

    def __init__(self, seconds: Mapping[int, Second] | None = None) -> None:
        self.seconds: SortedDict[int, Second] = SortedDict(seconds or {})
        self.lots = sum(second.lots for second in self.seconds.values())
        self.high: int | None = None
        self.low: int | None = None
        self._find_extremes()

    @property
    def open(self) -> int | None:
        """Price of the first trade in the window."""
        return self.seconds.peekitem(0)[1].open if self.seconds else None

    def add(self, at_ms: int, price: int, lots: int) -> None:
        """Count a trade at Unix milliseconds `at_ms`. Trades may come a little out of order."""
        number = at_ms // 1000
        newest = max(number, self.seconds.peekitem(-1)[0]) if self.seconds else number
        if number <= newest - WINDOW_SECONDS:
            return
        # Forgetting as it goes bounds the memory of a replay that is longer than the window.
        self.expire(newest * 1000)
        second = self.seconds.get(number)
        if second is None:
            self.seconds[number] = Second(price, price, price, lots)
        else:
            second.high = max(second.high, price)
            second.low = min(second.low, price)
            second.lots += lots
        self.lots += lots
        self.high = price if self.high is None else max(self.high, price)
        self.low = price if self.low is None else min(self.low, price)

    def expire(self, now_ms: int) -> None:
        """Forget the seconds that ended 24 hours or more before `now_ms`."""
        oldest = now_ms // 1000 - WINDOW_SECONDS
        gone = []
        while self.seconds and self.seconds.peekitem(0)[0] <= oldest:
            gone.append(self.seconds.popitem(0)[1])
        self.lots -= sum(second.lots for second in gone)
        if any(second.high == self.high or second.low == self.low for second in gone):
            self._find_extremes()

    def _find_extremes(self) -> None:
        self.high = max((second.high for second in self.seconds.values()), default=None)
        self.low = min((second.low for second in self.seconds.values()), default=None)

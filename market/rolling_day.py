"""Trading statistics of the last 24 hours: exact sums over a window that moves in steps of one second."""

from dataclasses import dataclass

from sortedcontainers import SortedDict

WINDOW_SECONDS = 24 * 3600


@dataclass(slots=True)
class _Second:
    open: int
    high: int
    low: int
    lots: int


class RollingDay:
    """Prices in ticks, `lots` traded; `open`, `high` and `low` are None while nothing was traded."""

    def __init__(self) -> None:
        self._seconds: SortedDict[int, _Second] = SortedDict()
        self.lots = 0
        self.high: int | None = None
        self.low: int | None = None

    @property
    def open(self) -> int | None:
        """Price of the first trade in the window."""
        return self._seconds.peekitem(0)[1].open if self._seconds else None

    def add(self, at_ms: int, price: int, lots: int) -> None:
        """Count a trade at Unix milliseconds `at_ms`. Trades may come a little out of order."""
        number = at_ms // 1000
        newest = max(number, self._seconds.peekitem(-1)[0]) if self._seconds else number
        if number <= newest - WINDOW_SECONDS:
            return
        # Forgetting as it goes bounds the memory of a replay that is longer than the window.
        self.expire(newest * 1000)
        second = self._seconds.get(number)
        if second is None:
            self._seconds[number] = _Second(price, price, price, lots)
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
        while self._seconds and self._seconds.peekitem(0)[0] <= oldest:
            gone.append(self._seconds.popitem(0)[1])
        self.lots -= sum(second.lots for second in gone)
        if any(second.high == self.high or second.low == self.low for second in gone):
            self.high = max((second.high for second in self._seconds.values()), default=None)
            self.low = min((second.low for second in self._seconds.values()), default=None)

"""What a run has done so far, counted."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

PERCENTILES = (50, 90, 99)


class Latencies:
    """Durations in seconds and their percentiles."""

    def __init__(self) -> None:
        self._seconds: list[float] = []

    def __len__(self) -> int:
        return len(self._seconds)

    def add(self, seconds: float) -> None:
        """Take in one more."""
        self._seconds.append(seconds)

    def milliseconds(self, percentiles: Sequence[int] = PERCENTILES) -> list[float]:
        """Percentiles by nearest rank and last the maximum, in ms; nothing while there are none."""
        ordered = sorted(self._seconds)
        if not ordered:
            return []
        ranks = [-(-len(ordered) * percent // 100) - 1 for percent in percentiles]
        return [1000 * ordered[rank] for rank in (*ranks, -1)]


@dataclass(slots=True)
class Market:
    """Where the two markets stand: prices in ticks, volume in lots; None while unknown."""

    bid: int | None = None
    ask: int | None = None
    last: int | None = None
    volume: int = 0

    @property
    def spread(self) -> int | None:
        """Ticks; None while a side is empty."""
        return None if self.bid is None or self.ask is None else self.ask - self.bid


@dataclass(slots=True)
class Tally:
    """Counts of the run; `ours` is the exchange, `theirs` the market that is replayed."""

    seconds: float = 0.0
    quotes: int = 0
    amended: int = 0
    cancels: int = 0
    takers: int = 0
    trades: int = 0
    refusals: Counter[str] = field(default_factory=Counter)
    answered: Latencies = field(default_factory=Latencies)
    placed: Latencies = field(default_factory=Latencies)
    filled: Latencies = field(default_factory=Latencies)
    ours: Market = field(default_factory=Market)
    theirs: Market = field(default_factory=Market)
    open_quotes: int = 0
    turns: int = 0

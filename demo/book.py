"""The order book of the market that is replayed, rebuilt from its messages."""

from collections.abc import Iterable

from sortedcontainers import SortedDict

from demo.messages import BestQuotes, Diff, Levels, Message, Snapshot, Trade


class ReplayedBook:
    """Ready from a snapshot on until an update is missing; then from the next snapshot on. Ready, it never crosses."""

    def __init__(self) -> None:
        self.ready = False
        self._bids = SortedDict()
        self._asks = SortedDict()
        self._last_id = 0
        # Updates end anywhere around the snapshot: only from the second one on does each name the one before.
        self._is_chained = False
        self._waiting: list[Diff] = []
        self._best: BestQuotes | None = None

    def apply(self, message: Message) -> None:
        """Take in the next message. Trades change nothing here: what they took, the next update shows."""
        match message:
            case Snapshot():
                self._start(message)
            case Diff():
                self._follow(message)
            case BestQuotes():
                self._best = message
            case Trade():
                return
        if self.ready:
            self._trim()

    @property
    def best_bid(self) -> int:
        """Ticks; the book has to be ready."""
        return int(self._bids.peekitem(-1)[0])

    @property
    def best_ask(self) -> int:
        """Ticks; the book has to be ready."""
        return int(self._asks.peekitem(0)[0])

    def bids(self, count: int) -> Levels:
        """The best `count` levels, best first."""
        prices = self._bids.islice(max(0, len(self._bids) - count), reverse=True)
        return tuple((price, self._bids[price]) for price in prices)

    def asks(self, count: int) -> Levels:
        """The best `count` levels, best first."""
        return tuple((price, self._asks[price]) for price in self._asks.islice(0, count))

    def _start(self, snapshot: Snapshot) -> None:
        self._bids, self._asks = SortedDict(snapshot.bids), SortedDict(snapshot.asks)
        self._last_id, self._is_chained, self.ready = snapshot.last_id, False, True
        waiting, self._waiting = self._waiting, []
        for diff in waiting:
            self._follow(diff)

    def _follow(self, diff: Diff) -> None:
        if self.ready and diff.last_id <= self._last_id:
            return
        is_next = diff.previous_id == self._last_id if self._is_chained else diff.previous_id <= self._last_id
        self.ready = self.ready and is_next
        if not self.ready:
            self._waiting.append(diff)
            return
        _set_levels(self._bids, diff.bids)
        _set_levels(self._asks, diff.asks)
        self._last_id, self._is_chained = diff.last_id, True

    def _trim(self) -> None:
        # Best quotes come at once, updates of the book a few times a second.
        best = self._best
        if best is not None and best.last_id > self._last_id:
            _set_levels(self._bids, [(price, 0) for price in self._bids.irange(best.bid[0], inclusive=(False, True))])
            _set_levels(self._asks, [(price, 0) for price in self._asks.irange(None, best.ask[0], (True, False))])
            _set_levels(self._bids, [best.bid])
            _set_levels(self._asks, [best.ask])
        self.ready = bool(self._bids and self._asks) and self.best_bid < self.best_ask


def _set_levels(side: SortedDict, levels: Iterable[tuple[int, int]]) -> None:
    for price, lots in levels:
        if lots:
            side[price] = lots
        else:
            side.pop(price, None)

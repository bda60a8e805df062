"""A market's messages by its own time."""

from collections.abc import Iterator

from demo.book import ReplayedBook
from demo.messages import Message, RecordingError, Trade

NANOSECONDS = 1_000_000_000


class Replay:
    """Plays messages as time goes on. Time is in seconds since the book was first known, `seconds` the last one's."""

    def __init__(self, messages: Iterator[Message]) -> None:
        """Plays up to the first known book. Raises RecordingError when there is none."""
        self.book = ReplayedBook()
        self._messages = messages
        self._next: Message | None = None
        self.is_over = False
        self.seconds = 0.0
        for message in messages:
            self.book.apply(message)
            if self.book.ready:
                self._start = message.at
                return
        raise RecordingError("There is no snapshot of the book in it")

    def advance(self, seconds: float) -> list[Trade]:
        """Play what happened up to `seconds`: the trades in it. Sets `is_over` at the last message."""
        until = self._start + round(seconds * NANOSECONDS)
        trades: list[Trade] = []
        while not self.is_over:
            message = self._next or next(self._messages, None)
            self._next = None
            if message is None:
                self.is_over = True
            elif message.at > until:
                self._next = message
                break
            else:
                self.book.apply(message)
                self.seconds = (message.at - self._start) / NANOSECONDS
                if isinstance(message, Trade):
                    trades.append(message)
        return trades

"""What a market tells: order book, trades, best quotes; and the reader of recordings.

A recording has one line `<local nanoseconds> <JSON>` per message as Binance sends it, gzipped or not. Inside,
prices are whole ticks and quantities whole lots of the instrument that is traded.
"""

import gzip
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import IO, Literal, cast

import msgspec

Side = Literal["BUY", "SELL"]
Levels = tuple[tuple[int, int], ...]

_GZIP_MAGIC = b"\x1f\x8b"


class RecordingError(Exception):
    """A recording cannot be used; the message says why in one line."""


@dataclass(frozen=True, slots=True)
class Steps:
    """The steps of an instrument: quote per tick, base per lot."""

    tick: Decimal
    lot: Decimal

    def ticks(self, price: Decimal) -> int:
        """`price` in ticks. Raises RecordingError when it lies between two."""
        return _whole(price, self.tick, "price")

    def lots(self, quantity: Decimal) -> int:
        """`quantity` in lots. Raises RecordingError when it lies between two."""
        return _whole(quantity, self.lot, "quantity")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The whole book: (ticks, lots) per level, up to and including update `last_id`. `at` is in nanoseconds."""

    at: int
    last_id: int
    bids: Levels
    asks: Levels


@dataclass(frozen=True, slots=True)
class Diff:
    """New quantities of levels (0 lots: gone), up to and including update `last_id`, following `previous_id`."""

    at: int
    previous_id: int
    last_id: int
    bids: Levels
    asks: Levels


@dataclass(frozen=True, slots=True)
class Trade:
    """A trade; `side` is the taker's, `exchange_ms` when the market says it was."""

    at: int
    exchange_ms: int
    side: Side
    price: int
    lots: int


@dataclass(frozen=True, slots=True)
class BestQuotes:
    """The best level of either side as of update `last_id`: (ticks, lots)."""

    at: int
    last_id: int
    bid: tuple[int, int]
    ask: tuple[int, int]


Message = Snapshot | Diff | Trade | BestQuotes


class _Diff(msgspec.Struct, tag_field="e", tag="depthUpdate"):
    u: int
    pu: int
    b: list[tuple[Decimal, Decimal]]
    a: list[tuple[Decimal, Decimal]]


class _Trade(msgspec.Struct, tag_field="e", tag="trade"):
    T: int
    p: Decimal
    q: Decimal
    m: bool
    X: str = "MARKET"


class _BestQuotes(msgspec.Struct, tag_field="e", tag="bookTicker"):
    u: int
    b: Decimal
    B: Decimal
    a: Decimal
    A: Decimal


class _Line(msgspec.Struct):
    """A message of a stream has `data`, a snapshot has the other members."""

    data: _Diff | _Trade | _BestQuotes | None = None
    lastUpdateId: int = 0  # noqa: N815, as Binance calls it
    bids: list[tuple[Decimal, Decimal]] = []
    asks: list[tuple[Decimal, Decimal]] = []


_decode = msgspec.json.Decoder(_Line).decode


def read_recording(path: Path, steps: Steps) -> Iterator[Message]:
    """The messages of a recording, in its order. Raises RecordingError, naming the line."""
    try:
        with _open(path) as lines:
            for number, line in enumerate(lines, 1):
                try:
                    message = parse_line(line, steps)
                except (RecordingError, ValueError) as error:
                    raise RecordingError(f"{path}, line {number}: {error}") from None
                if message is not None:
                    yield message
    except (OSError, EOFError, zlib.error) as error:
        raise RecordingError(f"{path} cannot be read: {error}") from None


def parse_line(line: bytes, steps: Steps) -> Message | None:
    """The message of one line; None for a trade that no order made (insurance fund, deleveraging).

    Raises ValueError for what is not of the format, RecordingError for prices or quantities between two steps.
    """
    time, _, document = line.partition(b" ")
    if not time.isdigit():
        raise RecordingError("Expected nanoseconds, a space and a message in JSON")
    at, decoded = int(time), _decode(document)
    match decoded.data:
        case _Diff() as diff:
            return Diff(at, diff.pu, diff.u, _levels(diff.b, steps), _levels(diff.a, steps))
        case _Trade() as trade if trade.X == "MARKET":
            side: Side = "SELL" if trade.m else "BUY"
            return Trade(at, trade.T, side, steps.ticks(trade.p), steps.lots(trade.q))
        case _BestQuotes() as best:
            bid, ask = _levels([(best.b, best.B), (best.a, best.A)], steps)
            return BestQuotes(at, best.u, bid, ask)
        case None:
            return Snapshot(at, decoded.lastUpdateId, _levels(decoded.bids, steps), _levels(decoded.asks, steps))
    return None


def _open(path: Path) -> IO[bytes]:
    with path.open("rb") as file:
        is_gzipped = file.read(2) == _GZIP_MAGIC
    return cast(IO[bytes], gzip.open(path, "rb")) if is_gzipped else path.open("rb")


def _levels(pairs: list[tuple[Decimal, Decimal]], steps: Steps) -> Levels:
    return tuple((steps.ticks(price), steps.lots(quantity)) for price, quantity in pairs)


def _whole(amount: Decimal, step: Decimal, name: str) -> int:
    count, rest = divmod(amount, step)
    if rest:
        raise RecordingError(f"Expected a {name} in steps of {step}, was {amount}")
    return int(count)

"""Recorded prices for the simulated index (`EXCHANGE_INDEX_REPLAY_FILE`).

One JSON object a line, gzipped if the name ends in `.gz`; the order of the lines does not matter:

    {"at": "2024-08-08T00:00:01.250Z", "instrumentId": "BTC-USDT-PERP", "price": "55123.4"}
"""

import gzip
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from decimal import Decimal
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import msgspec

from domain.index_price import is_sane


class RecordedPrice(msgspec.Struct, rename="camel", frozen=True):
    """One line of the file: quote per base."""

    at: datetime
    instrument_id: str
    price: Decimal


class _Track(NamedTuple):
    offsets: Sequence[timedelta]
    prices: Sequence[Decimal]


_decode = msgspec.json.Decoder(RecordedPrice).decode


class Recording:
    """Prices of instruments over time; at least one."""

    def __init__(self, lines: Iterable[RecordedPrice]) -> None:
        ordered = sorted(lines, key=lambda line: (line.instrument_id, line.at))
        start, end = min(line.at for line in ordered), max(line.at for line in ordered)
        self._seconds = end - start
        self._tracks: Mapping[str, _Track] = {
            name: _Track(*zip(*((line.at - start, line.price) for line in track), strict=True))
            for name, track in groupby(ordered, key=lambda line: line.instrument_id)
        }

    def prices(self, elapsed: timedelta) -> dict[str, Decimal]:
        """The prices `elapsed` after the first, each the latest by then (or the first to come); over and over."""
        at = elapsed % self._seconds if self._seconds else timedelta(0)
        return {name: track.prices[max(bisect_right(track.offsets, at) - 1, 0)] for name, track in self._tracks.items()}


def read_recording(file: Path) -> Recording:
    """The recording in `file`. Raises ValueError naming the line that is wrong, and OSError."""
    content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    lines = [_parse(file, number, line) for number, line in enumerate(content.splitlines(), start=1) if line.strip()]
    if not lines:
        raise ValueError(f"{file} holds no prices")
    return Recording(lines)


def _parse(file: Path, number: int, line: bytes) -> RecordedPrice:
    try:
        recorded = _decode(line)
    except msgspec.MsgspecError as error:
        raise ValueError(f"{file}:{number}: {error}") from None
    if recorded.at.tzinfo is None or not is_sane(recorded.price):
        raise ValueError(f"{file}:{number}: Expected a time with its zone and a positive price, was {line!r}")
    return recorded

"""Klines from trades, as a pure rule: what was known, what was traded since, what time it is; out come the changes.

A trade belongs to the bucket of its own time, whenever it is matched. Within a bucket trades count in the order of the
engine's log: `open` is the first of them, `close` the last. A bucket without trades stands flat at the close before it,
from the first trade of the instrument on, without a hole up to the bucket of `now`.

A bucket closes CLOSE_GRACE_MS after its end, trades or not. A trade that comes later still (the engine was down, say)
amends its bucket and the flat ones that follow it; they stay closed. `last_seq` is the newest trade a bucket knows of
(a flat one: that of the bucket its price comes from), and a trade up to there is never counted again.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from itertools import groupby
from typing import NamedTuple

from domain.money import ZERO
from domain.periods import open_time

# A trade becomes visible some time after it was accepted, which is the time it carries.
CLOSE_GRACE_MS = 1_000
# After a long silence, gaps are filled so many buckets at a time.
FILLED_MAX = 1_000


class Traded(NamedTuple):
    """One trade: its number in the engine's log, Unix milliseconds, price in quote per base, quantity in base."""

    seq: int
    at_ms: int
    price: Decimal
    quantity: Decimal


@dataclass(frozen=True, slots=True)
class Kline:
    """One bucket from `open_ms` (Unix milliseconds) on; `volume` in base."""

    open_ms: int
    open: Decimal
    high: Decimal
    low: Decimal
    close: Decimal
    volume: Decimal
    trade_count: int
    last_seq: int
    closed: bool = False


def advance(
    known: Sequence[Kline], trades: Sequence[Traded], period_ms: int, now_ms: int, horizon_ms: int = 0
) -> list[Kline]:
    """The klines that `trades` (in the log's order) and the time `now_ms` add to `known` or change, oldest first.

    `known` has every kline from the oldest that `trades` or `now_ms` can touch up to the newest. Klines before
    `horizon_ms` are not wanted any more, but for the newest, from which the next ones take their price.
    """
    klines = {kline.open_ms: kline for kline in known}
    counted_from = min(horizon_ms, known[-1].open_ms) if known else 0
    _count(klines, [trade for trade in trades if trade.at_ms >= counted_from], period_ms)
    if not klines:
        return []
    newest = max(klines)
    filled_up_to = max(newest, open_time(horizon_ms, period_ms)) + FILLED_MAX * period_ms
    newest = max(newest, min(open_time(now_ms, period_ms), filled_up_to))
    _fill(klines, period_ms, newest, horizon_ms)
    _close(klines, now_ms - period_ms - CLOSE_GRACE_MS)
    before = {kline.open_ms: kline for kline in known}
    return [
        klines[open_ms]
        for open_ms in sorted(klines)
        if klines[open_ms] != before.get(open_ms) and (open_ms >= horizon_ms or open_ms == newest)
    ]


def oldest_touched(known: Sequence[Kline], trades: Iterable[Traded], period_ms: int) -> int | None:
    """From which bucket on `advance` has to know klines beyond `known`; None if it knows enough."""
    times = [trade.at_ms for trade in trades]
    oldest = open_time(min(times), period_ms) if times else None
    return oldest if oldest is not None and (not known or oldest < known[0].open_ms) else None


def _count(klines: dict[int, Kline], trades: Sequence[Traded], period_ms: int) -> None:
    for open_ms, run in groupby(trades, lambda trade: open_time(trade.at_ms, period_ms)):
        kline = klines.get(open_ms)
        new = [trade for trade in run if kline is None or trade.seq > kline.last_seq]
        if new:
            klines[open_ms] = _with(kline, open_ms, new)


def _with(kline: Kline | None, open_ms: int, trades: Sequence[Traded]) -> Kline:
    prices = [trade.price for trade in trades]
    traded = Kline(
        open_ms=open_ms,
        open=prices[0],
        high=max(prices),
        low=min(prices),
        close=prices[-1],
        volume=sum((trade.quantity for trade in trades), ZERO),
        trade_count=len(trades),
        last_seq=trades[-1].seq,
        closed=kline is not None and kline.closed,
    )
    if kline is None or not kline.trade_count:
        return traded
    return replace(
        traded,
        open=kline.open,
        high=max(kline.high, traded.high),
        low=min(kline.low, traded.low),
        volume=kline.volume + traded.volume,
        trade_count=kline.trade_count + traded.trade_count,
    )


def _fill(klines: dict[int, Kline], period_ms: int, newest: int, horizon_ms: int) -> None:
    """Flat klines at the close before them, wherever nothing was traded; new ones from the horizon on only."""
    filled_from = max(min(klines), open_time(horizon_ms, period_ms))
    previous: Kline | None = None
    for open_ms in sorted(klines.keys() | range(filled_from, newest + 1, period_ms)):
        kline = klines.get(open_ms)
        if previous is not None and (kline is None or not kline.trade_count):
            kline = _flat(previous, open_ms, closed=kline is not None and kline.closed)
            klines[open_ms] = kline
        previous = kline


def _flat(previous: Kline, open_ms: int, *, closed: bool) -> Kline:
    price = previous.close
    return Kline(open_ms, price, price, price, price, ZERO, 0, previous.last_seq, closed)


def _close(klines: dict[int, Kline], newest_closed: int) -> None:
    for open_ms, kline in klines.items():
        if open_ms <= newest_closed and not kline.closed:
            klines[open_ms] = replace(kline, closed=True)


def merge(known: Sequence[Kline], changed: Sequence[Kline]) -> list[Kline]:
    """`known` with `changed` in it, oldest first."""
    klines = {kline.open_ms: kline for kline in (*known, *changed)}
    return [klines[open_ms] for open_ms in sorted(klines)]

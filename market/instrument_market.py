"""What the public sees of one instrument, derived from its engine events, and the messages that say it.

Each channel (depth, trades, tickers) has a snapshot, kept in Redis, and a chain of updates: an update carries the
`seq` of the last engine event it includes and the `prevSeq` of the update before it. A chain that was broken (a
start, a failed publication) goes on from the snapshot: its next update adds nothing to it, and its `prevSeq` tells
those who stand elsewhere that they have missed something.
"""

import heapq
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from functools import lru_cache
from typing import NamedTuple

import msgspec

from domain.clock import from_ms, iso
from domain.events import MarkPriceUpdated
from domain.instruments import Instrument
from domain.matching import AnyEvent, Ended, StopPlaced, Trade, Triggered
from domain.money import plain
from market.depth import DepthBook, RestingOrder
from market.rolling_day import RollingDay, Second
from storage.market_keys import snapshot_key, update_channel

RECENT_TRADES = 500
CHECKPOINT_VERSION = 1
_encode = msgspec.json.Encoder().encode
_MESSAGE = b'{"type":"%b","channel":"%b","instrumentId":"%b","seq":%d,"prevSeq":%d,"data":%b}'


class SequenceGapError(Exception):
    """Events are missing between those applied and those given."""


class PublicTrade(msgspec.Struct, rename="camel"):
    """One trade as published; `side` is the taker's."""

    trade_id: int
    price: str
    quantity: str
    side: str
    executed_at: str


class Funding(msgspec.Struct, frozen=True):
    """The rate fixed last, None before the first, and the time of the next settlement."""

    rate: str | None
    next_time: str


class Ticker(msgspec.Struct, rename="camel"):
    """Statistics of the last 24 hours and the latest prices; None where there is nothing yet."""

    instrument_id: str
    last_price: str | None
    best_bid: str | None
    best_ask: str | None
    volume_24h: str = msgspec.field(name="volume24h")
    high_24h: str | None = msgspec.field(name="high24h")
    low_24h: str | None = msgspec.field(name="low24h")
    price_change_24h: str | None = msgspec.field(name="priceChange24h")
    mark_price: str | None
    index_price: str | None
    index_source: str | None
    is_frozen: bool
    funding_rate: str | None
    predicted_funding_rate: str | None
    next_funding_time: str | None


class Checkpoint(msgspec.Struct, frozen=True, array_like=True):
    """All that follows from the events up to `seq`; prices in ticks, `trades` as published, oldest first.

    The log before a checkpoint may be gone, so those that are stored have to stay readable: a later field goes to the
    end and has a default. CHECKPOINT_VERSION is for what cannot be said that way.
    """

    seq: int
    orders: dict[int, RestingOrder]
    waiting_for_mark: list[int]
    seconds: dict[int, Second]
    last_price: int | None
    trades: list[bytes]


class Overview(NamedTuple):
    """A moment of a market: (price, quantity) of the best levels, best first, and volume in the base asset."""

    seq: int
    bids: list[tuple[str, str]]
    asks: list[tuple[str, str]]
    last_price: Decimal | None
    volume_24h: Decimal


@dataclass(slots=True)
class Publication:
    """What one flush writes for an instrument: Redis keys, and messages per pub/sub channel."""

    keys: dict[str, bytes] = field(default_factory=dict)
    messages: list[tuple[str, bytes]] = field(default_factory=list)


class InstrumentMarket:
    """Book, recent trades and 24 h statistics up to engine event `seq`; prices in ticks, quantities in lots."""

    def __init__(self, instrument: Instrument) -> None:
        self.instrument = instrument
        self.seq = 0
        self.book = DepthBook()
        self.mark: MarkPriceUpdated | None = None
        self.funding: Funding | None = None
        self.predicted_rate: str | None = None
        # Stop orders that the mark price triggers: only while there are some does the engine have to hear of it.
        self.waiting_for_mark: set[int] = set()
        self._id = instrument.instrument_id.encode()
        self._day = RollingDay()
        self._last_price: int | None = None
        self._trades: deque[bytes] = deque(maxlen=RECENT_TRADES)
        self._new_trades = 0
        self._bid_levels: dict[int, bytes] = {}
        self._ask_levels: dict[int, bytes] = {}
        self._ticker = b""
        self._published: dict[bytes, int] = {}
        self._price = lru_cache(65_536)(lambda ticks: plain(instrument.ticks_to_price(ticks)))
        self._quantity = lru_cache(65_536)(lambda lots: plain(instrument.lots_to_quantity(lots)))

    def apply(self, first_seq: int, events: Sequence[AnyEvent]) -> None:
        """Take in `events`, numbered from `first_seq`; those known already are skipped. Raises SequenceGapError."""
        if first_seq > self.seq + 1:
            raise SequenceGapError(f"Expected {self.instrument.instrument_id} event {self.seq + 1}, was {first_seq}")
        for event in events[self.seq + 1 - first_seq :]:
            self.book.apply(event)
            if isinstance(event, Trade):
                self._trade(event)
            elif isinstance(event, StopPlaced):
                if event.working_type == "MARK":
                    self.waiting_for_mark.add(event.order_id)
            elif isinstance(event, Triggered | Ended):
                self.waiting_for_mark.discard(event.order_id)
            self.seq += 1

    def dump(self) -> bytes:
        """A checkpoint: `load` of it goes on exactly as this market would, but for mark price and funding."""
        return msgspec.msgpack.encode(
            Checkpoint(
                seq=self.seq,
                orders=self.book.orders,
                waiting_for_mark=sorted(self.waiting_for_mark),
                seconds=self._day.seconds,
                last_price=self._last_price,
                trades=list(self._trades),
            )
        )

    @classmethod
    def load(cls, instrument: Instrument, state: bytes) -> "InstrumentMarket":
        """The market that was dumped; it publishes everything anew. Raises msgspec.DecodeError if it is malformed."""
        checkpoint = msgspec.msgpack.decode(state, type=Checkpoint)
        market = cls(instrument)
        market.seq = checkpoint.seq
        market.book = DepthBook(checkpoint.orders)
        market.waiting_for_mark.update(checkpoint.waiting_for_mark)
        market._day = RollingDay(checkpoint.seconds)
        market._last_price = checkpoint.last_price
        market._trades.extend(checkpoint.trades)
        return market

    def overview(self, levels_max: int, now_ms: int) -> Overview:
        """The best `levels_max` levels of each side and the figures of the last 24 hours."""
        bids, asks, instrument = self.book.bids, self.book.asks, self.instrument
        self._day.expire(now_ms)
        return Overview(
            self.seq,
            self._texts(bids, heapq.nlargest(levels_max, bids)),
            self._texts(asks, heapq.nsmallest(levels_max, asks)),
            None if self._last_price is None else instrument.ticks_to_price(self._last_price),
            instrument.lots_to_quantity(self._day.lots),
        )

    def bids(self) -> list[tuple[Decimal, Decimal]]:
        """(price, quantity) per level, best first."""
        return self._levels(self.book.bids, best_first=sorted(self.book.bids, reverse=True))

    def asks(self) -> list[tuple[Decimal, Decimal]]:
        """(price, quantity) per level, best first."""
        return self._levels(self.book.asks, best_first=sorted(self.book.asks))

    def take_publication(self, now_ms: int) -> Publication:
        """What changed since the last call, as messages; the caller sends them, or calls `break_chains`."""
        out = Publication()
        self._publish_depth(out)
        self._publish_trades(out)
        self._publish_ticker(out, now_ms)
        return out

    def break_chains(self) -> None:
        """The last publication may not have arrived: publish everything again, as a new chain."""
        self._published.clear()

    def _trade(self, event: Trade) -> None:
        self._last_price = event.price
        self._day.add(event.at, event.price, event.quantity)
        self._new_trades += 1
        trade = PublicTrade(
            trade_id=event.trade_id,
            price=self._price(event.price),
            quantity=self._quantity(event.quantity),
            side=event.taker_side,
            executed_at=_iso_ms(event.at),
        )
        self._trades.append(_encode(trade))

    def _levels(self, side: dict[int, int], best_first: list[int]) -> list[tuple[Decimal, Decimal]]:
        instrument = self.instrument
        return [(instrument.ticks_to_price(p), instrument.lots_to_quantity(side[p])) for p in best_first]

    def _texts(self, side: dict[int, int], prices: Iterable[int]) -> list[tuple[str, str]]:
        return [(self._price(price), self._quantity(side[price])) for price in prices]

    def _publish_depth(self, out: Publication) -> None:
        book = self.book
        if not (book.changed_bids or book.changed_asks) and b"depth" in self._published:
            return
        new_bids = self._encode_changes(book.changed_bids, book.bids, self._bid_levels)
        new_asks = self._encode_changes(book.changed_asks, book.asks, self._ask_levels)
        book.changed_bids.clear()
        book.changed_asks.clear()
        if b"depth" not in self._published:
            new_bids, new_asks = [], []
        bids = [self._bid_levels[price] for price in sorted(self._bid_levels, reverse=True)]
        asks = [self._ask_levels[price] for price in sorted(self._ask_levels)]
        self._publish(out, b"depth", snapshot=_sides(bids, asks), update=_sides(new_bids, new_asks))

    def _encode_changes(self, changed: set[int], side: dict[int, int], encoded: dict[int, bytes]) -> list[bytes]:
        levels = []
        for price in sorted(changed):
            lots = side.get(price, 0)
            level = f'["{self._price(price)}","{self._quantity(lots)}"]'.encode()
            levels.append(level)
            if lots:
                encoded[price] = level
            else:
                encoded.pop(price, None)
        return levels

    def _publish_trades(self, out: Publication) -> None:
        if not self._new_trades and b"trades" in self._published:
            return
        if self._new_trades > RECENT_TRADES:
            self._published.pop(b"trades", None)
        trades = list(self._trades)
        new = trades[-self._new_trades :] if self._new_trades and b"trades" in self._published else []
        self._new_trades = 0
        self._publish(out, b"trades", snapshot=_array(trades), update=_array(new))

    def _publish_ticker(self, out: Publication, now_ms: int) -> None:
        ticker = _encode(self._current_ticker(now_ms))
        if ticker == self._ticker and b"tickers" in self._published:
            return
        self._ticker = ticker
        self._publish(out, b"tickers", snapshot=ticker, update=ticker)

    def _current_ticker(self, now_ms: int) -> Ticker:
        day = self._day
        day.expire(now_ms)
        change = None if day.open is None or self._last_price is None else self._last_price - day.open
        mark, funding = self.mark, self.funding
        return Ticker(
            instrument_id=self.instrument.instrument_id,
            last_price=self._price_or_none(self._last_price),
            best_bid=self._price_or_none(max(self.book.bids, default=None)),
            best_ask=self._price_or_none(min(self.book.asks, default=None)),
            volume_24h=plain(self.instrument.lots_to_quantity(day.lots)),
            high_24h=self._price_or_none(day.high),
            low_24h=self._price_or_none(day.low),
            price_change_24h=self._price_or_none(change),
            mark_price=mark.mark_price if mark else None,
            index_price=mark.index_price if mark else None,
            index_source=mark.source if mark else None,
            is_frozen=mark.is_frozen if mark else False,
            funding_rate=funding.rate if funding else None,
            predicted_funding_rate=self.predicted_rate,
            next_funding_time=funding.next_time if funding else None,
        )

    def _price_or_none(self, ticks: int | None) -> str | None:
        return None if ticks is None else self._price(ticks)

    def _publish(self, out: Publication, channel: bytes, *, snapshot: bytes, update: bytes) -> None:
        seq = self.seq
        previous = self._published.get(channel, seq)
        self._published[channel] = seq
        name, instrument_id = channel.decode(), self.instrument.instrument_id
        out.keys[snapshot_key(name, instrument_id)] = _MESSAGE % (b"snapshot", channel, self._id, seq, seq, snapshot)
        message = _MESSAGE % (b"update", channel, self._id, seq, previous, update)
        out.messages.append((update_channel(name, instrument_id), message))


@lru_cache(1024)
def _iso_ms(unix_ms: int) -> str:
    return iso(from_ms(unix_ms))


def _array(items: Sequence[bytes]) -> bytes:
    return b"[" + b",".join(items) + b"]"


def _sides(bids: Sequence[bytes], asks: Sequence[bytes]) -> bytes:
    return b'{"bids":%b,"asks":%b}' % (_array(bids), _array(asks))

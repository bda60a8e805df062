"""Latest public prices from Redis, for services that need a reference: protection prices, price bands."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from typing import TypeGuard, cast

import msgspec
from redis.asyncio import Redis

from storage.market_keys import mark_key, snapshot_key

# A mark older than this says nothing about now: the market process, or what it follows, stands still.
MARK_AGE_MAX = timedelta(seconds=10)


@dataclass(frozen=True, slots=True)
class ReferencePrice:
    """`mark` as of `calculated_at`, frozen without a fresh index; the best quotes, None while that side of the book
    is empty."""

    mark: Decimal
    best_bid: Decimal | None
    best_ask: Decimal | None
    calculated_at: datetime
    is_frozen: bool = False


class _Mark(msgspec.Struct, rename="camel"):
    mark_price: Decimal
    calculated_at: datetime
    is_frozen: bool = False


class _Quotes(msgspec.Struct, rename="camel"):
    best_bid: Decimal | None
    best_ask: Decimal | None


class _TickerMessage(msgspec.Struct):
    data: _Quotes


_decode_mark = msgspec.json.Decoder(_Mark).decode
_decode_ticker = msgspec.json.Decoder(_TickerMessage).decode


def marks_are_live(price: ReferencePrice | None, now: datetime) -> TypeGuard[ReferencePrice]:
    """Whether decisions that cost users money may be based on this mark."""
    return price is not None and not price.is_frozen and now - price.calculated_at <= MARK_AGE_MAX


async def read_reference_prices(redis: Redis, instrument_ids: Sequence[str]) -> dict[str, ReferencePrice]:
    """One MGET; instruments the market process has not priced yet are absent. Raises redis errors."""
    if not instrument_ids:
        return {}
    marks = [mark_key(instrument_id) for instrument_id in instrument_ids]
    tickers = [snapshot_key("tickers", instrument_id) for instrument_id in instrument_ids]
    values = cast(list[bytes | None], await redis.mget(marks + tickers))
    count = len(instrument_ids)
    return {
        instrument_id: _reference(mark, ticker)
        for instrument_id, mark, ticker in zip(instrument_ids, values[:count], values[count:], strict=True)
        if mark is not None and ticker is not None
    }


def _reference(mark_document: bytes, ticker_message: bytes) -> ReferencePrice:
    mark = _decode_mark(mark_document)
    quotes = _decode_ticker(ticker_message).data
    return ReferencePrice(mark.mark_price, quotes.best_bid, quotes.best_ask, mark.calculated_at, mark.is_frozen)

"""Latest mark prices from Redis, for services that need a reference: protection prices, price bands, liquidation."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import TypeGuard, cast

import msgspec
from redis.asyncio import Redis

from domain.mark_price import MARK_AGE_MAX
from storage.market_keys import mark_key


@dataclass(frozen=True, slots=True)
class ReferencePrice:
    """`mark` as of `calculated_at`, frozen without a fresh index."""

    mark: Decimal
    calculated_at: datetime
    is_frozen: bool = False


class _Mark(msgspec.Struct, rename="camel"):
    mark_price: Decimal
    calculated_at: datetime
    is_frozen: bool = False


_decode_mark = msgspec.json.Decoder(_Mark).decode


def marks_are_live(price: ReferencePrice | None, now: datetime) -> TypeGuard[ReferencePrice]:
    """Whether decisions that cost users money may be based on this mark."""
    return price is not None and not price.is_frozen and now - price.calculated_at <= MARK_AGE_MAX


async def read_reference_prices(redis: Redis, instrument_ids: Sequence[str]) -> dict[str, ReferencePrice]:
    """One MGET; instruments the market process has not priced yet are absent. Raises redis errors."""
    if not instrument_ids:
        return {}
    values = cast(list[bytes | None], await redis.mget([mark_key(name) for name in instrument_ids]))
    marks = {
        name: _decode_mark(document)
        for name, document in zip(instrument_ids, values, strict=True)
        if document is not None
    }
    return {name: ReferencePrice(mark.mark_price, mark.calculated_at, mark.is_frozen) for name, mark in marks.items()}

"""The mark price of every instrument, once an interval: calculated, kept as history, announced."""

import asyncio
import logging
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import cast

import msgspec
from redis.asyncio import Redis
from redis.exceptions import RedisError

from activities.matching import append_commands
from domain import mark_price
from domain.clock import iso, to_ms
from domain.events import MarkPriceUpdated
from domain.mark_price import MarkPrice
from domain.matching import MarkPrice as MarkPriceCommand
from domain.money import ZERO, plain
from market.index_price import SOURCE, SimulatedIndex
from market.instrument_market import Funding, InstrumentMarket
from storage.db import Pool, columns
from storage.leadership import OUTAGES, wait_for_event
from storage.market_keys import held_price_key, mark_key
from storage.outbox import emit

log = logging.getLogger(__name__)

ROUND_SECONDS_MAX = 5.0

_encode = msgspec.json.Encoder().encode
# One look into the index per instrument: the history may be long.
_LAST_INDEX = """
    SELECT name, last.index_price FROM unnest($1::text[]) AS name CROSS JOIN LATERAL
        (SELECT index_price FROM market.mark_prices WHERE instrument_id = name
         ORDER BY calculated_at DESC LIMIT 1) AS last
"""
_LAST_RATES = """
    SELECT name, last.rate FROM unnest($1::text[]) AS name CROSS JOIN LATERAL
        (SELECT rate FROM market.funding_rates WHERE instrument_id = name
         ORDER BY effective_at DESC LIMIT 1) AS last
"""
_INSERT = """
    INSERT INTO market.mark_prices (instrument_id, calculated_at, index_price, mark_price, fair_price, premium_index,
                                    funding_basis, source)
    SELECT u.instrument_id, $2, u.index_price, u.mark_price, u.fair_price, u.premium_index, u.funding_basis, $3
    FROM unnest($1::text[], $4::numeric[], $5::numeric[], $6::numeric[], $7::numeric[], $8::numeric[])
        AS u (instrument_id, index_price, mark_price, fair_price, premium_index, funding_basis)
"""


class MarkPrices:
    """Prices `markets` from the simulated index; sets `changed` after each round."""

    def __init__(
        self,
        pool: Pool,
        redis: Redis,
        markets: Mapping[str, InstrumentMarket],
        index: SimulatedIndex,
        funding_interval: timedelta,
        changed: asyncio.Event,
    ) -> None:
        self._pool = pool
        self._redis = redis
        self._markets = markets
        self._index = index
        self._funding_interval = funding_interval
        self._changed = changed
        self._nudged = asyncio.Event()
        self._told: dict[str, int] = {}

    def nudge(self) -> None:
        """Price again now: an operator has held or released an index."""
        self._nudged.set()

    async def run(self, interval_seconds: float) -> None:
        """Price everything each interval until cancelled; an outage of a server skips rounds."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + interval_seconds
            try:
                async with asyncio.timeout(ROUND_SECONDS_MAX):
                    await self.update(datetime.now(UTC))
            except (RedisError, *OUTAGES):
                log.warning("This round of mark prices is skipped", exc_info=True)
            await wait_for_event(self._nudged, due - loop.time())
            self._nudged.clear()

    async def update(self, now: datetime) -> None:
        """One round: history and events in one transaction, then the documents in Redis."""
        held = await self._held_prices()
        index = self._index.step(held)
        async with self._pool.acquire() as conn, conn.transaction():
            rates = {row["name"]: row["rate"] for row in await conn.fetch(_LAST_RATES, list(self._markets))}
            marks = {
                name: self._price(market, index[name], rates.get(name), now, is_held=name in held)
                for name, market in self._markets.items()
            }
            await conn.execute(_INSERT, *_history(marks, now))
            events = {name: _event(name, mark, now) for name, mark in marks.items()}
            await emit(conn, list(events.values()))
            told = self._to_tell(marks)
            at_ms = to_ms(now)
            await append_commands(conn, {name: [MarkPriceCommand(at=at_ms, price=told[name])] for name in told})
        self._told.update(told)
        await self._redis.mset({mark_key(name): self._document(event) for name, event in events.items()})
        next_funding = iso(mark_price.next_funding_time(now, self._funding_interval))
        for name, market in self._markets.items():
            rate = rates.get(name)
            market.mark = events[name]
            market.funding = Funding(None if rate is None else plain(rate), next_funding)
        self._changed.set()

    def _document(self, event: MarkPriceUpdated) -> bytes:
        predicted = self._markets[event.instrument_id].predicted_rate
        return _encode(msgspec.to_builtins(event) | {"predictedFundingRate": predicted})

    def _to_tell(self, marks: Mapping[str, MarkPrice]) -> dict[str, int]:
        """Marks, in ticks, that the engine has to hear: those that stop orders wait for, when they have moved."""
        told = {}
        for name, mark in marks.items():
            market = self._markets[name]
            ticks = int((mark.mark_price / market.instrument.tick_size).to_integral_value())
            if not market.waiting_for_mark:
                self._told.pop(name, None)
            elif self._told.get(name) != ticks:
                told[name] = ticks
        return told

    async def _held_prices(self) -> dict[str, Decimal]:
        names = list(self._markets)
        values = cast(list[bytes | None], await self._redis.mget([held_price_key(name) for name in names]))
        return {name: Decimal(value.decode()) for name, value in zip(names, values, strict=True) if value is not None}

    def _price(
        self, market: InstrumentMarket, index: Decimal, rate: Decimal | None, now: datetime, *, is_held: bool
    ) -> MarkPrice:
        notional = mark_price.impact_notional(1 / Decimal(market.instrument.max_leverage))
        bid = mark_price.impact_price(market.bids(), notional)
        ask = mark_price.impact_price(market.asks(), notional)
        until_funding = mark_price.next_funding_time(now, self._funding_interval) - now
        basis = mark_price.funding_basis(rate or ZERO, until_funding, self._funding_interval)
        # A held price is meant exactly: neither book nor funding may move the mark away from it.
        limit = ZERO if is_held else mark_price.MARK_DEVIATION_MAX
        return mark_price.calculate(index, mark_price.fair_price(bid, ask, index), basis, limit)


async def last_index_prices(pool: Pool, instrument_ids: Sequence[str]) -> dict[str, Decimal]:
    """The index levels of the last run."""
    return {row["name"]: row["index_price"] for row in await pool.fetch(_LAST_INDEX, instrument_ids)}


def _history(marks: Mapping[str, MarkPrice], now: datetime) -> list[object]:
    rows = [
        (name, m.index_price, m.mark_price, m.fair_price, m.premium_index, m.funding_basis) for name, m in marks.items()
    ]
    names, *figures = columns(rows, 6)
    return [names, now, SOURCE, *figures]


def _event(instrument_id: str, mark: MarkPrice, now: datetime) -> MarkPriceUpdated:
    return MarkPriceUpdated(
        instrument_id=instrument_id,
        index_price=plain(mark.index_price),
        mark_price=plain(mark.mark_price),
        fair_price=plain(mark.fair_price),
        premium_index=plain(mark.premium_index),
        funding_basis=plain(mark.funding_basis),
        calculated_at=iso(now),
        source=SOURCE,
    )

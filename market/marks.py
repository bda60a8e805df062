"""The mark price of every instrument, once an interval: calculated, kept as history, announced.

Without a fresh index an instrument is *frozen*: its last mark stands, marked as such for everyone who reads it (the
document in Redis, the ticker, `market.v_index_states`), until its index is fresh again.
"""

import asyncio
import logging
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from typing import cast

import msgspec
from asyncpg import Record
from redis.asyncio import Redis
from redis.exceptions import RedisError

from activities.matching.steps import append_commands
from domain import mark_price
from domain.clock import iso, to_ms
from domain.events import MarkPriceUpdated
from domain.index_price import IndexPrice
from domain.mark_price import MarkPrice
from domain.matching import MarkPrice as MarkPriceCommand
from domain.money import ZERO, plain
from market.index_sources import IndexSource
from market.instrument_market import Funding, InstrumentMarket
from storage.db import OUTAGES, Pool, columns
from storage.market_keys import held_price_key, mark_key
from storage.outbox import emit
from storage.waiting import wait_for_event
from telemetry.alerts import INDEX_FROZEN, alert

log = logging.getLogger(__name__)

ROUND_SECONDS_MAX = 5.0
# A mark that stands still is told to the engine again after so long: otherwise it would grow old there.
RETOLD_AFTER = mark_price.MARK_AGE_MAX / 4

_encode = msgspec.json.Encoder().encode
# One look into the index per instrument: the history may be long.
_LAST_INDEX = """
    SELECT name, last.index_price FROM unnest($1::text[]) AS name CROSS JOIN LATERAL
        (SELECT index_price FROM market.mark_prices WHERE instrument_id = name
         ORDER BY calculated_at DESC LIMIT 1) AS last
"""
_LAST_MARKS = """
    SELECT last.* FROM unnest($1::text[]) AS name CROSS JOIN LATERAL
        (SELECT instrument_id, index_price, mark_price, fair_price, premium_index, funding_basis, calculated_at, source
         FROM market.mark_prices WHERE instrument_id = name ORDER BY calculated_at DESC LIMIT 1) AS last
    WHERE last.source = $2
"""
_FROZEN = "SELECT instrument_id, frozen_since FROM market.index_states WHERE source = $1 AND frozen_since IS NOT NULL"
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
_INSERT_INDEX = """
    INSERT INTO market.index_prices (instrument_id, calculated_at, index_price, source, sources)
    SELECT u.instrument_id, $1, u.index_price, $2, u.sources::jsonb
    FROM unnest($3::text[], $4::numeric[], $5::text[]) AS u (instrument_id, index_price, sources)
"""
_SET_STATES = """
    INSERT INTO market.index_states (instrument_id, source, checked_at, frozen_since)
    SELECT u.instrument_id, $1, $2, u.frozen_since
    FROM unnest($3::text[], $4::timestamptz[]) AS u (instrument_id, frozen_since)
    ON CONFLICT (instrument_id) DO UPDATE
    SET source = excluded.source, checked_at = excluded.checked_at, frozen_since = excluded.frozen_since
"""


class MarkPrices:
    """Prices `markets` from `index`; sets `changed` after each round."""

    def __init__(
        self,
        pool: Pool,
        redis: Redis,
        markets: Mapping[str, InstrumentMarket],
        index: IndexSource,
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
        self._told: dict[str, MarkPriceCommand] = {}
        self._last: dict[str, MarkPriceUpdated] = {}
        self._frozen_since: dict[str, datetime] = {}

    def nudge(self) -> None:
        """Price again now: an operator has held or released an index."""
        self._nudged.set()

    async def run(self, interval_seconds: float) -> None:
        """Price everything each interval until cancelled; an outage of a server skips rounds."""
        await self._restore()
        await self._index.warm_up()
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
        """One round: history, states and events in one transaction, then the documents in Redis."""
        held = await self._held_prices() if self._index.can_be_held else {}
        readings = self._index.read(now, held)
        fresh = {name: reading.price for name, reading in readings.items() if reading.price is not None}
        frozen = {name: self._frozen_since.get(name, now) for name in readings.keys() - fresh.keys()}
        async with self._pool.acquire() as conn, conn.transaction():
            rates = {row["name"]: row["rate"] for row in await conn.fetch(_LAST_RATES, list(self._markets))}
            marks = {
                name: self._price(self._markets[name], price, rates.get(name), now, is_held=name in held)
                for name, price in fresh.items()
            }
            label = self._index.label
            await conn.execute(_INSERT, *_history(marks, now, label))
            await conn.execute(_INSERT_INDEX, now, label, *_index_history(readings))
            await conn.execute(_SET_STATES, label, now, list(readings), [frozen.get(name) for name in readings])
            events = {name: _event(name, mark, now, label) for name, mark in marks.items()}
            halted = self._newly_frozen(frozen)
            await emit(conn, [*events.values(), *halted.values()])
            told = self._to_tell(marks, halted, now)
            await append_commands(conn, {name: [command] for name, command in told.items()})
        self._told.update(told)
        self._last.update(events | halted)
        self._alert(frozen, readings)
        self._frozen_since = frozen
        await self._publish(rates, now)

    async def _restore(self) -> None:
        """Know what stood before this process: without a fresh index it stands on."""
        async with self._pool.acquire() as conn:
            marks = await conn.fetch(_LAST_MARKS, list(self._markets), self._index.label)
            frozen = await conn.fetch(_FROZEN, self._index.label)
        self._last = {row["instrument_id"]: _event_of_row(row) for row in marks}
        self._frozen_since = {row["instrument_id"]: row["frozen_since"] for row in frozen}
        for name, since in self._frozen_since.items():
            if name in self._last:
                self._last[name] = _as_frozen(self._last[name], since)

    async def _publish(self, rates: Mapping[str, Decimal], now: datetime) -> None:
        if self._last:
            await self._redis.mset({mark_key(name): self._document(event) for name, event in self._last.items()})
        next_funding = iso(mark_price.next_funding_time(now, self._funding_interval))
        for name, market in self._markets.items():
            rate = rates.get(name)
            market.mark = self._last.get(name)
            market.funding = Funding(None if rate is None else plain(rate), next_funding)
        self._changed.set()

    def _document(self, event: MarkPriceUpdated) -> bytes:
        predicted = self._markets[event.instrument_id].predicted_rate
        return _encode(msgspec.to_builtins(event) | {"predictedFundingRate": predicted})

    def _newly_frozen(self, frozen: Mapping[str, datetime]) -> dict[str, MarkPriceUpdated]:
        """The last marks again, as frozen, of those instruments whose index was fresh until now."""
        return {
            name: _as_frozen(self._last[name], since)
            for name, since in frozen.items()
            if name not in self._frozen_since and name in self._last
        }

    def _alert(self, frozen: Collection[str], readings: Mapping[str, IndexPrice]) -> None:
        for name in frozen:
            if name not in self._frozen_since:
                dropped = dict(readings[name].dropped)
                alert(INDEX_FROZEN, "%s has no fresh index, its mark price is frozen: %s", name, dropped)
        for name, since in self._frozen_since.items():
            if name not in frozen:
                # As loud as the freeze was: who was alarmed by it waits for this.
                log.error("ALERT over: %s has a fresh index again, it was frozen since %s", name, iso(since))

    def _to_tell(
        self, marks: Mapping[str, MarkPrice], halted: Mapping[str, MarkPriceUpdated], now: datetime
    ) -> dict[str, MarkPriceCommand]:
        """What the engine has to hear: marks that have moved or were told some time ago, and which are frozen now."""
        commands = {name: self._command(name, mark.mark_price, now) for name, mark in marks.items()}
        told = {name: command for name, command in commands.items() if self._is_news(name, command)}
        frozen = {name: self._command(name, Decimal(event.mark_price), now) for name, event in halted.items()}
        return told | {name: msgspec.structs.replace(command, frozen=True) for name, command in frozen.items()}

    def _command(self, name: str, mark: Decimal, now: datetime) -> MarkPriceCommand:
        in_ticks = mark / self._markets[name].instrument.tick_size
        floor, ceiling = (int(in_ticks.to_integral_value(rounding)) for rounding in (ROUND_FLOOR, ROUND_CEILING))
        return MarkPriceCommand(at=to_ms(now), price=floor, ceiling=0 if ceiling == floor else ceiling)

    def _is_news(self, name: str, command: MarkPriceCommand) -> bool:
        last = self._told.get(name)
        if last is None or last.frozen or command.at - last.at >= RETOLD_AFTER // timedelta(milliseconds=1):
            return True
        return (last.price, last.ceiling) != (command.price, command.ceiling)

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


def _history(marks: Mapping[str, MarkPrice], now: datetime, label: str) -> list[object]:
    rows = [
        (name, m.index_price, m.mark_price, m.fair_price, m.premium_index, m.funding_basis) for name, m in marks.items()
    ]
    names, *figures = columns(rows, 6)
    return [names, now, label, *figures]


def _index_history(readings: Mapping[str, IndexPrice]) -> list[list[object]]:
    return columns(
        [
            (name, reading.price, _encode({"used": reading.used, "dropped": reading.dropped}).decode())
            for name, reading in readings.items()
        ],
        3,
    )


def _event(instrument_id: str, mark: MarkPrice, now: datetime, label: str) -> MarkPriceUpdated:
    return MarkPriceUpdated(
        instrument_id=instrument_id,
        index_price=plain(mark.index_price),
        mark_price=plain(mark.mark_price),
        fair_price=plain(mark.fair_price),
        premium_index=plain(mark.premium_index),
        funding_basis=plain(mark.funding_basis),
        calculated_at=iso(now),
        source=label,
    )


def _event_of_row(row: Record) -> MarkPriceUpdated:
    figures = (row[name] for name in ("index_price", "mark_price", "fair_price", "premium_index", "funding_basis"))
    return _event(row["instrument_id"], MarkPrice(*figures), row["calculated_at"], row["source"])


def _as_frozen(event: MarkPriceUpdated, since: datetime) -> MarkPriceUpdated:
    return msgspec.structs.replace(event, is_frozen=True, frozen_since=iso(since))

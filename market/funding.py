"""Funding rates: at each funding time the rate of the interval that ended, once; and the rate to expect of this one.

Funding times are the multiples of the interval since 1970. The premium samples are the rows of `market.mark_prices`,
so that a restart forgets none, and intervals that ended while nobody was there are fixed from their own samples. An
interval without any counts as one without premium; its row says so (`samples`). While the index is frozen nothing is
fixed, and so nothing is settled; once it is live again, every interval is fixed for its own time.
"""

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import asyncpg

from activities.matching.instruments import read_tiers
from domain.clock import iso
from domain.events import FundingRateUpdated
from domain.funding_rate import funding_rate, rate_cap
from domain.mark_price import RATE_STEP, next_funding_time
from domain.money import ZERO, plain
from market.instrument_market import InstrumentMarket
from storage.db import OUTAGES, Connection, Pool, columns
from storage.outbox import emit
from storage.waiting import pause

log = logging.getLogger(__name__)

ROUND_SECONDS = 1.0
ROUND_SECONDS_MAX = 30.0
# After a sample that is younger than the interval, none of the interval can follow. Without samples, wait this long.
LATE_SAMPLES_SECONDS = 10
FIXED_MAX = 500

# Intervals that have ended since the last rate, or since the first sample: their ends, samples and last mark price.
_DUE = """
    SELECT name, ended.at AS effective_at, samples.number, samples.premium, mark.mark_price, mark.source
    FROM (SELECT name FROM unnest($1::text[]) AS name WHERE NOT EXISTS (
        SELECT FROM market.index_states i WHERE i.instrument_id = name AND i.frozen_since IS NOT NULL)) AS names
    CROSS JOIN LATERAL (SELECT coalesce(
        (SELECT max(effective_at) FROM market.funding_rates WHERE instrument_id = name),
        (SELECT min(calculated_at) FROM market.mark_prices WHERE instrument_id = name)) AS at) since
    CROSS JOIN LATERAL (SELECT greatest(max(calculated_at), $3::timestamptz - make_interval(secs => $4)) AS at
        FROM market.mark_prices WHERE instrument_id = name) seen
    CROSS JOIN LATERAL (
        SELECT at FROM generate_series(to_timestamp((floor(extract(epoch FROM since.at)::float8 / $2) + 1) * $2),
                                       least(seen.at, $3), make_interval(secs => $2::float8)) AS at
        ORDER BY at LIMIT $5) ended
    CROSS JOIN LATERAL (SELECT count(*)::integer AS number, coalesce(avg(premium_index), 0) AS premium
        FROM market.mark_prices WHERE instrument_id = name
        AND calculated_at >= ended.at - make_interval(secs => $2) AND calculated_at < ended.at) samples
    CROSS JOIN LATERAL (
        (SELECT mark_price, source, 1 AS choice FROM market.mark_prices
         WHERE instrument_id = name AND calculated_at <= ended.at ORDER BY calculated_at DESC LIMIT 1)
        UNION ALL
        (SELECT mark_price, source, 2 FROM market.mark_prices
         WHERE instrument_id = name AND calculated_at > ended.at ORDER BY calculated_at LIMIT 1)
        ORDER BY choice LIMIT 1) mark
    ORDER BY ended.at, name
"""
_FIX = """
    INSERT INTO market.funding_rates (instrument_id, effective_at, rate, premium_average, mark_price, samples,
                                      source)
    SELECT * FROM unnest($1::text[], $2::timestamptz[], $3::numeric[], $4::numeric[], $5::numeric[], $6::integer[],
                         $7::text[])
    ON CONFLICT DO NOTHING RETURNING instrument_id, effective_at, rate, samples, source
"""
# From here on the others know, without being told, when a funding time has passed, and what it may come to at most.
_SCHEDULE = """
    INSERT INTO market.funding_schedules (instrument_id, interval_seconds, rate_cap)
    SELECT name, $2, cap FROM unnest($1::text[], $3::numeric[]) AS u (name, cap)
    ON CONFLICT (instrument_id) DO UPDATE
    SET interval_seconds = excluded.interval_seconds, rate_cap = excluded.rate_cap
"""
_SAMPLES = """
    SELECT instrument_id, count(*) AS number, sum(premium_index) AS premium, max(calculated_at) AS last_at
    FROM unnest($1::text[], $2::timestamptz[]) AS u (name, since)
    JOIN market.mark_prices ON instrument_id = name AND calculated_at > since
    WHERE calculated_at >= $3 AND calculated_at < $4 GROUP BY instrument_id
"""


@dataclass(slots=True)
class _Running:
    """The samples so far of the interval that ends at `ends_at`; `last_at` is the newest of them."""

    ends_at: datetime
    last_at: datetime
    number: int = 0
    premium: Decimal = ZERO

    @property
    def average(self) -> Decimal:
        return self.premium / self.number if self.number else ZERO


class FundingRates:
    """Fixes the rates of `markets` and tells them what to expect next."""

    def __init__(self, pool: Pool, markets: Mapping[str, InstrumentMarket], interval: timedelta) -> None:
        self._pool = pool
        self._markets = markets
        self._interval = interval
        self._caps: dict[str, Decimal] = {}
        self._running: dict[str, _Running] = {}

    async def run(self) -> None:
        """Work until cancelled; an outage of the database is waited out."""
        while True:
            try:
                async with asyncio.timeout(ROUND_SECONDS_MAX):
                    await self.update(datetime.now(UTC))
            except OUTAGES:
                log.warning("Funding rates are late", exc_info=True)
            await pause(ROUND_SECONDS - time.time() % ROUND_SECONDS)

    async def update(self, now: datetime) -> None:
        """Fix what is due at `now`, then look ahead."""
        async with self._pool.acquire() as conn:
            if not self._caps:
                caps = {name: rate_cap(tiers) for name, tiers in (await read_tiers(conn)).items()}
                names, seconds = list(self._markets), int(self._interval.total_seconds())
                await conn.execute(_SCHEDULE, names, seconds, [caps[name].quantize(RATE_STEP) for name in names])
                self._caps = caps
            await self._fix(conn, now)
            await self._predict(conn, now)

    async def _fix(self, conn: Connection, now: datetime) -> None:
        due = await conn.fetch(
            _DUE, list(self._markets), self._interval.total_seconds(), now, LATE_SAMPLES_SECONDS, FIXED_MAX
        )
        if not due:
            return
        rows = [self._fixed(row) for row in due]
        async with conn.transaction():
            # Another process may have been first: what it fixed stands, and it has announced it.
            fixed = await conn.fetch(_FIX, *columns(rows, 7))
            await emit(conn, [_event(row) for row in sorted(fixed, key=lambda row: row["effective_at"])])
        for row in fixed:
            level = logging.INFO if row["samples"] else logging.WARNING
            log.log(level, "%s: funding rate %s from %d samples", row["instrument_id"], row["rate"], row["samples"])

    def _fixed(self, due: asyncpg.Record) -> Sequence[object]:
        name, premium = due["name"], due["premium"].quantize(RATE_STEP)
        rate = funding_rate(premium, self._interval, self._caps[name])
        return name, due["effective_at"], rate, premium, due["mark_price"], due["number"], due["source"]

    async def _predict(self, conn: Connection, now: datetime) -> None:
        ends_at = next_funding_time(now, self._interval)
        begins_at = ends_at - self._interval
        for name in self._markets:
            if name not in self._running or self._running[name].ends_at != ends_at:
                self._running[name] = _Running(ends_at, begins_at - timedelta(microseconds=1))
        last = [self._running[name].last_at for name in self._markets]
        for row in await conn.fetch(_SAMPLES, list(self._markets), last, begins_at, ends_at):
            running = self._running[row["instrument_id"]]
            running.number += row["number"]
            running.premium += row["premium"]
            running.last_at = row["last_at"]
        for name, market in self._markets.items():
            rate = funding_rate(self._running[name].average, self._interval, self._caps[name])
            market.predicted_rate = plain(rate)


def _event(row: asyncpg.Record) -> FundingRateUpdated:
    return FundingRateUpdated(
        instrument_id=row["instrument_id"],
        rate=plain(row["rate"]),
        effective_at=iso(row["effective_at"]),
        source=row["source"],
    )

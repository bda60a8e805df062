"""What the read model shows: sums by UTC day, liquidations, and open interest at the end of days."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta

import asyncpg

from storage.db import Connection, Pool

# $1 user, $2 and $3 days, $4 instrument, $5 and $6 the cursor, $7 limit. {whose}: by user, or everybody.
_OF_DAYS = """
    SELECT day, instrument_id, {sums} FROM reporting.{table}
    WHERE {whose} AND day BETWEEN $2 AND $3 AND ($4::text IS NULL OR instrument_id = $4)
        AND ($5::date IS NULL OR day < $5 OR (day = $5 AND instrument_id > $6))
    GROUP BY day, instrument_id{more_groups} ORDER BY day DESC, instrument_id LIMIT $7
"""
_WHOSE = {True: "user_id = $1", False: "$1::bigint IS NULL"}
_LIQUIDATIONS = """
    SELECT liquidation_id, user_id, instrument_id, position_id, reason, triggered_at FROM reporting.liquidations
    WHERE {whose} AND triggered_at >= $2 AND triggered_at < $3 AND ($4::text IS NULL OR instrument_id = $4)
        AND ($5::bigint IS NULL OR liquidation_id < $5)
    ORDER BY liquidation_id DESC LIMIT $6
"""
_OPEN_INTEREST = """
    WITH closes AS (
        SELECT instrument_id, day, lead(day) OVER by_day AS next_day, sum(change) OVER by_day AS open_interest
        FROM reporting.open_interest_days WHERE ($3::text IS NULL OR instrument_id = $3) AND day <= $2
        WINDOW by_day AS (PARTITION BY instrument_id ORDER BY day))
    SELECT d::date AS day, instrument_id, open_interest
    FROM generate_series($1::date, $2::date, interval '1 day') d
    JOIN closes c ON c.day <= d AND (c.next_day IS NULL OR c.next_day > d)
    WHERE $4::date IS NULL OR d < $4 OR (d = $4 AND instrument_id > $5)
    ORDER BY d DESC, instrument_id LIMIT $6
"""


@dataclass(frozen=True, slots=True)
class DayReport:
    """Sums of a table of days; `more_groups` is what keeps them apart beside day and instrument."""

    table: str
    sums: str
    more_groups: str = ""


PNL = DayReport(
    "pnl_days",
    "asset, sum(realized_pnl) AS realized_pnl, sum(fees) AS fees, sum(funding) AS funding,"
    " sum(liquidation) AS liquidation, sum(insurance) AS insurance,"
    " sum(realized_pnl + fees + funding + liquidation + insurance) AS net",
    more_groups=", asset",
)
VOLUME = DayReport(
    "trade_days",
    "sum(maker_volume) AS maker_volume, sum(taker_volume) AS taker_volume,"
    " sum(maker_volume + taker_volume) AS volume, sum(maker_trades)::bigint AS maker_trades,"
    " sum(taker_trades)::bigint AS taker_trades",
)
FEES = DayReport(
    "trade_days",
    "sum(maker_fees) AS maker_fees, sum(taker_fees) AS taker_fees, sum(maker_fees + taker_fees) AS fees",
)


@dataclass(frozen=True, slots=True)
class Span:
    """Which days, both included, and of which instrument (None: of all)."""

    first: date
    last: date
    instrument_id: str | None


async def list_sums(
    conn: Connection | Pool,
    report: DayReport,
    user_id: int | None,
    span: Span,
    after: tuple[date | None, str],
    limit: int,
) -> Sequence[asyncpg.Record]:
    """A report of one user, or of all together (None), newest day first, from after this day and instrument on."""
    statement = _OF_DAYS.format(
        sums=report.sums, table=report.table, whose=_WHOSE[user_id is not None], more_groups=report.more_groups
    )
    return await conn.fetch(statement, user_id, span.first, span.last, span.instrument_id, *after, limit)


async def list_liquidations(
    conn: Connection | Pool, user_id: int | None, span: Span, before: int | None, limit: int
) -> Sequence[asyncpg.Record]:
    """Liquidations of one user, or of all (None), that were triggered on these days, with ids below `before`, newest
    first."""
    return await conn.fetch(
        _LIQUIDATIONS.format(whose=_WHOSE[user_id is not None]),
        user_id,
        _midnight(span.first),
        _midnight(span.last + timedelta(days=1)),
        span.instrument_id,
        before,
        limit,
    )


async def list_open_interest(
    conn: Connection | Pool, span: Span, after: tuple[date | None, str], limit: int
) -> Sequence[asyncpg.Record]:
    """Open interest (base) at the end of each day, newest first, from after this day and instrument on."""
    return await conn.fetch(_OPEN_INTEREST, span.first, span.last, span.instrument_id, *after, limit)


def _midnight(day: date) -> datetime:
    return datetime(day.year, day.month, day.day, tzinfo=UTC)

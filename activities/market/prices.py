"""The market service's prices: the latest marks, and their history."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from decimal import Decimal

from domain.mark_price import MARK_AGE_MAX
from storage.db import Connection, Pool

_LATEST = """
    SELECT name, m.mark_price, m.calculated_at > now() - $2::interval AND s.frozen_since IS NULL AS is_live
    FROM unnest($1::text[]) AS name
    CROSS JOIN LATERAL (SELECT mark_price, calculated_at FROM market.v_mark_prices p WHERE p.instrument_id = name
                        ORDER BY calculated_at DESC LIMIT 1) AS m
    LEFT JOIN market.v_index_states s ON s.instrument_id = name
"""

# The newest row of an instrument stays, however old: the index of the next run goes on from there.
_FORGET = """
    WITH old AS (
        SELECT i.instrument_id, h.calculated_at FROM matching.v_instruments AS i
        CROSS JOIN LATERAL (SELECT calculated_at FROM {table} AS p WHERE p.instrument_id = i.instrument_id
            AND calculated_at < least(now() - $1::interval,
                (SELECT max(calculated_at) FROM {table} AS n WHERE n.instrument_id = i.instrument_id))
            ORDER BY calculated_at LIMIT $2) AS h)
    DELETE FROM {table} AS p USING old
    WHERE p.instrument_id = old.instrument_id AND p.calculated_at = old.calculated_at
"""


@dataclass(frozen=True, slots=True)
class LatestMark:
    """The last mark of an instrument (quote per base). If it is not live, nothing may be opened by it."""

    price: Decimal
    is_live: bool


async def latest_marks(conn: Connection | Pool, instrument_ids: Sequence[str]) -> dict[str, LatestMark]:
    """The last mark of each instrument that ever had one: live unless it is frozen or older than MARK_AGE_MAX."""
    rows = await conn.fetch(_LATEST, instrument_ids, MARK_AGE_MAX)
    return {row["name"]: LatestMark(row["mark_price"], row["is_live"]) for row in rows}


async def forget_prices(conn: Connection, kept: timedelta, limit: int) -> int:
    """Delete index and mark prices older than `kept`, up to `limit` of each per instrument; how many it was."""
    deleted = 0
    for table in ("market.mark_prices", "market.index_prices"):
        status = await conn.execute(_FORGET.format(table=table), kept, limit)
        deleted += int(status.removeprefix("DELETE "))
    return deleted

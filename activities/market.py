"""The market service's history of prices."""

from datetime import timedelta

from storage.db import Connection

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


async def forget_prices(conn: Connection, kept: timedelta, limit: int) -> int:
    """Delete index and mark prices older than `kept`, up to `limit` of each per instrument; how many it was."""
    deleted = 0
    for table in ("market.mark_prices", "market.index_prices"):
        status = await conn.execute(_FORGET.format(table=table), kept, limit)
        deleted += int(status.removeprefix("DELETE "))
    return deleted

"""Free collateral: what of their money users may still use or take out (`domain.collateral`).

Read without a lock it is a forecast, good for refusing early. Where the money moves (`activities/ledger`) it is read
again under the balance's lock: every statement that starts under it sees all that was booked before, and nothing of
that user is booked, or collected, meanwhile.
"""

from collections.abc import Collection
from datetime import datetime
from decimal import Decimal

from domain.collateral import Collateral
from domain.money import ZERO
from storage.db import Connection

# So many funding times without a rate are looked at, the latest: 33 days of eight hours without an index.
DUES_MAX = 100
# More fills of one instrument are never applied to positions and not booked: settlement goes 4,000 events at a time,
# and a trade has two sides.
UNBOOKED_MAX = 10_000

# Funding times that have passed and are not collected: those with a rate, and those that have none yet, of which only
# the cap of the rate is known. Hardly ever are there any. All are looked up in the keys of small tables.
_DUES = """
    SELECT r.instrument_id, r.effective_at AS due_at, coalesce(u.rate, r.rate) AS rate,
           coalesce(u.mark_price, r.mark_price) AS mark_price, FALSE AS is_cap,
           coalesce(u.collected_user_id, 0) AS collected_user_id
    FROM matching.v_instruments i LEFT JOIN ledger.v_funding_cursors c USING (instrument_id)
    JOIN market.v_funding_rates r ON r.instrument_id = i.instrument_id
        AND r.effective_at > coalesce(c.collected_at, '-infinity') AND r.effective_at <= statement_timestamp()
    LEFT JOIN LATERAL (SELECT rate, mark_price, collected_user_id, status FROM ledger.v_funding_runs f
        WHERE f.instrument_id = r.instrument_id AND f.funding_time = r.effective_at LIMIT 1) u ON TRUE
    WHERE u.status IS DISTINCT FROM 'DONE'
    UNION ALL
    SELECT s.instrument_id, passed.due_at, s.rate_cap, m.mark_price, TRUE, 0
    FROM market.v_funding_schedules s
    CROSS JOIN LATERAL (SELECT coalesce(
        (SELECT max(effective_at) FROM market.v_funding_rates r
         WHERE r.instrument_id = s.instrument_id AND r.effective_at <= statement_timestamp()),
        (SELECT min(calculated_at) FROM market.v_mark_prices p WHERE p.instrument_id = s.instrument_id)) AS at) last
    CROSS JOIN LATERAL (
        SELECT to_timestamp(n * s.interval_seconds) AS due_at FROM generate_series(
            greatest(floor(extract(epoch FROM last.at) / s.interval_seconds) + 1,
                     floor(extract(epoch FROM statement_timestamp()) / s.interval_seconds) - $2::integer + 1),
            floor(extract(epoch FROM statement_timestamp()) / s.interval_seconds)) AS n) passed
    CROSS JOIN LATERAL (
        SELECT mark_price FROM market.v_mark_prices p WHERE p.instrument_id = s.instrument_id
        ORDER BY calculated_at DESC LIMIT 1) m
"""

# All of it is of one moment: a fill is either in the position at its loss, or among the fills that the ledger has not
# booked, or in what is available. Those fills are the newest of their instrument, and read in that order only.
_COLLATERAL = f"""
    WITH crossed AS MATERIALIZED (
        SELECT p.user_id, p.instrument_id, i.quote_asset AS asset, p.signed_quantity, p.entry_notional
        FROM positions.v_positions p JOIN matching.v_instruments i USING (instrument_id)
        WHERE p.user_id = ANY($1::bigint[]) AND p.margin_mode = 'CROSS'),
    unbooked AS MATERIALIZED (
        SELECT f.user_id, l.instrument_id, f.realized_pnl FROM ledger.v_cursors l CROSS JOIN LATERAL (
            SELECT user_id, realized_pnl FROM positions.v_fills
            WHERE instrument_id = l.instrument_id AND seq > l.applied_seq ORDER BY seq LIMIT {UNBOOKED_MAX}) f
        WHERE EXISTS (SELECT FROM crossed)),
    lost AS (
        SELECT user_id, asset, sum(loss) AS amount FROM (
            SELECT c.user_id, c.asset, CASE WHEN c.signed_quantity < 0 THEN -c.entry_notional ELSE c.entry_notional END
                   - c.signed_quantity * m.mark_price AS loss
            FROM crossed c CROSS JOIN LATERAL (
                SELECT mark_price FROM market.v_mark_prices p WHERE p.instrument_id = c.instrument_id
                ORDER BY calculated_at DESC LIMIT 1) m WHERE c.signed_quantity <> 0
            UNION ALL
            SELECT c.user_id, c.asset, -f.realized_pnl FROM crossed c JOIN unbooked f USING (user_id, instrument_id)
        ) losses GROUP BY user_id, asset)
    SELECT b.user_id, b.asset, b.available, coalesce(l.amount, 0) AS lost,
           (SELECT min(due_at) FROM ({_DUES}) dues) AS due_since
    FROM ledger.v_balances b LEFT JOIN lost l USING (user_id, asset) WHERE b.user_id = ANY($1)
"""

# The payment is domain.funding.funding_payment, and the position that of positions.fix_funding_positions: what is held
# now less the fills since. `{since}` is a literal, so that the planner knows how few those are, and the sum keeps it
# from going through all that a user ever traded instead.
_OWED = f"""
    WITH dues AS MATERIALIZED ({_DUES}),
    later AS (
        SELECT d.instrument_id, d.due_at, f.user_id,
               sum(CASE f.side WHEN 'BUY' THEN f.quantity ELSE -f.quantity END) AS quantity
        FROM dues d JOIN positions.v_fills f ON f.instrument_id = d.instrument_id AND f.executed_at > d.due_at
        WHERE f.executed_at > timestamptz '{{since}}' AND f.user_id + 0 = ANY($1::bigint[])
        GROUP BY d.instrument_id, d.due_at, f.user_id),
    held AS (
        SELECT p.user_id, i.quote_asset AS asset, d.mark_price, d.rate,
               CASE WHEN d.is_cap THEN abs(p.signed_quantity - coalesce(f.quantity, 0))
                    ELSE p.signed_quantity - coalesce(f.quantity, 0) END AS quantity
        FROM dues d JOIN matching.v_instruments i USING (instrument_id)
        JOIN positions.v_positions p ON p.instrument_id = d.instrument_id AND p.user_id = ANY($1)
            AND p.user_id > d.collected_user_id
        LEFT JOIN later f ON f.instrument_id = d.instrument_id AND f.due_at = d.due_at AND f.user_id = p.user_id)
    SELECT user_id, asset, sum(greatest(0, ceil(quantity * mark_price * rate * 100000000) * 0.00000001)) AS owed
    FROM held GROUP BY user_id, asset
"""


async def read_collateral(conn: Connection, user_ids: Collection[int]) -> dict[tuple[int, str], Collateral]:
    """What `user_ids` have and owe, by (user, asset); a user without a balance in an asset has no entry."""
    if not user_ids:
        return {}
    users = list(user_ids)
    rows = await conn.fetch(_COLLATERAL, users, DUES_MAX)
    since = next((row["due_since"] for row in rows if row["due_since"]), None)
    owed = {} if since is None else await _read_owed(conn, users, since)
    return {
        (row["user_id"], row["asset"]): Collateral(
            row["available"], row["lost"], owed.get((row["user_id"], row["asset"]), ZERO)
        )
        for row in rows
    }


async def free_collateral(conn: Connection, user_ids: Collection[int]) -> dict[tuple[int, str], Decimal]:
    """What `user_ids` may still use or take out, by (user, asset), in quote; below 0 it is nothing."""
    return {key: collateral.free for key, collateral in (await read_collateral(conn, user_ids)).items()}


async def _read_owed(conn: Connection, users: list[int], since: datetime) -> dict[tuple[int, str], Decimal]:
    rows = await conn.fetch(_OWED.format(since=since.isoformat()), users, DUES_MAX)
    return {(row["user_id"], row["asset"]): row["owed"] for row in rows}

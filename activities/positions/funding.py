"""Funding as positions see it: who held what at a funding time, and payments as realised profit."""

from collections.abc import Sequence
from datetime import datetime

from activities.positions.margins import adopt
from activities.positions.rows import PositionRow
from domain.funding import FUNDING_PAGE, FundingPage, FundingSnapshot
from domain.margin import Tier
from storage.db import Connection
from storage.once import NotYetError
from storage.rows import column_list, read


async def fix_funding_positions(conn: Connection, snapshot: FundingSnapshot) -> None:
    """Write down, once, what everybody held at a funding time. Raises NotYetError before
    all fills up to it are applied."""
    run = snapshot.run
    # The lock keeps settlement from moving on meanwhile, and a second attempt from adding to the first.
    applied_seq = await conn.fetchval(
        "SELECT applied_seq FROM positions.cursors WHERE instrument_id = $1 FOR UPDATE", run.instrument_id
    )
    if applied_seq < snapshot.event_seq:
        raise NotYetError(f"Positions are at event {applied_seq} of {snapshot.event_seq}")
    terms = await conn.fetchrow(
        "SELECT mark_price, rate FROM ledger.v_funding_runs WHERE instrument_id = $1 AND funding_time = $2",
        run.instrument_id,
        run.time,
    )
    assert terms is not None, f"Expected {run} to be open"
    # The payment is domain.funding.funding_payment, in SQL because there are so many (a test compares the two).
    await conn.execute(
        "INSERT INTO positions.funding_positions (instrument_id, funding_time, user_id, signed_quantity, payment)"
        " SELECT $1, $2, user_id, quantity, floor(-quantity * $3::numeric * $4::numeric * 100000000) * 0.00000001"
        " FROM (SELECT p.user_id, p.signed_quantity - coalesce(f.quantity, 0) AS quantity FROM positions.positions p"
        "   LEFT JOIN (SELECT user_id, sum(CASE side WHEN 'BUY' THEN quantity ELSE -quantity END) AS quantity"
        "     FROM positions.position_events WHERE instrument_id = $1 AND created_at > $2 AND trade_id IS NOT NULL"
        "     GROUP BY user_id) f USING (user_id) WHERE p.instrument_id = $1) held"
        " WHERE quantity <> 0 AND NOT EXISTS (SELECT FROM positions.funding_positions"
        "   WHERE instrument_id = $1 AND funding_time = $2)",
        run.instrument_id,
        run.time,
        *terms,
    )


async def confirm_funding(conn: Connection, page: FundingPage, tiers: Sequence[Tier]) -> None:
    """Make the payments of a page realised profit, once, and follow the margins that they were taken from."""
    instrument_id, time = page.run.instrument_id, page.run.time
    last_user_id = await conn.fetchval(
        "SELECT max(user_id) FROM (SELECT p.user_id FROM (SELECT user_id FROM positions.funding_positions"
        "   WHERE instrument_id = $1 AND funding_time = $2 AND user_id > $3 ORDER BY user_id LIMIT $4) f"
        "  JOIN positions.positions p ON p.instrument_id = $1 AND p.user_id = f.user_id"
        "  ORDER BY p.user_id FOR UPDATE OF p) locked",
        instrument_id,
        time,
        page.after_user_id,
        FUNDING_PAGE,
    )
    if last_user_id is None or await conn.fetchval(
        "SELECT EXISTS (SELECT FROM positions.position_events"
        " WHERE instrument_id = $1 AND funding_time = $2 AND user_id = $3)",
        instrument_id,
        time,
        last_user_id,
    ):
        return
    those = (instrument_id, time, page.after_user_id, last_user_id)
    await conn.execute(
        "INSERT INTO positions.position_events (user_id, instrument_id, funding_time, type, status, side, price,"
        "  quantity, realized_pnl, signed_quantity_after, entry_notional_after, leverage, cause)"
        " SELECT user_id, instrument_id, funding_time, 'FUNDING', 'SETTLED',"
        "  CASE WHEN f.signed_quantity > 0 THEN 'LONG' ELSE 'SHORT' END, r.mark_price, abs(f.signed_quantity),"
        "  f.payment, p.signed_quantity, p.entry_notional, p.leverage, 'FUNDING'"
        " "
        " FROM positions.funding_positions f JOIN positions.positions p USING (user_id, instrument_id)"
        " JOIN ledger.v_funding_runs r USING (instrument_id, funding_time)"
        " WHERE instrument_id = $1 AND funding_time = $2 AND user_id > $3 AND user_id <= $4 ORDER BY user_id",
        *those,
    )
    await conn.execute(
        "UPDATE positions.positions p SET realized_pnl = p.realized_pnl + f.payment, updated_at = now()"
        " FROM positions.funding_positions f WHERE f.instrument_id = $1 AND f.funding_time = $2 AND f.user_id > $3"
        " AND f.user_id <= $4 AND p.instrument_id = $1 AND p.user_id = f.user_id",
        *those,
    )
    # Only those who paid from their margin: to all others a balance has been pushed, and nothing else has changed.
    moved = await conn.fetch(
        f"SELECT {column_list(PositionRow, 'p')}"
        " FROM positions.funding_positions f JOIN positions.positions p USING (user_id, instrument_id)"
        " JOIN ledger.v_margin_holds h USING (user_id, instrument_id) WHERE instrument_id = $1 AND funding_time = $2"
        " AND user_id > $3 AND user_id <= $4 AND p.margin_version <> h.margin_version ORDER BY user_id",
        *those,
    )
    await adopt(conn, instrument_id, read(PositionRow, moved), tiers)


async def follow_funding(conn: Connection, page: FundingPage, instrument_id: str, tiers: Sequence[Tier]) -> None:
    """Copy the margins that payers of a page have left in another instrument, where they are not those known here.

    Positions whose last fills are not confirmed are left to `confirm`, which copies the margin as well.
    """
    rows = await conn.fetch(
        f"SELECT {column_list(PositionRow, 'p')}"
        " FROM positions.positions p JOIN ledger.v_margin_holds h USING (user_id, instrument_id)"
        " JOIN (SELECT user_id, payment FROM positions.funding_positions WHERE instrument_id = $1 AND funding_time = $2"
        "   AND user_id > $3 ORDER BY user_id LIMIT $4) f USING (user_id)"
        " WHERE p.instrument_id = $5 AND f.payment < 0 AND p.margin_version <> h.margin_version"
        " AND NOT EXISTS (SELECT FROM positions.position_events e JOIN positions.cursors c USING (instrument_id)"
        "   WHERE e.instrument_id = $5 AND e.user_id = p.user_id AND e.seq > c.confirmed_seq)"
        " ORDER BY p.user_id FOR UPDATE OF p",
        page.run.instrument_id,
        page.run.time,
        page.after_user_id,
        FUNDING_PAGE,
        instrument_id,
    )
    if rows:
        await adopt(conn, instrument_id, read(PositionRow, rows), tiers)


async def forget_funding_positions(conn: Connection, before: datetime, limit: int) -> int:
    """Delete up to `limit` positions of funding settlements that were done before then; how many it was.

    The payments stay, as events of the positions.
    """
    status = await conn.execute(
        "DELETE FROM positions.funding_positions p USING (SELECT f.instrument_id, f.funding_time, f.user_id"
        "  FROM positions.funding_positions f JOIN ledger.v_funding_runs r USING (instrument_id, funding_time)"
        "  WHERE r.status = 'DONE' AND r.updated_at < $1 LIMIT $2) old"
        " WHERE (p.instrument_id, p.funding_time, p.user_id) = (old.instrument_id, old.funding_time, old.user_id)",
        before,
        limit,
    )
    return int(status.split()[-1])

"""The moments at which the laws can be judged: nothing is under way, and the marks are where they were held."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from decimal import Decimal

from storage.db import Connection, Pool
from tests.adversary_run.standing import read_marks, read_standing

# A rate of before the schedules of funding were made is settled by nobody; nobody held anything then.
_UNDER_WAY = {
    "sagas": "SELECT count(*) FROM orders.sagas WHERE NOT done",
    "amendments": "SELECT count(*) FROM orders.amendments WHERE status IN ('PENDING', 'ACCEPTED')",
    "orders": "SELECT count(*) FROM orders.orders WHERE status IN ('PENDING', 'ACCEPTED', 'CANCEL_REQUESTED')",
    "events": """
        SELECT count(*) FROM matching.sequencers s JOIN matching.cursors m USING (instrument_id)
        JOIN positions.cursors p USING (instrument_id) JOIN risk.cursors r USING (instrument_id)
        JOIN ledger.cursors l USING (instrument_id) JOIN orders.cursors o USING (instrument_id)
        WHERE s.last_seq <> m.command_seq OR m.event_seq <> p.confirmed_seq OR m.event_seq <> r.applied_seq
           OR m.event_seq <> l.applied_seq OR m.event_seq <> o.applied_seq""",
    "liquidations": "SELECT count(*) FROM risk.liquidation_queue WHERE status IN ('PENDING', 'PROCESSING')",
    "uncovered orders": "SELECT count(*) FROM ledger.margin_holds WHERE order_short <> 0",
    "funding": """
        SELECT count(*) FROM market.funding_rates r LEFT JOIN ledger.funding_runs u
            ON u.instrument_id = r.instrument_id AND u.funding_time = r.effective_at
        WHERE u.status IS DISTINCT FROM 'DONE' AND r.effective_at > (SELECT at FROM witness.started)""",
}
# With everybody's positions in the instruments of liquidations, for whoever looks into what stands.
_STANDING_LIQUIDATIONS = """
    SELECT format('liquidation %s of user %s %s %s', q.liquidation_id, q.user_id, q.instrument_id, q.margin_mode)
        || string_agg(format(' [user %s %s %s/%s margin %s %s %s]', p.user_id, p.margin_mode, p.signed_quantity,
                             p.entry_notional, h.position_margin, p.status, b.available), '' ORDER BY p.user_id)
    FROM risk.liquidation_queue q JOIN positions.positions p ON p.instrument_id = q.instrument_id
        AND p.signed_quantity <> 0
    LEFT JOIN ledger.margin_holds h ON h.user_id = p.user_id AND h.instrument_id = p.instrument_id
    LEFT JOIN ledger.ledger_balances b ON b.user_id = p.user_id
    WHERE q.status IN ('PENDING', 'PROCESSING')
    GROUP BY q.liquidation_id, q.user_id, q.instrument_id, q.margin_mode ORDER BY q.liquidation_id
"""
# Longer than any liquidation with its back-offs: what is not over by then will not be.
QUIET_SECONDS = 90
PAUSE_SECONDS = 0.05


class UnquietError(AssertionError):
    """The exchange did not come to rest: what was still under way."""


@asynccontextmanager
async def quiet(pool: Pool, marks: Mapping[str, Decimal]) -> AsyncIterator[Connection]:
    """One snapshot of a moment in which nothing is under way, nobody is due, and the marks are `marks`.

    Raises UnquietError after QUIET_SECONDS.
    """
    clock = asyncio.get_running_loop().time
    end = clock() + QUIET_SECONDS
    async with pool.acquire() as conn:
        while True:
            async with conn.transaction(isolation="repeatable_read", readonly=True):
                busy = await _under_way(conn, marks)
                if not busy:
                    yield conn
                    return
            if clock() > end:
                rows = await conn.fetch(_STANDING_LIQUIDATIONS)
                raise UnquietError("; ".join([*busy, *(row[0] for row in rows), f"marks {await read_marks(conn)}"]))
            await asyncio.sleep(PAUSE_SECONDS)


async def _under_way(conn: Connection, marks: Mapping[str, Decimal]) -> list[str]:
    counts = {what: await conn.fetchval(query) for what, query in _UNDER_WAY.items()}
    busy = [f"{count} {what}" for what, count in counts.items() if count]
    now = await read_marks(conn)
    busy += [f"mark of {name} is {now.get(name)}" for name, mark in marks.items() if now.get(name) != mark]
    if not busy:
        for user_id, stands in (await read_standing(conn)).items():
            busy += [f"user {user_id} is due and not liquidated: {what}" for what in stands.due()]
    return busy

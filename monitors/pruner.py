"""The pruner: deletes old prices and risk snapshots, finished sagas, the results of their steps, and the positions that
finished funding settlements went by, once nothing can ask for them; what tells by which marks users were told of their
positions; sessions that ended; and the records of attempts to sign in, which are
kept for EXCHANGE_LOGIN_AUDIT_RETENTION_DAYS.

Deposits and withdrawals keep theirs for ever: their references are the callers', who may repeat one at any time.
"""

import asyncio
import logging
from datetime import timedelta

from activities.identity.auth import forget_login_audits
from activities.identity.sessions import forget_sessions
from activities.liquidation.telling import forget_snapshots
from activities.market.prices import forget_prices
from activities.orders.sagas import forget_done_sagas, time_before_open_sagas
from activities.positions.funding import forget_funding_positions
from activities.positions.telling import forget_told_marks
from storage.db import Connection, Pool
from storage.leadership import PRUNER_LOCK, run_as_leader
from storage.once import forget_steps

log = logging.getLogger(__name__)

KEPT = timedelta(days=7)
PRICES_KEPT = timedelta(days=7)
PRUNE_SECONDS = 600.0
# Short transactions: neither locks nor vacuum wait for a long one.
DELETED_MAX = 2_000


async def run_pruner(pool: Pool, audits_kept: timedelta, stop: asyncio.Event) -> None:
    """Prune until `stop`, while this process leads."""

    async def prune_for_ever(conn: Connection) -> None:
        while True:
            deleted = await prune(conn, KEPT, audits_kept)
            if deleted:
                log.info("Deleted %d old steps, sagas, prices and login audits", deleted)
            await asyncio.sleep(PRUNE_SECONDS)

    await run_as_leader(pool, PRUNER_LOCK, stop, prune_for_ever)


async def prune(conn: Connection, kept: timedelta, audits_kept: timedelta, limit: int = DELETED_MAX) -> int:
    """Delete what is older than `kept` and than every saga still open, and login audits older than `audits_kept`,
    `limit` rows at a time; how many it was."""
    before = await time_before_open_sagas(conn, kept)
    total = 0
    while deleted := (
        await forget_steps(conn, "risk", before, limit)
        + await forget_steps(conn, "ledger", before, limit)
        + await forget_done_sagas(conn, before, limit)
        + await forget_snapshots(conn, limit)
        + await forget_prices(conn, PRICES_KEPT, limit)
        + await forget_funding_positions(conn, before, limit)
        + await forget_told_marks(conn, kept, limit)
        + await forget_sessions(conn, kept, limit)
        + await forget_login_audits(conn, audits_kept, limit)
    ):
        total += deleted
    return total

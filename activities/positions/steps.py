"""The steps of the sagas that belong to the positions service: what everybody holds and at which entry price."""

from temporalio import activity

from activities.matching.engine_log import EngineLog
from activities.matching.instruments import RuleBook
from activities.positions.funding import confirm_funding, fix_funding_positions, follow_funding
from activities.positions.margins import adopt_changed_margin, confirm, follow_draws, has_drawn_elsewhere
from activities.positions.trades import apply_trades
from domain.funding import CONFIRM_FUNDING, FIX_FUNDING_POSITIONS, FundingPage, FundingSnapshot
from domain.margin_changes import ADOPT_MARGIN, MarginChange
from domain.sagas import APPLY_TRADES, CONFIRM_POSITIONS, EventRange
from storage.db import Pool
from storage.once import advance_cursor


class PositionActivities:
    """Activities on the positions service's own tables."""

    def __init__(self, pool: Pool, log: EngineLog) -> None:
        self._pool = pool
        self._log = log
        self._rules = RuleBook()

    @activity.defn(name=APPLY_TRADES)
    async def apply_trades(self, events: EventRange) -> None:
        """Fold the trades of a range of engine events into positions, one `position_events` row per side."""
        async with self._pool.acquire() as conn, conn.transaction():
            if await advance_cursor(conn, "positions", events):
                await apply_trades(conn, events, await self._log.read(conn, events), await self._rules.rules(conn))

    @activity.defn(name=CONFIRM_POSITIONS)
    async def confirm(self, events: EventRange) -> None:
        """After the ledger: take over the margin it really holds and the profit it booked, close what is flat."""
        async with self._pool.acquire() as conn:
            tiers = (await self._rules.rules(conn)).tiers
            async with conn.transaction():
                if await advance_cursor(conn, "positions", events, "confirmed_seq"):
                    await confirm(conn, events, tiers[events.instrument_id])
                drew_elsewhere = await has_drawn_elsewhere(conn, events)
            if drew_elsewhere:
                # Instrument by instrument, as in `confirm_funding`.
                for other in sorted(tiers.keys() - {events.instrument_id}):
                    async with conn.transaction():
                        await follow_draws(conn, events, other, tiers[other])

    @activity.defn(name=FIX_FUNDING_POSITIONS)
    async def fix_funding_positions(self, snapshot: FundingSnapshot) -> None:
        """Write down, once, what everybody held at the funding time: what they hold now less the fills after it.

        Raises NotYetError before all fills that the snapshot waits for are applied.
        """
        async with self._pool.acquire() as conn, conn.transaction():
            await fix_funding_positions(conn, snapshot)

    @activity.defn(name=CONFIRM_FUNDING)
    async def confirm_funding(self, page: FundingPage) -> None:
        """After the ledger: payments of a page become realised profit, once, and margins follow the ledger's.

        Those of other instruments, too: a payment may have taken of them.
        """
        async with self._pool.acquire() as conn:
            tiers = (await self._rules.rules(conn)).tiers
            instrument_id = page.run.instrument_id
            async with conn.transaction():
                await confirm_funding(conn, page, tiers[instrument_id])
            # Instrument by instrument: the runs of two that lock each other's positions would wait for one another.
            for other in sorted(tiers.keys() - {instrument_id}):
                async with conn.transaction():
                    await follow_funding(conn, page, other, tiers[other])

    @activity.defn(name=ADOPT_MARGIN)
    async def adopt_margin(self, change: MarginChange) -> None:
        """After the ledger: take over a position's margin and the leverage in force."""
        async with self._pool.acquire() as conn, conn.transaction():
            tiers = (await self._rules.rules(conn)).tiers[change.instrument_id]
            await adopt_changed_margin(conn, change, tiers)

"""The steps of the sagas that belong to the ledger: every movement of money, double entry."""

from temporalio import activity

from activities.ledger.funding import Untold, close_funding, funding_uncovered, open_funding, settle_page
from activities.ledger.insurance import claim_insurance, release_insurance
from activities.ledger.margin import freeze_funds, move_margin, unfreeze_funds
from activities.ledger.settlement import settle_events, uncovered_users
from domain.funding import (
    CLOSE_FUNDING,
    FUNDING_UNCOVERED,
    OPEN_FUNDING,
    SETTLE_FUNDING,
    FundingPage,
    FundingRun,
    FundingTotals,
)
from domain.liquidation_saga import CLAIM_INSURANCE, RELEASE_INSURANCE, Claim
from domain.margin_changes import MOVE_MARGIN, MarginChange, MarginMoved
from domain.money import plain
from domain.sagas import FREEZE_FUNDS, SETTLE, UNFREEZE_FUNDS, EventRange, Outcome, StepRequest, Uncovered
from storage.db import Pool
from storage.once import NotYetError, advance_cursor, first_result, store_result


class LedgerActivities:
    """Activities on the ledger service's own tables."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    @activity.defn(name=FREEZE_FUNDS)
    async def freeze_funds(self, request: StepRequest) -> Outcome:
        """Hold the margin that the check of the same step asked for: per user and instrument, all or nothing."""
        step_id = f"freeze:{request.step_id}"
        async with self._pool.acquire() as conn, conn.transaction():
            done = await first_result(conn, "ledger", step_id, Outcome)
            if done is None:
                done = await freeze_funds(conn, request)
                await store_result(conn, "ledger", step_id, done)
        return done

    @activity.defn(name=UNFREEZE_FUNDS)
    async def unfreeze_funds(self, request: StepRequest) -> None:
        """Compensation of `freeze_funds`, after `risk.release_orders` of the same step: bring holds in line."""
        step_id = f"unfreeze:{request.release_id}"
        async with self._pool.acquire() as conn, conn.transaction():
            if await first_result(conn, "ledger", step_id, Outcome) is None:
                await unfreeze_funds(conn, request)
                await store_result(conn, "ledger", step_id, Outcome(request.order_ids))

    @activity.defn(name=MOVE_MARGIN)
    async def move_margin(self, change: MarginChange) -> MarginMoved:
        """Carry out what risk planned for a change of margin or leverage; more margin than is available is refused."""
        # Named as a freeze: later checks of the user wait for it as for one.
        step_id = f"freeze:{change.change_id}"
        async with self._pool.acquire() as conn, conn.transaction():
            done = await first_result(conn, "ledger", step_id, MarginMoved)
            if done is None:
                done = await move_margin(conn, change)
                await store_result(conn, "ledger", step_id, done)
        return done

    @activity.defn(name=SETTLE)
    async def settle(self, events: EventRange) -> list[int]:
        """Book the fills of a range of engine events and divide every touched wallet anew.

        Answers the users whose open orders are no longer covered in full, because a loss took the money.
        """
        async with self._pool.acquire() as conn, conn.transaction():
            if await advance_cursor(conn, "ledger", events):
                await settle_events(conn, events)
            return await uncovered_users(conn, events.instrument_id)

    @activity.defn(name=OPEN_FUNDING)
    async def open_funding(self, run: FundingRun) -> bool:
        """Fix the rate and the price of a funding settlement; False when it was done before.

        Raises NotYetError while the market has published none for that time (it does not while its index is frozen).
        """
        async with self._pool.acquire() as conn, conn.transaction():
            return await open_funding(conn, run)

    @activity.defn(name=SETTLE_FUNDING)
    async def settle_funding(self, page: FundingPage) -> int | None:
        """Book a page of payments, once; where the next page starts, None when there is none.

        Raises NotYetError while the engine has not carried out, or settlement not finished with, what the payments wait
        for: what they take of margins, which it is told here, and orders of liquidations that count on the same money.
        """
        async with self._pool.acquire() as conn, conn.transaction():
            settled = await settle_page(conn, page)
        if isinstance(settled, Untold):
            # What was told stays told: this comes after the transaction.
            raise NotYetError(f"The engine is told what the page after {page.after_user_id} takes of margins")
        return settled

    @activity.defn(name=FUNDING_UNCOVERED)
    async def funding_uncovered(self, page: FundingPage) -> list[Uncovered]:
        """Whose open orders, by instrument, are no longer covered in full after a page: their money paid for it."""
        async with self._pool.acquire() as conn:
            return await funding_uncovered(conn, page)

    @activity.defn(name=CLOSE_FUNDING)
    async def close_funding(self, run: FundingRun) -> FundingTotals:
        """After the last page: what rounding left over goes to its account."""
        async with self._pool.acquire() as conn, conn.transaction():
            return await close_funding(conn, run)


class InsuranceActivities:
    """Activities on the ledger service's own tables."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    @activity.defn(name=CLAIM_INSURANCE)
    async def claim(self, claim: Claim) -> str:
        """What the fund grants (quote, up to what is asked for): its balance less what it has promised to others."""
        async with self._pool.acquire() as conn, conn.transaction():
            return plain(await claim_insurance(conn, claim))

    @activity.defn(name=RELEASE_INSURANCE)
    async def release(self, liquidation_id: int) -> None:
        """The claims of a liquidation end; what it needed is booked."""
        async with self._pool.acquire() as conn, conn.transaction():
            await release_insurance(conn, liquidation_id)

"""The steps of the sagas that belong to the risk service: exposures, the margin that open orders need, limits."""

from temporalio import activity

from activities.matching.engine_log import EngineLog
from activities.matching.instruments import RuleBook
from activities.risk.check import check_orders, read_unfinished_of
from activities.risk.events import apply_range, release_claims, users_of, waiting_liquidations
from activities.risk.margin_changes import plan_change
from activities.risk.unfinished import Unfinished, once_applied
from domain.margin_changes import PLAN_MARGIN_CHANGE, MarginChange, MarginVerdict
from domain.sagas import APPLY_RISK_EVENTS, CHECK_ORDERS, RELEASE_ORDERS, EventRange, Outcome, StepRequest
from domain.steps import CheckResult, MarginMoves, MarginPlan, settle_step
from storage.db import Connection, Pool
from storage.once import advance_cursor, first_result, store_result

# How long a check, or the plan of a change, waits for settlement: less than a try of its step may take.
PATIENCE_SECONDS = 1.0


class RiskActivities:
    """Activities on the risk service's own tables."""

    def __init__(self, pool: Pool, log: EngineLog, patience_seconds: float = PATIENCE_SECONDS) -> None:
        self._pool = pool
        self._log = log
        self._patience_seconds = patience_seconds
        self._rules = RuleBook()

    @activity.defn(name=CHECK_ORDERS)
    async def check_orders(self, request: StepRequest) -> Outcome:
        """Admit the orders that limits and money allow, one after the other, and add them to the exposures.

        Some would be refused although their users were told what settlement has not applied yet: that is waited for,
        for `PATIENCE_SECONDS`, since a timer of the workflow may go off a second late; then they are busy.
        """
        step_id = f"check:{request.step_id}"

        async def check(conn: Connection, earlier: list[EventRange] | None) -> tuple[CheckResult, Unfinished]:
            done = await first_result(conn, "risk", step_id, CheckResult)
            if done is not None:
                return done, Unfinished([])
            unfinished = await read_unfinished_of(conn, request, earlier)
            done = await check_orders(conn, request, await self._rules.rules(conn), unfinished)
            await store_result(conn, "risk", step_id, done)
            return done, unfinished

        done = await once_applied(self._pool, check, self._patience_seconds)
        return Outcome([margin.order_id for margin in done.passed], done.refused, done.busy, done.backed)

    @activity.defn(name=RELEASE_ORDERS)
    async def release_orders(self, request: StepRequest) -> None:
        """Compensation of `check_orders`: take the orders out of the exposures again."""
        step_id = f"release:{request.release_id}"
        async with self._pool.acquire() as conn, conn.transaction():
            if await first_result(conn, "risk", step_id, MarginMoves) is None:
                released = await release_claims(conn, request, await self._rules.rules(conn))
                await store_result(conn, "risk", step_id, released)

    @activity.defn(name=PLAN_MARGIN_CHANGE)
    async def plan_margin_change(self, change: MarginChange) -> MarginVerdict:
        """Decide on a change of leverage or position margin; a new leverage holds for everything checked later."""
        step_id = f"adjust:{change.change_id}"

        async def plan(conn: Connection, earlier: list[EventRange] | None) -> tuple[MarginPlan | None, Unfinished]:
            done = await first_result(conn, "risk", step_id, MarginPlan)
            if done is not None:
                return done, Unfinished([])
            done, unfinished = await plan_change(conn, change, await self._rules.rules(conn), earlier)
            if done is not None:
                await store_result(conn, "risk", step_id, done)
            return done, unfinished

        done = await once_applied(self._pool, plan, self._patience_seconds)
        return MarginVerdict(is_busy=True) if done is None else MarginVerdict(done.refusal)

    @activity.defn(name=APPLY_RISK_EVENTS)
    async def apply_events(self, events: EventRange) -> list[str]:
        """Fold a range of engine events into the exposures; the margin moves are stored for the ledger.

        Answers the workflow ids of liquidations that these events are of interest to (a repeat: of any), WAITING_MAX at
        most; the others look for themselves.
        """
        async with self._pool.acquire() as conn, conn.transaction():
            if not await advance_cursor(conn, "risk", events):
                return await waiting_liquidations(conn, None)
            log = await self._log.read(conn, events)
            moves = await apply_range(conn, events, log, await self._rules.rules(conn))
            await store_result(conn, "risk", settle_step(events), moves)
            return await waiting_liquidations(conn, users_of(log))

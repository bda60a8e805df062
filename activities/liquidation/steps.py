"""The steps of the sagas that liquidate, on the risk service's own tables."""

from datetime import UTC, datetime

from redis.asyncio import Redis
from temporalio import activity

from activities.liquidation.planning import plan_next
from activities.liquidation.queue import give_back, stop_submitting, take_over
from activities.liquidation.submitting import submit_deleverage, submit_order
from activities.market.prices import latest_marks
from activities.matching.instruments import RuleBook, read_instruments
from domain.liquidation_saga import (
    BEGIN,
    DELEVERAGE,
    FINISH,
    PLAN,
    STOP,
    SUBMIT,
    Ending,
    Plan,
    PlanRequest,
    Submission,
    Takeover,
)
from storage.db import Pool
from storage.once import first_result, store_result
from storage.reference_prices import marks_are_live, read_reference_prices


class LiquidationActivities:
    """Activities on the risk service's own tables."""

    def __init__(self, pool: Pool, redis: Redis) -> None:
        self._pool = pool
        self._redis = redis
        self._rules = RuleBook()

    @activity.defn(name=BEGIN)
    async def begin(self, liquidation_id: int) -> Takeover:
        """The row becomes PROCESSING; answers whose orders have to go. Not open: it has been done before."""
        async with self._pool.acquire() as conn, conn.transaction():
            return await take_over(conn, liquidation_id)

    @activity.defn(name=PLAN)
    async def plan(self, request: PlanRequest) -> Plan:
        """What is next, from one snapshot of all services and the newest mark price. Changes nothing."""
        prices = await read_reference_prices(self._redis, list((await read_instruments(self._pool)).keys()))
        now = datetime.now(UTC)
        marks = {name: price.mark for name, price in prices.items() if marks_are_live(price, now)}
        async with self._pool.acquire() as conn, conn.transaction(isolation="repeatable_read", readonly=True):
            return await plan_next(conn, request, marks, await self._rules.rules(conn))

    @activity.defn(name=SUBMIT)
    async def submit(self, submission: Submission) -> bool:
        """Insert the liquidation order and append it to the engine's log; False once an operator has stopped it."""
        step_id = f"liquidate:{submission.liquidation_id}:{submission.round}"
        async with self._pool.acquire() as conn, conn.transaction():
            done = await first_result(conn, "risk", step_id, bool)
            if done is None:
                done = await submit_order(conn, submission, await self._rules.rules(conn))
                await store_result(conn, "risk", step_id, done)
        return done

    @activity.defn(name=DELEVERAGE)
    async def deleverage(self, submission: Submission) -> int:
        """Append a Deleverage against the ranked opposite positions; how many they are (0: none, nothing appended)."""
        step_id = f"liquidate:{submission.liquidation_id}:{submission.round}"
        async with self._pool.acquire() as conn, conn.transaction():
            done = await first_result(conn, "risk", step_id, int)
            if done is None:
                done = await submit_deleverage(conn, submission, await self._rules.rules(conn))
                await store_result(conn, "risk", step_id, done)
        return done

    @activity.defn(name=STOP)
    async def stop(self, liquidation_id: int) -> None:
        """From here on nothing is submitted; a submission that is under way has been made, or will not be."""
        await stop_submitting(self._pool, liquidation_id)

    @activity.defn(name=FINISH)
    async def finish(self, ending: Ending) -> None:
        """The row ends, the position is its user's again (or closed), and they are told."""
        latest = await latest_marks(self._pool, list((await read_instruments(self._pool)).keys()))
        marks = {name: mark.price for name, mark in latest.items()}
        async with self._pool.acquire() as conn, conn.transaction():
            await give_back(conn, ending, marks, await self._rules.rules(conn))

"""The steps of the sagas that belong to the orders service: from PENDING to an order's final state."""

import logging
from collections import Counter

import msgspec
from redis.asyncio import Redis
from redis.exceptions import RedisError
from temporalio import activity

from activities.matching.engine_log import EngineLog
from activities.matching.instruments import RuleBook
from activities.orders.acceptance import accept_batch, fail_batch
from activities.orders.cancels import cancel_of_liquidated, cancel_uncovered_of, request_checked
from activities.orders.outcomes import apply_changes, fold_events
from activities.orders.sagas import close_saga
from domain.liquidation_saga import CANCEL_ORDERS, Takeover
from domain.sagas import (
    ACCEPT_ORDERS,
    APPLY_ORDER_EVENTS,
    CANCEL_UNCOVERED,
    REQUEST_CANCELS,
    Acceptance,
    EventRange,
    OrderBatch,
    Outcome,
    Uncovered,
    Verdict,
)
from storage.db import Pool
from storage.once import advance_cursor
from telemetry.metrics import ORDERS

log = logging.getLogger(__name__)
VERDICTS_CHANNEL = "orders:verdicts"


class OrderActivities:
    """Activities on the orders service's own tables."""

    def __init__(self, pool: Pool, redis: Redis, log: EngineLog) -> None:
        self._pool = pool
        self._redis = redis
        self._log = log
        self._rules = RuleBook()

    @activity.defn(name=ACCEPT_ORDERS)
    async def accept(self, acceptance: Acceptance) -> Verdict:
        """End the placement of orders and amendments: ACCEPTED and in the command log, or FAILED with the reason; one
        transaction."""
        async with self._pool.acquire() as conn, conn.transaction():
            await accept_batch(conn, acceptance, (await self._rules.rules(conn)).instruments)
            if acceptance.refused:
                await fail_batch(conn, acceptance)
            await close_saga(conn, acceptance.saga_id)
        verdict = Verdict(len(acceptance.passed), acceptance.refused)
        ORDERS.labels("ACCEPTED").inc(len(acceptance.passed))
        ORDERS.labels("FAILED").inc(len(acceptance.refused))
        # A hint for the api process that waits; what counts is committed, so the saga does not wait for Redis.
        try:
            await self._redis.publish(
                VERDICTS_CHANNEL, msgspec.json.encode({"sagaId": acceptance.saga_id, "verdict": verdict})
            )
        except (RedisError, OSError) as error:
            log.warning("The verdict of %s could not be announced: %r", acceptance.saga_id, error)
        return verdict

    @activity.defn(name=REQUEST_CANCELS)
    async def request_cancels(self, batch: OrderBatch) -> Outcome:
        """Append CANCEL commands for the orders the engine has; `busy` are those still on their way to it."""
        async with self._pool.acquire() as conn, conn.transaction():
            requested, waiting = await request_checked(conn, batch.order_ids)
            if not waiting:
                await close_saga(conn, batch.saga_id)
        return Outcome(requested, busy=waiting)

    @activity.defn(name=APPLY_ORDER_EVENTS)
    async def apply_events(self, events: EventRange) -> None:
        """Fold a range of engine events into the orders and tell their users."""
        async with self._pool.acquire() as conn, conn.transaction():
            if await advance_cursor(conn, "orders", events):
                instrument = (await self._rules.rules(conn)).instruments[events.instrument_id]
                changes = fold_events(await self._log.read(conn, events), instrument)
                await apply_changes(conn, changes)
                for outcome, count in Counter(change.final_status for change in changes.values()).items():
                    ORDERS.labels(outcome or "OPEN").inc(count)

    @activity.defn(name=CANCEL_UNCOVERED)
    async def cancel_uncovered(self, uncovered: Uncovered) -> None:
        """Request the cancellation of all open orders, in one instrument, of users whose money a loss took."""
        async with self._pool.acquire() as conn, conn.transaction():
            await cancel_uncovered_of(conn, [(user_id, uncovered.instrument_id) for user_id in uncovered.user_ids])

    @activity.defn(name=CANCEL_ORDERS)
    async def cancel_for_liquidation(self, takeover: Takeover) -> int:
        """Request the cancellation of all open orders of a user whose position is liquidated; how many it was now."""
        async with self._pool.acquire() as conn, conn.transaction():
            return await cancel_of_liquidated(conn, takeover.user_id, takeover.instrument_ids)

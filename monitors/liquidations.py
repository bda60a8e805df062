"""The risk monitor: with every mark price, finds who has to be liquidated or warned, and starts the workflows."""

import asyncio
import logging
from datetime import UTC, datetime, timedelta
from decimal import Decimal

from redis.asyncio import Redis
from redis.exceptions import RedisError
from temporalio.client import Client
from temporalio.common import (
    SearchAttributeKey,
    SearchAttributePair,
    TypedSearchAttributes,
    WorkflowIDConflictPolicy,
    WorkflowIDReusePolicy,
)
from temporalio.exceptions import WorkflowAlreadyStartedError
from temporalio.service import RPCError

from activities.liquidation.triggering import Opened, stalled, trigger
from activities.liquidation.warnings import warn
from activities.matching.instruments import Rules, read_instruments, read_tiers
from activities.positions.telling import tell_moved
from activities.risk.terms import tell_lower_covers
from clients import LIQUIDATION_QUEUE
from domain.liquidation_saga import LIQUIDATION, LiquidationInput
from storage.db import Connection, Pool
from storage.leadership import LIQUIDATION_LOCK, run_as_leader
from storage.reference_prices import ReferencePrice, marks_are_live, read_reference_prices
from storage.waiting import pause

log = logging.getLogger(__name__)

LOOK_SECONDS_MAX = 1.0
SWEEP_SECONDS = 5.0
STALLED_AFTER = timedelta(seconds=5)
SWEEP_MAX = 200
STARTS_AT_ONCE = 20
REDIS_SECONDS_MAX = 5.0
# Of each instrument, users whose positions are looked at for PositionUpdated in one look.
TOLD_USERS = 200
_USER_ID = SearchAttributeKey.for_keyword("UserId")
_INSTRUMENT_ID = SearchAttributeKey.for_keyword("InstrumentId")


async def run_liquidations(
    pool: Pool, redis: Redis, client: Client, interval_seconds: float, stop: asyncio.Event
) -> None:
    """Watch until `stop`, while this process leads."""

    async def watch(conn: Connection) -> None:
        await LiquidationMonitor(redis, client).watch(conn, min(interval_seconds, LOOK_SECONDS_MAX))

    await run_as_leader(pool, LIQUIDATION_LOCK, stop, watch)


class LiquidationMonitor:
    """Looks at the mark prices; remembers which it has seen, and how far it has told of positions."""

    def __init__(self, redis: Redis, client: Client) -> None:
        self._redis = redis
        self._client = client
        self._seen: dict[str, datetime] = {}
        self._told_up_to: dict[str, int] = {}

    async def watch(self, conn: Connection, interval_seconds: float) -> None:
        """Look again and again, until cancelled."""
        sweep_at = 0.0
        while True:
            now = asyncio.get_running_loop().time()
            try:
                opened = await self.look(conn, datetime.now(UTC))
                if now >= sweep_at:
                    sweep_at = now + SWEEP_SECONDS
                    opened += await stalled(conn, STALLED_AFTER, SWEEP_MAX)
                await self.start(opened)
            except (RedisError, TimeoutError, RPCError) as error:
                # What is due stays due, and what is written down is swept up.
                log.warning("Liquidations are looked for later: %r", error)
            await pause(interval_seconds)

    async def look(self, conn: Connection, now: datetime) -> list[Opened]:
        """Act on mark prices that are new; the liquidations that were opened.

        Prices that are not live, and instruments that do not trade, liquidate nobody.
        """
        rules = Rules(await read_instruments(conn), await read_tiers(conn))
        async with asyncio.timeout(REDIS_SECONDS_MAX):
            prices = await read_reference_prices(self._redis, list(rules.instruments))
        marks = {
            name: price.mark
            for name, price in prices.items()
            if rules.instruments[name].state == "TRADING" and marks_are_live(price, now)
        }
        if not self._note_new(prices, marks):
            return []
        await tell_lower_covers(conn)
        opened = await trigger(conn, marks, rules)
        await warn(conn, marks, rules)
        for name, mark in marks.items():
            after = self._told_up_to.get(name, 0)
            self._told_up_to[name] = await tell_moved(conn, name, mark, rules.tiers[name], after, TOLD_USERS) or 0
        return opened

    def _note_new(self, prices: dict[str, ReferencePrice], marks: dict[str, Decimal]) -> bool:
        """Whether any of `marks` was calculated after the last look."""
        calculated = {name: prices[name].calculated_at for name in marks}
        if calculated == self._seen:
            return False
        self._seen = calculated
        return bool(calculated)

    async def start(self, opened: list[Opened]) -> None:
        """Start the workflows of liquidations; those that run already go on."""
        for first in range(0, len(opened), STARTS_AT_ONCE):
            await asyncio.gather(*map(self._start, opened[first : first + STARTS_AT_ONCE]))

    async def _start(self, liquidation: Opened) -> None:
        try:
            await self._client.start_workflow(
                LIQUIDATION,
                LiquidationInput(liquidation.liquidation_id),
                id=liquidation.workflow_id,
                task_queue=LIQUIDATION_QUEUE,
                id_reuse_policy=WorkflowIDReusePolicy.ALLOW_DUPLICATE_FAILED_ONLY,
                id_conflict_policy=WorkflowIDConflictPolicy.FAIL,
                search_attributes=TypedSearchAttributes(
                    [
                        SearchAttributePair(_USER_ID, str(liquidation.user_id)),
                        SearchAttributePair(_INSTRUMENT_ID, liquidation.instrument_id),
                    ]
                ),
                static_summary=f"Liquidates user {liquidation.user_id} in {liquidation.instrument_id}",
            )
        except WorkflowAlreadyStartedError:
            return

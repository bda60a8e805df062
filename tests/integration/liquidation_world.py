"""Liquidations without Temporal: mark prices as a test sets them, and the steps of a liquidation one at a time."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import cast

import msgspec
from redis.asyncio import Redis

from activities.ledger.insurance import deposit_to_fund
from activities.ledger.steps import InsuranceActivities
from activities.liquidation.steps import LiquidationActivities
from activities.liquidation.triggering import Opened, trigger
from activities.matching.instruments import Rules, read_instruments, read_tiers
from domain.clock import iso
from domain.instruments import SHIPPED, Instrument
from domain.liquidation_saga import Ending, Plan, PlanRequest, Submission, Takeover, claim_of
from storage.db import Pool
from storage.market_keys import mark_key, snapshot_key
from tests.integration.ledger_world import BTC, World, finish

ROUNDS_MAX = 50


async def publish_mark(
    redis: Redis,
    price: object,
    instrument: Instrument = BTC,
    age: timedelta = timedelta(),
    *,
    is_frozen: bool = False,
) -> None:
    """What the market process says of an instrument: a mark price calculated `age` ago, and an empty book."""
    name = instrument.instrument_id
    mark = {"markPrice": str(price), "calculatedAt": iso(datetime.now(UTC) - age), "isFrozen": is_frozen}
    await redis.set(mark_key(name), msgspec.json.encode(mark))
    ticker = {"data": {"bestBid": None, "bestAsk": None}}
    await redis.set(snapshot_key("tickers", name), msgspec.json.encode(ticker))


@dataclass
class LiquidationWorld(World):
    """The services with those that liquidate."""

    def __post_init__(self) -> None:
        super().__post_init__()
        pool = cast(Pool, self.faulty or self.pool)
        self.liquidations = LiquidationActivities(pool, self.redis)
        self.insurance = InsuranceActivities(pool)

    async def fund(self, amount: object, reference: str = "seed") -> None:
        """Put money into the insurance fund."""
        async with self.pool.acquire() as conn, conn.transaction():
            assert await deposit_to_fund(conn, reference, "USDT", Decimal(str(amount)))

    async def rules(self) -> Rules:
        """Instruments and tiers as they stand."""
        return Rules(await read_instruments(self.pool), await read_tiers(self.pool))

    async def marked(self, price: object, instrument: Instrument = BTC) -> list[Opened]:
        """A new mark price comes in; what it liquidates."""
        return await self.marks({instrument.instrument_id: Decimal(str(price))})

    async def marks(self, marks: dict[str, Decimal]) -> list[Opened]:
        """New mark prices come in; what they liquidate."""
        for instrument in SHIPPED:
            if instrument.instrument_id in marks:
                await self.mark(marks[instrument.instrument_id], instrument)
                await publish_mark(self.redis, marks[instrument.instrument_id], instrument)
        async with self.pool.acquire() as conn:
            return await trigger(conn, marks, await self.rules())

    async def make_cross(self, user_id: int, instruments: Sequence[Instrument]) -> None:
        """The user's positions in these instruments are cross from the first one on."""
        for instrument in instruments:
            name = instrument.instrument_id
            await self.pool.execute(
                "INSERT INTO risk.exposures (user_id, instrument_id, leverage, margin_mode)"
                " VALUES ($1, $2, 10, 'CROSS')"
                " ON CONFLICT (user_id, instrument_id) DO UPDATE SET margin_mode = 'CROSS'",
                user_id,
                name,
            )
            await self.pool.execute(
                "INSERT INTO positions.positions (user_id, instrument_id, leverage, margin_mode, status)"
                " VALUES ($1, $2, 10, 'CROSS', 'CLOSED')"
                " ON CONFLICT (user_id, instrument_id) DO UPDATE SET margin_mode = 'CROSS'",
                user_id,
                name,
            )

    async def liquidation(self, liquidation_id: int) -> AsyncIterator[str]:
        """The steps of one liquidation, as LiquidationWorkflow takes them; "waits" where it waits for settlement,
        "pauses" where nothing may be liquidated."""
        takeover: Takeover = await self.liquidations.begin(liquidation_id)
        yield "begun"
        after, target, number = "", "0", 0
        while takeover.is_open:
            await self.orders.cancel_for_liquidation(takeover)
            yield "cancelled"
            plan = await self.liquidations.plan(PlanRequest(liquidation_id, after, target))
            if plan.action == "DONE":
                break
            if plan.action == "WAIT":
                yield "waits"
            elif plan.action == "PAUSE":
                after, target = "", "0"
                yield "pauses"
            elif plan.fell_short and plan.action == "ORDER":
                after, target = "", "0"
                yield "nobody"
            else:
                number += 1
                after, target = plan.action, plan.target
                async for step in self._round(liquidation_id, number, plan):
                    yield step
        await self.insurance.release(liquidation_id)
        yield "released"
        await self.liquidations.finish(Ending(liquidation_id, "PROCESSED"))
        yield "finished"

    async def _round(self, liquidation_id: int, number: int, plan: Plan) -> AsyncIterator[str]:
        if plan.action == "DELEVERAGE":
            await self.liquidations.deleverage(Submission(liquidation_id, number, plan))
            yield "deleveraged"
            return
        granted = await self.insurance.claim(claim_of(plan, liquidation_id, number))
        yield "claimed"
        await self.liquidations.submit(Submission(liquidation_id, number, plan, granted))
        yield "submitted"

    async def liquidate(self, liquidation_id: int, instrument: Instrument = BTC) -> list[str]:
        """A liquidation from beginning to end, settlement included; its steps without the waiting."""
        steps = []
        async for step in self.liquidation(liquidation_id):
            if step in ("waits", "pauses", "nobody"):
                await self.settle(instrument)
            if step not in ("waits", "cancelled"):
                steps.append(step)
            assert len(steps) < ROUNDS_MAX, steps
        return steps

    async def position(self, user_id: int, instrument: Instrument = BTC) -> tuple[Decimal, Decimal, str]:
        """Signed quantity, margin, status."""
        row = await self.pool.fetchrow(
            "SELECT signed_quantity, margin, status FROM positions.positions WHERE user_id = $1 AND instrument_id = $2",
            user_id,
            instrument.instrument_id,
        )
        assert row is not None
        return row[0], row[1], row[2]

    async def queue(self) -> list[tuple[int, str]]:
        """(user, status) of every liquidation, in order."""
        rows = await self.pool.fetch("SELECT user_id, status FROM risk.liquidation_queue ORDER BY liquidation_id")
        return [(row[0], row[1]) for row in rows]


__all__ = ["LiquidationWorld", "finish", "publish_mark"]

"""Random traders, mark prices and liquidations, interleaved at random: the invariants hold at every moment."""

from collections.abc import AsyncIterator
from decimal import Decimal

import pytest
from redis.asyncio import Redis

from activities.ledger import audit
from activities.liquidation.warnings import warn
from domain.instruments import Instrument
from domain.money import ZERO
from storage.db import Pool
from tests.integration.ledger_world import BTC, ETH
from tests.integration.liquidation_world import LiquidationWorld, publish_mark
from tests.integration.test_steps_random import INSTRUMENTS, USERS, Trading, assert_audit_is_clean

ACTIONS = 1_200
FUNDS = (0, 50, 5_000, 1_000_000)
SHAKES = 40
# Users whose positions are cross; the others' are isolated.
CROSS = (6, 7)


class Liquidating(Trading):
    """Trading, with a mark price that jumps, and liquidations that take their steps among all others."""

    def __init__(self, world: LiquidationWorld, seed: int) -> None:
        super().__init__(world, seed)
        self.marked = world
        self.liquidations: dict[int, AsyncIterator[str]] = {}
        self.opened: list[int] = []

    async def act(self) -> None:
        roll = self.dice.random()
        if roll < 0.05:
            await self.move_mark(self.dice.choice(INSTRUMENTS))
        elif roll < 0.25 and self.liquidations:
            await self.go_on_liquidating(self.dice.choice(sorted(self.liquidations)))
        else:
            await super().act()

    async def move_mark(self, instrument: Instrument) -> None:
        if self.dice.random() < 0.2:
            self.ticks[instrument.instrument_id] = (
                self.ticks[instrument.instrument_id] * self.dice.choice([92, 108]) // 100
            )
        price = instrument.ticks_to_price(self.ticks[instrument.instrument_id] + self.dice.randint(-200, 200))
        marks = {instrument.instrument_id: price}
        for other in INSTRUMENTS:
            if other is not instrument:
                marks[other.instrument_id] = other.ticks_to_price(self.ticks[other.instrument_id])
                await publish_mark(self.marked.redis, marks[other.instrument_id], other)
        for opened in await self.marked.marks(marks):
            self.liquidations[opened.liquidation_id] = self.marked.liquidation(opened.liquidation_id)
            self.opened.append(opened.liquidation_id)
        async with self.marked.pool.acquire() as conn:
            await warn(conn, marks, await self.marked.rules())

    async def go_on_liquidating(self, liquidation_id: int) -> None:
        if await anext(self.liquidations[liquidation_id], None) is None:
            del self.liquidations[liquidation_id]

    async def come_to_rest(self) -> None:
        # Marks are as old as the last move: without a new one, nothing would be liquidated any more.
        for instrument in INSTRUMENTS:
            await self.move_mark(instrument)
        for _ in range(SHAKES):
            await super().come_to_rest()
            if not self.liquidations:
                return
            for liquidation_id in sorted(self.liquidations):
                await self.go_on_liquidating(liquidation_id)
                if liquidation_id in self.liquidations:
                    await self.go_on_liquidating(liquidation_id)
        # Who cannot be closed or deleveraged now (all others are bankrupt, too) waits; that is no harm to the books.


async def assert_equity_is_conserved(pool: Pool, marks: dict[str, Decimal]) -> None:
    """What users have at mark, fees and fund are what was paid in, to the last digit."""
    users = await pool.fetchval("SELECT coalesce(sum(available + reserved), 0) FROM ledger.ledger_balances")
    system = {
        row["account"]: row["balance"]
        for row in await pool.fetch("SELECT account, sum(balance) AS balance FROM ledger.system_balances GROUP BY 1")
    }
    profit = ZERO
    for name, mark in marks.items():
        profit += await pool.fetchval(
            "SELECT coalesce(sum(signed_quantity * $2 - sign(signed_quantity) * entry_notional), 0)"
            " FROM positions.positions WHERE instrument_id = $1",
            name,
            mark,
        )
    kept = system.get("exchange:fees", ZERO) + system.get("exchange:insurance_fund", ZERO)
    kept += system.get("exchange:shortfall", ZERO)
    assert users + profit + kept == -system["external:deposits"]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("seed", range(4))
async def test_no_sequence_of_trades_marks_and_liquidations_breaks_an_invariant(
    pool: Pool, redis: Redis, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(audit, "LOOKS_MAX", 1)
    world = LiquidationWorld(pool, redis, settles_by_itself=False)
    trading = Liquidating(world, seed)
    if FUNDS[seed]:
        await world.fund(FUNDS[seed])
    for user in USERS:
        await world.deposit(trading.dice.choice((100, 1_000, 4_000, 20_000)), user)
    for user in CROSS:
        await world.make_cross(user, INSTRUMENTS)
    for number in range(ACTIONS):
        await trading.act()
        if number % 20 == 0:
            await assert_audit_is_clean(pool, at_rest=False)
        if number % 300 == 299:
            await trading.come_to_rest()
            await assert_audit_is_clean(pool, at_rest=True)
            marks = {i.instrument_id: i.ticks_to_price(trading.ticks[i.instrument_id]) for i in (BTC, ETH)}
            await assert_equity_is_conserved(pool, marks)
    assert len(trading.opened) > 2
    done = await pool.fetchval("SELECT count(*) FROM risk.liquidation_queue WHERE status = 'PROCESSED'")
    assert done > len(trading.opened) // 2
    # Only positions of those who were in liquidation are closed by force.
    strangers = await pool.fetchval(
        "SELECT count(*) FROM positions.position_events e WHERE cause = 'LIQUIDATION' AND NOT EXISTS ("
        " SELECT FROM risk.liquidation_queue q WHERE q.user_id = e.user_id AND q.instrument_id = e.instrument_id)"
    )
    assert strangers == 0

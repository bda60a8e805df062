"""Funding in the midst of trading and settlement, its steps interleaved with theirs at random."""

from collections.abc import AsyncIterator
from datetime import datetime
from decimal import Decimal

import pytest
from redis.asyncio import Redis

from activities.ledger import audit
from activities.ledger import funding as ledger
from activities.positions import funding as positions
from domain.funding import FundingRun
from storage.db import Pool
from storage.once import NotYetError
from tests.integration.ledger_world import World, assert_conserved
from tests.integration.test_steps_random import DEPOSITS, INSTRUMENTS, USERS, Trading, assert_audit_is_clean

ACTIONS = 900
RATES = ("0.0003", "-0.0003", "0.0075", "-0.0075", "0.03", "-0.03", "0")


class FundedTrading(Trading):
    """A run of `Trading` in which funding falls due now and then, and its settlements take their time."""

    def __init__(self, world: World, seed: int) -> None:
        super().__init__(world, seed)
        self.due: list[FundingRun] = []
        self.fundings: dict[FundingRun, AsyncIterator[str]] = {}

    async def act(self) -> None:
        action = self.dice.choices([super().act, self.fall_due, self.go_on_funding], [12, 1, 4])[0]
        await action()

    async def fall_due(self) -> None:
        instrument = self.dice.choice(INSTRUMENTS)
        moment: datetime = await self.world.pool.fetchval("SELECT clock_timestamp()")
        price = instrument.ticks_to_price(self.ticks[instrument.instrument_id])
        await self.world.publish_rate(moment, self.dice.choice(RATES), price, instrument)
        self.due.append(FundingRun(instrument.instrument_id, moment.isoformat()))

    async def go_on_funding(self) -> None:
        if self.due:
            run = self.dice.choice(self.due)
            # Now and then a worker dies and the settlement begins anew.
            if run not in self.fundings or self.dice.random() < 0.1:
                self.fundings[run] = self.world.funding(run)
            await self.take_funding_step(run)

    async def take_funding_step(self, run: FundingRun) -> None:
        try:
            if await anext(self.fundings[run], None) is None:
                self.due.remove(run)
                del self.fundings[run]
        except NotYetError:
            del self.fundings[run]

    async def come_to_rest(self) -> None:
        await super().come_to_rest()
        for run in list(self.due):
            while run in self.due:
                self.fundings.setdefault(run, self.world.funding(run))
                await self.take_funding_step(run)
                # A payment that takes of a margin has told the engine.
                for instrument in INSTRUMENTS:
                    await self.world.settle(instrument)


async def assert_positions_were_those_of_the_tape(pool: Pool) -> None:
    """What was held at every funding time is what the trades up to it come to."""
    for run in await pool.fetch("SELECT instrument_id, funding_time FROM ledger.funding_runs"):
        taped = await pool.fetch(
            "SELECT user_id, sum(quantity) FROM (SELECT buyer_user_id AS user_id, quantity, instrument_id, executed_at"
            "  FROM matching.trade_tickers UNION ALL"
            "  SELECT seller_user_id, -quantity, instrument_id, executed_at FROM matching.trade_tickers) t"
            " WHERE instrument_id = $1 AND executed_at <= $2 GROUP BY user_id HAVING sum(quantity) <> 0 ORDER BY 1",
            *run,
        )
        fixed = await pool.fetch(
            "SELECT user_id, signed_quantity FROM positions.funding_positions"
            " WHERE instrument_id = $1 AND funding_time = $2 ORDER BY 1",
            *run,
        )
        assert [tuple(row) for row in fixed] == [tuple(row) for row in taped]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("seed", range(3))
async def test_the_books_balance_with_funding_in_between(
    pool: Pool, redis: Redis, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(audit, "LOOKS_MAX", 1)
    for service in (ledger, positions):
        monkeypatch.setattr(service, "FUNDING_PAGE", 2)
    world = World(pool, redis, settles_by_itself=False)
    trading = FundedTrading(world, seed)
    for user in USERS:
        await world.deposit(trading.dice.choice(DEPOSITS), user)
    for number in range(ACTIONS):
        await trading.act()
        if number % 10 == 0:
            await assert_audit_is_clean(pool, at_rest=False)
        if number % 300 == 299:
            await trading.come_to_rest()
            await assert_audit_is_clean(pool, at_rest=True)
            await assert_positions_were_those_of_the_tape(pool)
    await assert_conserved(world)
    paid = await pool.fetchrow("SELECT count(*) AS runs, sum(received) AS received FROM ledger.funding_runs")
    assert paid is not None
    assert paid["runs"] > 10
    assert paid["received"] > Decimal(1)

"""What a liquidation may cost the insurance fund, and which accounts are liquidated: `docs/architecture.md`."""

from decimal import Decimal
from typing import Any

import pytest
from redis.asyncio import Redis

from storage.db import Pool
from tests.integration.ledger_world import assert_audit_is_clean, limit
from tests.integration.liquidation_world import LiquidationWorld

D = Decimal
FUND = "exchange:insurance_fund"


@pytest.mark.parametrize("side", ["BUY", "SELL"])
async def test_a_position_that_has_equity_at_the_mark_costs_the_fund_nothing(
    pool: Pool, redis: Redis, side: Any
) -> None:
    """A10: 4 BTC at 100x, bankrupt at 59400; the only bid is 56900 and comes from the winner. And its mirror image."""
    sign = 1 if side == "BUY" else -1
    world = LiquidationWorld(pool, redis)
    await world.fund(1_000_000)
    await world.deposit(40_000, 1, 2, 3)
    assert await world.lever(1, 100) is None
    buyer, seller = (1, 2) if side == "BUY" else (2, 1)
    await world.trade(buyer, seller, "4", 60_000)
    mark, far = 60_000 - sign * 310, 60_000 - sign * 3_100
    await world.mark(mark)
    await world.place(limit(3, side, "4", far))
    await world.settle()
    [opened] = await world.marked(mark)
    steps = await world.liquidate(opened.liquidation_id)
    assert steps == ["begun", "claimed", "submitted", "deleveraged", "released", "finished"]
    assert await world.system(FUND) == 1_000_000
    assert await pool.fetchval("SELECT sum(amount) FROM ledger.insurance_claims") == 0
    assert await pool.fetchval("SELECT array_agg(price) FROM matching.deleveragings") == [60_000 - sign * 600]
    # Its margin is used up, no other money of its user.
    assert await world.balance(1) == (40_000 - 2_400 - D(240_000) * await _fee_rate(pool, 1), D(0))
    assert await world.position(1) == (D(0), D(0), "CLOSED")
    await assert_audit_is_clean(world)


async def _fee_rate(pool: Pool, user_id: int) -> Decimal:
    """What the user paid for the trade that opened the position."""
    rate: Decimal = await pool.fetchval(
        "SELECT fee / (price * quantity) FROM positions.v_fills WHERE user_id = $1 ORDER BY seq LIMIT 1", user_id
    )
    return rate

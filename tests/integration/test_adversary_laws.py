"""The laws of `tests/adversary_run` on a liquidation that the fund pays for: they accept it, and notice changes."""

from decimal import Decimal
from typing import Any

import pytest
from redis.asyncio import Redis

from storage.db import Pool
from tests.adversary_run import witness
from tests.adversary_run.findings import Finding
from tests.adversary_run.laws import Laws
from tests.integration.ledger_world import BTC, limit
from tests.integration.liquidation_world import LiquidationWorld

D = Decimal
FUND, DEPOSIT = D(1_000_000), D(40_000)
WITHDRAWN = D(37_000)


async def liquidated(pool: Pool, redis: Redis, side: Any = "BUY", mode: str = "ISOLATED") -> LiquidationWorld:
    """User 1 had 4 BTC at leverage 100 from 60,000, and is closed beyond the bankruptcy price, short of the mark."""
    await witness.install(pool)
    world = LiquidationWorld(pool, redis)
    await world.fund(FUND)
    await world.deposit(DEPOSIT, 1, 2)
    if mode == "CROSS":
        await world.make_cross(1, [BTC])
    assert await world.lever(1, 100) is None
    sign, (buyer, seller) = (1, (1, 2)) if side == "BUY" else (-1, (2, 1))
    await world.trade(buyer, seller, "4", 60_000)
    # A cross account has 3,000 left, less the trading fee.
    await world.deposit(-WITHDRAWN, 1, reference="out")
    mark = 60_000 - sign * 1_000
    await world.mark(mark)
    await world.place(limit(2, side, "4", mark + sign * 100))
    await world.settle()
    [opened] = await world.marked(mark)
    await world.liquidate(opened.liquidation_id)
    assert await pool.fetchval("SELECT sum(amount) FROM ledger.insurance_draws") > 500
    return world


async def judged(pool: Pool, laws: Laws | None = None, missing: int = 0, *, mark_stood: bool = False) -> list[Finding]:
    """What the laws say; `missing`: so much of the deposits is left out."""
    laws = laws or Laws({1, 2}, FUND)
    async with pool.acquire() as conn:
        return await laws.broken(conn, 2 * DEPOSIT - WITHDRAWN - missing, mark_stood=mark_stood)


@pytest.mark.parametrize("side", ["BUY", "SELL"])
@pytest.mark.parametrize("mode", ["ISOLATED", "CROSS"])
async def test_a_liquidation_that_the_fund_rightly_pays_for_breaks_no_law(
    pool: Pool, redis: Redis, side: Any, mode: str
) -> None:
    await liquidated(pool, redis, side, mode)
    laws = Laws({1, 2}, FUND)
    assert await judged(pool, laws) == []
    assert (laws.draws, laws.opened) == (1, 2)
    assert await judged(pool, laws, mark_stood=True) == []


BROKEN = {
    "UPDATE ledger.ledger_entries SET delta_available = delta_available + 1"
    " WHERE entry_id = (SELECT max(entry_id) FROM ledger.ledger_entries)": [
        "a balance is not the sum of its entries",
        "a journal does not sum to zero",
    ],
    "UPDATE ledger.ledger_balances SET reserved = reserved + 1 WHERE user_id = 2": [
        "a balance is not the sum of its entries",
        "what is reserved is not what is held",
        "what there is is not what was paid in",
    ],
    "UPDATE ledger.system_balances SET balance = -1 WHERE account = 'exchange:insurance_fund'": [
        "a balance is not the sum of its entries",
        "the fund is below zero",
        "what there is is not what was paid in",
    ],
    "INSERT INTO ledger.system_balances (account, asset, balance) VALUES ('exchange:shortfall', 'USDT', -1)": [
        "a balance is not the sum of its entries",
        "something is in shortfall",
        "what there is is not what was paid in",
    ],
    "UPDATE positions.positions SET signed_quantity = signed_quantity + 1 WHERE user_id = 2": [
        "open positions do not sum to zero",
        "what there is is not what was paid in",
    ],
    "UPDATE ledger.insurance_draws SET amount = amount + 500": [
        "an isolated liquidation drew more than what was worth below zero at its mark",
        "the fund paid otherwise than by a draw",
    ],
    "UPDATE ledger.insurance_claims SET mark_price = 58000": ["a claim names a mark that there was not"],
    "UPDATE ledger.insurance_draws SET liquidation_id = NULL": ["a draw of a liquidation does not name it"],
    "UPDATE positions.position_events SET cause = 'TRADE'": [
        "an order (TRADE) of a user whose isolated position was due drew on the fund",
    ],
    "INSERT INTO ledger.ledger_entries (reference_type, reference_id, entry_type, account, asset, delta_available)"
    " VALUES ('ORDERS', 'x', 'GIFT', 'exchange:insurance_fund', 'USDT', -2), "
    " ('ORDERS', 'x', 'GIFT', 'exchange:fees', 'USDT', 2)": [
        "a balance is not the sum of its entries",
        "a balance is not the sum of its entries",
        "the fund paid otherwise than by a draw",
    ],
    "UPDATE witness.holds SET margin_after = margin_after - 1 WHERE user_id = 1 AND margin_after > 0": [
        "initial margin is missing (ISOLATED)",
    ],
    "UPDATE witness.holds SET margin_after = margin_after - 1201 WHERE user_id = 1 AND margin_after > 0": [
        "a fill that opened is below maintenance",
        "initial margin is missing (ISOLATED)",
    ],
}


@pytest.mark.parametrize("change", BROKEN)
async def test_each_law_notices(pool: Pool, redis: Redis, change: str) -> None:
    await liquidated(pool, redis)
    await pool.execute(change)
    assert sorted(finding.kind for finding in await judged(pool)) == BROKEN[change]


async def test_funding_that_the_fund_paid_for_somebody_with_money_is_noticed(pool: Pool, redis: Redis) -> None:
    await liquidated(pool, redis)
    laws = Laws({1, 2}, FUND)
    assert await judged(pool, laws) == []
    await pool.execute(
        "INSERT INTO ledger.ledger_entries (reference_type, reference_id, entry_type, account, user_id, asset,"
        " delta_available) VALUES ('FUNDING_FEE', 'run:0', 'FUNDING', 'user:2', 2, 'USDT', -5)"
    )
    await pool.execute(
        "INSERT INTO ledger.insurance_draws (reference_type, reference_id, user_id, instrument_id, asset, amount)"
        " VALUES ('FUNDING_FEE', 'run:0', 2, 'BTC-USDT-PERP', 'USDT', 5)"
    )
    kinds = [finding.kind for finding in await judged(pool, laws)]
    assert "funding drew on the fund while its payer had money" in kinds


async def test_money_that_came_from_nowhere_while_the_mark_stood_is_noticed(pool: Pool, redis: Redis) -> None:
    await liquidated(pool, redis)
    laws = Laws({1, 2}, FUND)
    assert await judged(pool, laws) == []
    kinds = [finding.kind for finding in await judged(pool, laws, missing=1, mark_stood=True)]
    assert "the colluders gained while the marks stood still" in kinds

"""What 100,000 open positions cost: a look of the risk monitor at a new mark price, the settlement of their funding.

`python -m bench risk`. On a Postgres and a Valkey of the benchmark's own, through the services' real code, but
without Temporal: its part of a settlement is 45 local activities.
"""

import asyncio
import json
import resource
import statistics
import time
from collections.abc import Awaitable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import cast

from redis.asyncio import Redis
from temporalio.client import Client

from activities.ledger.audit import run_audit
from activities.ledger.steps import LedgerActivities
from activities.liquidation.triggering import TRIGGERED_MAX
from activities.matching.engine_log import EngineLog
from activities.positions.steps import PositionActivities
from bench.database import own_postgres, own_valkey
from clients import open_redis
from domain.clock import iso
from domain.funding import FundingPage, FundingRun, FundingSnapshot
from monitors.liquidations import LiquidationMonitor
from settings import Settings
from storage.db import Connection, Pool, open_pool
from storage.market_keys import mark_key, snapshot_key

INSTRUMENT = "BTC-USDT-PERP"
POSITIONS = 100_000
RUNS = 5
# asyncpg prepares the statements, and Postgres plans the first five calls of each anew.
WARM_UP = 10
FIRST_TIME = datetime(2099, 1, 1, tzinfo=UTC)
RATE = Decimal("0.0001")
MARK = Decimal(60_000)

LOOKS = 100
CROSSED = POSITIONS // 100
# All others are liquidated at 54,271 and 65,672, or have more margin.
CROSSING_MARK = Decimal(57_200)

# Longs and shorts in pairs of the same size, at leverage 10, each with 1,000 USDT; every tenth has it all in margin.
# Every hundredth, a long, has margin as of leverage 20. All are in the lowest tier (0.5 %).
POPULATE = """
WITH accounts AS MATERIALIZED (
    SELECT n AS user_id, CASE WHEN n % 2 = 0 THEN 1 ELSE -1 END * ((n + 1) / 2 % 50 + 1) * 0.001 AS quantity
    FROM generate_series(1, $1::bigint) AS n),
held AS MATERIALIZED (
    SELECT user_id, quantity, abs(quantity) * 60000 AS notional,
           CASE WHEN user_id % 10 IN (0, 1) THEN 1000 WHEN user_id % 100 = 2 THEN abs(quantity) * 3000
                ELSE abs(quantity) * 6000 END AS margin FROM accounts),
deposited AS (
    INSERT INTO ledger.journals (reference_type, reference_id) SELECT 'DEPOSIT', 'bench-' || user_id FROM held),
entries AS (
    INSERT INTO ledger.ledger_entries
        (reference_type, reference_id, entry_type, account, user_id, asset, delta_available, delta_reserved)
    SELECT 'DEPOSIT', 'bench-' || user_id, 'DEPOSIT', 'user:' || user_id, user_id, 'USDT', 1000 - margin, margin
    FROM held UNION ALL
    SELECT 'DEPOSIT', 'bench-' || user_id, 'DEPOSIT', 'external:deposits', NULL, 'USDT', -1000, 0 FROM held),
outside AS (
    INSERT INTO ledger.system_balances (account, asset, balance)
    SELECT 'external:deposits', 'USDT', -1000 * count(*) FROM held
    ON CONFLICT (account, asset) DO UPDATE SET balance = excluded.balance),
balances AS (
    INSERT INTO ledger.ledger_balances (user_id, asset, available, reserved)
    SELECT user_id, 'USDT', 1000 - margin, margin FROM held),
holds AS (
    INSERT INTO ledger.margin_holds (user_id, instrument_id, asset, position_margin)
    SELECT user_id, 'BTC-USDT-PERP', 'USDT', margin FROM held),
exposures AS (
    INSERT INTO risk.exposures (user_id, instrument_id, leverage, signed_quantity, entry_notional)
    SELECT user_id, 'BTC-USDT-PERP', 10, quantity, notional FROM held)
INSERT INTO positions.positions (user_id, instrument_id, signed_quantity, entry_notional, margin, leverage, told_price,
                                 liquidation_price, warning_price)
SELECT user_id, 'BTC-USDT-PERP', quantity, notional, margin, 10, 60000,
       (margin - sign(quantity) * notional) / (abs(quantity) * 0.005 - quantity),
       (margin - sign(quantity) * notional) / (abs(quantity) * 0.0075 - quantity) FROM held
"""


@dataclass(frozen=True)
class Services:
    """What the benchmarks call, on one database."""

    pool: Pool
    ledger: LedgerActivities
    positions: PositionActivities


def main() -> None:
    """Entry. Ends the process with 1 when the audit afterwards is not clean."""
    with own_postgres() as database, own_valkey() as valkey:
        asyncio.run(_main(database, valkey))


async def _main(database: str, valkey: str) -> None:
    async with await open_pool(database) as pool, open_redis(Settings(redis_url=valkey)) as redis:
        await pool.execute(POPULATE, POSITIONS, timeout=120)
        await pool.execute("VACUUM ANALYZE", timeout=120)
        await _funding(_services(pool))
        await pool.execute("VACUUM ANALYZE", timeout=120)
        await _marks(pool, redis)
        report = await run_audit(pool)
    for check in report.checks:
        if not check.ok:
            print("AUDIT:", check.name, check.detail)
    if not report.ok:
        raise SystemExit(1)


def _services(pool: Pool) -> Services:
    return Services(pool, LedgerActivities(pool), PositionActivities(pool, EngineLog()))


async def _funding(services: Services) -> None:
    print(f"funding of {POSITIONS:,} positions, {RUNS} times")
    before = _peak_mb()
    seconds: dict[str, list[float]] = {"fix": [], "ledger": [], "positions": [], "together": [], "worker CPU": []}
    peaks: list[float] = []
    for number in range(RUNS):
        spent = await _fund(services, FIRST_TIME + number * timedelta(hours=8))
        for name, value in spent.items():
            seconds[name].append(value)
        peaks.append(_peak_mb())
    for name, values in seconds.items():
        print(f"  {name:<10} {statistics.median(values):6.2f} s (from {min(values):.2f} to {max(values):.2f})")
    print(f"  memory of the worker: {before:.0f} MB before, at most {', '.join(f'{peak:.0f}' for peak in peaks)} MB")


async def _fund(services: Services, moment: datetime) -> dict[str, float]:
    """Seconds that the steps of one settlement took."""
    await services.pool.execute(
        "INSERT INTO market.funding_rates"
        " (instrument_id, effective_at, rate, premium_average, samples, mark_price, source)"
        " VALUES ($1, $2, $3, 0, 1, $4, 'simulated')",
        INSTRUMENT,
        moment,
        RATE,
        MARK,
    )
    run = FundingRun(INSTRUMENT, moment.isoformat())
    spent = {"fix": 0.0, "ledger": 0.0, "positions": 0.0}

    async def timed(name: str, step: Awaitable[int | None]) -> int | None:
        started = time.perf_counter()
        answer = await step
        spent[name] += time.perf_counter() - started
        return answer

    started, cpu = time.perf_counter(), time.process_time()
    assert await services.ledger.open_funding(run)
    await timed("fix", services.positions.fix_funding_positions(FundingSnapshot(run, 0)))
    after_user_id: int | None = 0
    while after_user_id is not None:
        page = FundingPage(run, after_user_id)
        after_user_id = await timed("ledger", services.ledger.settle_funding(page))
        await timed("positions", services.positions.confirm_funding(page))
    totals = await services.ledger.close_funding(run)
    assert totals.positions == POSITIONS
    return {**spent, "together": time.perf_counter() - started, "worker CPU": time.process_time() - cpu}


async def _marks(pool: Pool, redis: Redis) -> None:
    async with pool.acquire() as conn:
        monitor = LiquidationMonitor(redis, cast(Client, None))  # No workflow is started here.
        for _ in range(WARM_UP):
            await _look(monitor, conn, redis, MARK)
        print(f"a look of the risk monitor at a new mark price of {POSITIONS:,} positions")
        quiet = [await _look(monitor, conn, redis, MARK + number % 2) for number in range(LOOKS)]
        assert not any(look.opened for look in quiet)
        _print_looks("none crossed", quiet)
        crossed = [await _look(monitor, conn, redis, CROSSING_MARK) for _ in range(CROSSED // TRIGGERED_MAX)]
        assert sum(look.opened for look in crossed) == CROSSED
        _print_looks(f"{TRIGGERED_MAX} crossed", crossed)


@dataclass(frozen=True)
class Look:
    """How many liquidations a look opened, and its milliseconds: in all, and of the database in statements."""

    opened: int
    wall: float
    database: float


async def _look(monitor: LiquidationMonitor, conn: Connection, redis: Redis, mark: Decimal) -> Look:
    now = datetime.now(UTC)
    await redis.set(mark_key(INSTRUMENT), json.dumps({"markPrice": str(mark), "calculatedAt": iso(now)}))
    await redis.set(snapshot_key("tickers", INSTRUMENT), json.dumps({"data": {"bestBid": None, "bestAsk": None}}))
    busy_before = await _busy_ms(conn)
    started = time.perf_counter()
    opened = await monitor.look(conn, now)
    wall = (time.perf_counter() - started) * 1000
    return Look(len(opened), wall, await _busy_ms(conn) - busy_before)


async def _busy_ms(conn: Connection) -> float:
    """Milliseconds that sessions have spent in statements of this database, planning included."""
    await conn.execute("SELECT pg_stat_force_next_flush()")
    spent: float = await conn.fetchval("SELECT active_time FROM pg_stat_database WHERE datname = current_database()")
    return spent


def _print_looks(name: str, looks: list[Look]) -> None:
    for what, values in (("wall", [look.wall for look in looks]), ("database", [look.database for look in looks])):
        print(
            f"  {name:<13} {what:<9} {statistics.median(values):7.2f} ms (from {min(values):.2f} to {max(values):.2f})"
        )


def _peak_mb() -> float:
    """The most memory this process has used so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()

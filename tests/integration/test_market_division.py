"""Several market processes divide the instruments; those of one that dies go on with another, nothing counted twice."""

import asyncio
import os
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from redis.asyncio import Redis

from storage.db import Pool
from tests.integration.market_app import BTC, ETH, SOL, EngineLog, eventually, placed, trade
from tests.integration.test_market_klines import announced, assert_klines_are_those_of_the_tape, counted
from tests.servers import ROOT
from tests.waiting import until

SETTINGS = {
    "EXCHANGE_MARK_PRICE_INTERVAL_SECONDS": "0.2",
    "EXCHANGE_FUNDING_INTERVAL_SECONDS": "2",
    # Longer than the second process needs to start on a busy machine.
    "EXCHANGE_MARKET_TAKEOVER_SECONDS": "8",
}


class Market:
    """A market process of its own."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path) -> None:
        self.process = process
        self._log = log

    async def until_it_leads(self, *instrument_ids: str) -> None:
        expected = "Leading in " + ", ".join(sorted(instrument_ids))

        async def does() -> bool:
            leading = [line for line in self._log.read_text().splitlines() if "Leading in" in line]
            return bool(leading) and leading[-1].endswith(expected)

        await until(does, 25, f"the process to say: {expected}")


@asynccontextmanager
async def running(database_url: str, redis_url: str, preferred: str, log: Path) -> AsyncIterator[Market]:
    """A market process that prefers some instruments."""
    own = {"EXCHANGE_DATABASE_URL": database_url, "EXCHANGE_REDIS_URL": redis_url}
    environment = os.environ | SETTINGS | own | {"EXCHANGE_MARKET_INSTRUMENTS": preferred}
    with log.open("w") as errors:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "market", cwd=ROOT, env=environment, stderr=errors
        )
    try:
        yield Market(process, log)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def test_two_processes_divide_the_instruments_and_one_takes_over_when_the_other_is_killed(
    pool: Pool, redis: Redis, database_url: str, redis_url: str, tmp_path: Path
) -> None:
    engine, names = EngineLog(pool, redis), (BTC, ETH, SOL)
    for name in names:
        await engine.append(name, [placed(1, "BUY", 600_000, 1_000_000)])
    async with (
        running(database_url, redis_url, BTC, tmp_path / "one") as one,
        running(database_url, redis_url, f"{ETH},{SOL}", tmp_path / "other") as other,
    ):
        await one.until_it_leads(BTC)
        await other.until_it_leads(ETH, SOL)
        for number in range(1, 6):
            for name in names:
                await engine.append(name, [trade(number, 1, 600_000 + number, number, 1)])
        for name in names:
            await counted(pool, 6, name)
        other.process.kill()
        for name in names:
            await engine.append(name, [trade(number, 1, 599_000 + number, number, 1) for number in range(6, 11)])
        await one.until_it_leads(BTC, ETH, SOL)
        for name in names:
            await counted(pool, 11, name)
            await assert_klines_are_those_of_the_tape(pool, name)

            async def traded(name: str = name) -> bool:
                return b'"tradeId":10' in (await redis.get(f"market:trades:{name}") or b"")

            await eventually(traded)
    events = Counter((event["instrumentId"], event["period"], event["timestamp"]) for event in await announced(pool))
    assert set(events.values()) <= {1}
    rounds = await pool.fetch("SELECT instrument_id, calculated_at FROM market.mark_prices")
    # Two that priced the same instrument at once would show as many more rounds than there was time for.
    for name in names:
        moments = sorted(row["calculated_at"].timestamp() for row in rounds if row["instrument_id"] == name)
        assert len(moments) <= (moments[-1] - moments[0]) / 0.2 + 2


async def test_an_instrument_that_does_not_exist_is_refused(database_url: str, redis_url: str, tmp_path: Path) -> None:
    async with running(database_url, redis_url, "DOGE-USDT-PERP", tmp_path / "log") as market:
        assert await asyncio.wait_for(market.process.wait(), 20) != 0
    assert "was ['DOGE-USDT-PERP']" in (tmp_path / "log").read_text()

"""An engine process that is killed again and again under load loses nothing and does nothing twice."""

import asyncio
import random
from pathlib import Path

from domain.matching import AnyCommand
from settings import Settings
from storage.db import Pool
from tests.engine_commands import random_commands
from tests.engine_log import BTC, append, assert_log_is, until_matched
from tests.engine_process import engine_process, stop

KILLS = 50
LEASE_SECONDS = 0.25
SNAPSHOT_COMMANDS = 300
COMMANDS = 20_000


async def test_an_engine_killed_fifty_times_under_load_loses_nothing_and_doubles_nothing(
    pool: Pool, database_url: str, redis_url: str, tmp_path: Path
) -> None:
    settings = Settings(
        database_url=database_url,
        redis_url=redis_url,
        temporal_address="127.0.0.1:1",
        engine_instruments=BTC.instrument_id,
        engine_lease_seconds=LEASE_SECONDS,
        engine_snapshot_commands=SNAPSHOT_COMMANDS,
    )
    dice = random.Random(1)
    log = tmp_path / "engine.log"
    commands = random_commands(COMMANDS, seed=9)
    load = asyncio.create_task(_append_all(pool, commands, dice))
    for _ in range(KILLS):
        with engine_process(settings, log) as process:
            await asyncio.sleep(LEASE_SECONDS + dice.uniform(0, 0.4))
            assert process.exitcode is None, log.read_text()[-2000:]
    with engine_process(settings, log) as process:
        await load
        await until_matched(pool, COMMANDS, seconds=30)
        await stop(process)
    straight = await assert_log_is(pool, commands)
    newest = await pool.fetchval("SELECT payload FROM matching.snapshots ORDER BY command_seq DESC LIMIT 1")
    assert newest == straight.dump()
    _assert_both_ways_were_gone(log.read_text())
    assert await pool.fetchval("SELECT count(*) FROM matching.commands") < COMMANDS, "Expected old commands to be gone"


async def _append_all(pool: Pool, commands: list[AnyCommand], dice: random.Random) -> None:
    done = 0
    while done < len(commands):
        size = dice.randint(1, 200)
        await append(pool, commands[done : done + size])
        done += size
        await asyncio.sleep(dice.uniform(0, 0.3))


def _assert_both_ways_were_gone(log: str) -> None:
    owners = log.count("BTC-USDT-PERP: matching from command")
    assert owners > KILLS / 2, f"Expected most of {KILLS} engines to get to matching, was {owners}: {log[-2000:]}"
    assert "BTC-USDT-PERP: rebuilt from the whole log" in log
    assert "BTC-USDT-PERP: rebuilt from the snapshot at command" in log
    assert "ERROR" not in log, log[-4000:]

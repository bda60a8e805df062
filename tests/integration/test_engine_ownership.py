"""Real engine processes share the instruments, take over from one that dies, and stop one that comes back late."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import asyncpg
import pytest

from domain.instruments import SHIPPED
from engine import lease as leases
from engine.lease import EVICT_SECONDS
from engine.runner import STANDBY_SECONDS
from settings import Settings
from storage.db import Pool
from tests.engine_commands import random_commands
from tests.engine_log import append, assert_log_is, owner_of, until_matched
from tests.engine_process import engine_process, stop
from tests.waiting import until

BTC, ETH, SOL = SHIPPED
LEASE_SECONDS = 1.0

SettingsFor = Callable[[str], Settings]


@pytest.fixture
def settings_for(database_url: str, redis_url: str) -> SettingsFor:
    def make(instruments: str) -> Settings:
        return Settings(
            database_url=database_url,
            redis_url=redis_url,
            temporal_address="127.0.0.1:1",
            engine_instruments=instruments,
            engine_lease_seconds=LEASE_SECONDS,
        )

    return make


async def owners(pool: Pool) -> dict[str, int | None]:
    """The process that holds each instrument; None where nobody does."""
    rows = await pool.fetch("SELECT instrument_id, owner FROM matching.cursors")
    return {row["instrument_id"]: int(row["owner"].split("-")[-2]) if row["owner"] else None for row in rows}


async def until_owned(pool: Pool, expected: dict[str, int | None], seconds: float) -> None:
    async def owned() -> bool:
        return await owners(pool) == expected

    await until(owned, seconds, f"owners {expected}")


async def test_engines_share_the_instruments_and_one_that_dies_is_replaced_within_seconds(
    pool: Pool, settings_for: SettingsFor, tmp_path: Path
) -> None:
    commands = random_commands(2_000, seed=21)
    btc, eth, sol = (instrument.instrument_id for instrument in SHIPPED)
    with (
        engine_process(settings_for(f"{btc},{sol}"), tmp_path / "log") as first,
        engine_process(settings_for(eth), tmp_path / "log") as second,
    ):
        await until_owned(pool, {btc: first.pid, sol: first.pid, eth: second.pid}, 10)
        for instrument in (BTC, ETH):
            await append(pool, commands[:1_000], instrument)
            await until_matched(pool, 1_000, instrument=instrument)
        first.kill()
        killed_at = time.monotonic()
        for instrument in (BTC, ETH):
            await append(pool, commands[1_000:], instrument)
        await until_matched(pool, 2_000, instrument=ETH, seconds=LEASE_SECONDS)
        await until_matched(pool, 2_000, instrument=BTC, seconds=LEASE_SECONDS + STANDBY_SECONDS + 3)
        assert time.monotonic() - killed_at > STANDBY_SECONDS
        await until_owned(pool, {btc: second.pid, sol: second.pid, eth: second.pid}, 5)
        await stop(second)
    for instrument in (BTC, ETH):
        await assert_log_is(pool, commands, instrument)
    await until_owned(pool, {btc: None, sol: None, eth: None}, 1)


async def test_an_engine_that_was_paused_while_another_took_over_writes_nothing(
    pool: Pool, settings_for: SettingsFor, tmp_path: Path
) -> None:
    commands = random_commands(6_000, seed=22)
    log = tmp_path / "log"
    with engine_process(settings_for(BTC.instrument_id), log) as paused:
        await append(pool, commands[:2_000])
        await until_matched(pool, 2_000)
        assert paused.pid is not None
        os.kill(paused.pid, signal.SIGSTOP)
        with engine_process(settings_for(BTC.instrument_id), log) as other:
            # These wait for both of them.
            await append(pool, commands[2_000:4_000])
            await until_matched(pool, 4_000, seconds=15)
            successor = await owner_of(pool)
            os.kill(paused.pid, signal.SIGCONT)

            async def noticed() -> bool:
                return f"{paused.pid} ERROR alerts ALERT {BTC.instrument_id}: lost the lease" in log.read_text()

            await until(noticed, 10, "the paused engine to see that it lost the lease")
            await append(pool, commands[4_000:])
            await until_matched(pool, 6_000)
            assert await owner_of(pool) == successor
            await assert_log_is(pool, commands)
            await stop(other)
        await stop(paused)
    await assert_log_is(pool, commands)


async def test_a_session_left_in_the_middle_of_a_transaction_does_not_keep_the_instrument(
    pool: Pool, database_url: str, settings_for: SettingsFor, tmp_path: Path
) -> None:
    commands = random_commands(100, seed=23)
    instrument_id = BTC.instrument_id
    stuck = await asyncpg.connect(database_url)
    lease = await leases.take(stuck, instrument_id, "stuck", LEASE_SECONDS)
    assert lease is not None
    await stuck.execute("BEGIN")
    await leases.advance(stuck, lease, 50, 50)
    with engine_process(settings_for(instrument_id), tmp_path / "log") as engine:
        await append(pool, commands)
        await until_matched(pool, 100, seconds=LEASE_SECONDS + EVICT_SECONDS + 5)
        await stop(engine)
    with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError)):
        await stuck.execute("COMMIT")
    stuck.terminate()
    await assert_log_is(pool, commands)

"""The engine process: one runner per instrument, and beside them wake-ups, publisher and signaller."""

import asyncio
import logging
import os
import secrets
import signal
import socket
from collections.abc import Sequence

import asyncpg
from redis.asyncio import Redis
from temporalio.client import Client

from activities.matching.instruments import read_instruments
from clients import connect_temporal, open_redis
from domain.instruments import Instrument, choose
from engine.publisher import Publisher
from engine.runner import Runner, Tenure
from engine.signaller import Signaller
from engine.traces import MatchTraces
from engine.wakeups import Wakeups
from settings import Settings
from storage.db import Pool, open_pool
from telemetry.endpoint import endpoint
from telemetry.health import Checks, NotReadyError
from telemetry.tracing import start_tracing, stop_tracing

log = logging.getLogger(__name__)

WELL = ("matching", "standing by")


class Engine:
    """Owns `instruments` from `run` until `stop`, and those of `others` that nobody else owns for some time.

    `owner` tells this process from every other one.
    """

    def __init__(
        self,
        pool: Pool,
        redis: Redis,
        settings: Settings,
        instruments: Sequence[Instrument],
        owner: str | None = None,
        others: Sequence[Instrument] = (),
    ) -> None:
        owner = owner or f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"

        async def connect() -> Client:
            return await connect_temporal(settings)

        publisher, traces = Publisher(redis), MatchTraces(redis)
        signaller = Signaller(pool, connect, [instrument.instrument_id for instrument in (*instruments, *others)])
        tenure = Tenure(
            owner, settings.engine_lease_seconds, settings.engine_snapshot_commands, settings.event_retention_count
        )
        self._runners = {
            instrument.instrument_id: Runner(
                pool, instrument, tenure, publisher, signaller, preferred=instrument in instruments, traces=traces
            )
            for instrument in (*instruments, *others)
        }
        self._helpers = (publisher, signaller, traces, Wakeups(pool, self._runners))

    async def run(self) -> None:
        """Match until stopped; then every lease is released."""
        # A helper that fails takes the process down, for the supervisor to start anew: half an engine helps nobody.
        async with asyncio.TaskGroup() as group:
            helpers = [group.create_task(helper.run()) for helper in self._helpers]
            async with asyncio.TaskGroup() as runners:
                for runner in self._runners.values():
                    runners.create_task(runner.run())
            for task in helpers:
                task.cancel()

    async def check(self) -> None:
        """Raises NotReadyError unless each instrument is matched here, or this engine stands by for it."""
        late = {name: runner.state for name, runner in self._runners.items() if runner.state not in WELL}
        if late:
            raise NotReadyError(f"Expected {WELL}, was {late}")

    def stop(self) -> None:
        """Finish the batches at hand and return from `run`."""
        for runner in self._runners.values():
            runner.stop()


async def serve(settings: Settings) -> None:
    """Run an engine until SIGTERM or SIGINT. Raises RuntimeError for an instrument that does not exist."""
    start_tracing("engine", settings.otlp_endpoint)
    known = await _read_instruments(settings)
    instruments = choose(known, settings.engine_instruments)
    others = [instrument for instrument in known.values() if instrument not in instruments]
    # A connection for every runner, and one each for the wake-ups, the signaller, the snapshots and the probes.
    pool = await open_pool(settings.require_database_url(), size_max=len(known) + 4, name="engine")
    redis = open_redis(settings)
    try:
        engine = Engine(pool, redis, settings, instruments, others=others)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, engine.stop)
        checks: Checks = {"postgres": lambda: pool.fetchval("SELECT 1"), "instruments": engine.check}
        async with endpoint(settings.metrics_host, settings.metrics_port, checks):
            await engine.run()
        log.info("Stopped")
    finally:
        await redis.aclose()
        await pool.close()
        stop_tracing()


async def _read_instruments(settings: Settings) -> dict[str, Instrument]:
    conn = await asyncpg.connect(settings.require_database_url())
    try:
        return await read_instruments(conn)
    finally:
        await conn.close()

"""Market data from an engine event to 1,000 WebSocket subscribers: delay, and CPU per message of the api process.

Postgres, Valkey, Temporal, `python -m market` and `python -m api` are real and their own processes. This process is the
engine: orders go through its matcher, its writer and its publisher. *Event-to-client* is from the commit of an event to
the moment a subscriber has read the first message that includes it, one sample per event and subscriber; the market
process collects changes for up to 50 ms, which is part of it. The second phase is the same again beside one more
subscriber, who never reads.
"""

import argparse
import asyncio
import os
import socket
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random

import asyncpg
import httpx
import psutil
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from redis.asyncio import Redis

from bench.database import own_postgres
from bench.exchange import ROOT, percentile
from bench.fanout_clients import UPGRADE, subscriptions
from domain.instruments import SHIPPED
from domain.matching import New, Side, Trade
from engine import lease as leases
from engine.log import Batch, write_batch
from engine.matcher import Matcher
from engine.publisher import message
from stack.ports import free_port
from stack.servers import Process, Server, launcher, temporal, valkey, wait_until_ready
from storage.db import Connection

BTC = SHIPPED[0]
ID = BTC.instrument_id
MID = 600_000
LEVELS = 40
READY_SECONDS = 60
# Connections are made and snapshots sent before the clock starts.
WARM_UP_SECONDS = 2.0
DRAIN_SECONDS = 3.0
TARGET_CHANGE = 0.10
ROUNDS = 2


@dataclass(frozen=True)
class Servers:
    """Where the measured processes are."""

    database: str
    redis: str
    api_port: int
    api: psutil.Process


@dataclass(frozen=True)
class Figures:
    """One phase: milliseconds from event to client, messages to all clients, the api's CPU seconds and memory."""

    depth: Sequence[float]
    trades: Sequence[float]
    messages: int
    seconds: float
    user: float
    system: float
    rss: int


class Engine:
    """Orders matched and committed one by one, with the engine's own parts; remembers when each event was."""

    def __init__(self, conn: Connection, redis: Redis, lease: leases.Lease) -> None:
        self.committed: dict[int, int] = {}
        self.trades: set[int] = set()
        self._conn = conn
        self._redis = redis
        self._lease = lease
        self._matcher = Matcher(BTC)
        self._commands = 0
        self._dice = Random(1)

    async def run(self, events_per_second: float, seconds: float) -> int:
        """Make events at this rate; how many there were. Every one of them changes the depth."""
        begun, made = time.monotonic(), 0
        while (elapsed := time.monotonic() - begun) < seconds:
            if made > elapsed * events_per_second:
                await asyncio.sleep(made / events_per_second - elapsed)
                continue
            made += await self._apply(self._next_order())
        return made

    def _next_order(self) -> New:
        """A seller's order on one of LEVELS levels, or a buyer's that takes one or two lots of the best."""
        rests = self._dice.random() < 0.5
        side: Side = "SELL" if rests else "BUY"
        return New(
            at=time.time_ns() // 1_000_000,
            order_id=self._commands + 1,
            user_id=1 if rests else 2,
            side=side,
            type="LIMIT",
            time_in_force="GTC" if rests else "IOC",
            price=MID + (self._dice.randint(1, LEVELS) if rests else 2 * LEVELS),
            quantity=2 if rests else self._dice.randint(1, 2),
        )

    async def _apply(self, order: New) -> int:
        first_seq = self._matcher.event_seq + 1
        events = self._matcher.apply(order)
        self._commands += 1
        batch = Batch(self._commands, first_seq, events, [self._commands] * len(events))
        await write_batch(self._conn, self._lease, BTC, batch)
        now = time.monotonic_ns()
        for seq, event in enumerate(events, first_seq):
            self.committed[seq] = now
            if isinstance(event, Trade):
                self.trades.add(seq)
        await self._redis.publish(f"engine:{ID}", message(ID, batch))
        return len(events)


@contextmanager
def _running(process: Process, environment: dict[str, str], log: Path) -> Iterator[psutil.Process]:
    with log.open("wb") as file:
        child = subprocess.Popen(process.command, cwd=ROOT, env=environment, stdout=file, stderr=file)
    try:
        measured = psutil.Process(child.pid)
        yield measured
    finally:
        child.send_signal(process.stop_signal)
        child.wait(60)


@contextmanager
def _servers() -> Iterator[Servers]:
    """Everything that is measured, ready."""
    with ExitStack() as stack:
        database = stack.enter_context(own_postgres())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="exchange-bench-")))
        embedded: list[Server] = [valkey(folder), temporal(None, free_port(), None)]
        for server in embedded:
            stack.enter_context(_running(server.process, dict(os.environ), folder / f"{server.process.name}.log"))
            asyncio.run(wait_until_ready(server.endpoint, READY_SECONDS))
        port = free_port()
        environment = {
            **os.environ,
            "EXCHANGE_DATABASE_URL": database,
            "EXCHANGE_REDIS_URL": embedded[0].endpoint.url,
            "EXCHANGE_TEMPORAL_ADDRESS": embedded[1].endpoint.url,
            "EXCHANGE_STATE_DIR": str(folder),
            "EXCHANGE_API_PORT": str(port),
            "EXCHANGE_JWT_PRIVATE_KEY_FILE": str(_new_key(folder / "jwt.pem")),
            "EXCHANGE_LOG_LEVEL": "WARNING",
            "EXCHANGE_SOCKETS_PER_ADDRESS": "100000",
        }
        stack.enter_context(_running(_service("market"), environment, folder / "market.log"))
        api = stack.enter_context(_running(_service("api"), environment, folder / "api.log"))
        _wait_until_served(port)
        yield Servers(database, embedded[0].endpoint.url, port, api)


def _service(name: str) -> Process:
    return Process(name, [*launcher(), sys.executable, "-m", name])


def _new_key(path: Path) -> Path:
    path.write_bytes(Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return path


def _wait_until_served(port: int) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        # Until it listens, there is nothing to read.
        with suppress(httpx.TransportError):
            if httpx.get(f"http://127.0.0.1:{port}/api/market/depth/{ID}", trust_env=False).is_success:
                return
        time.sleep(0.1)
    raise RuntimeError(f"The api did not serve the depth within {READY_SECONDS} s")


@asynccontextmanager
async def _subscribers(port: int, count: int, out: Path) -> AsyncIterator[None]:
    """`count` clients in a process of their own, subscribed; what came when is in `out` at the end."""
    command = [*launcher(), sys.executable, "-m", "bench.fanout_clients", str(port), str(count), ID, str(out)]
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdin=pipe, stdout=pipe)
    assert process.stdout is not None
    async with asyncio.timeout(READY_SECONDS):
        ready = await process.stdout.readline()
    if ready != b"ready\n":
        raise RuntimeError(f"The subscribers did not get their snapshots: {ready!r}")
    yield
    said, _ = await process.communicate(b"")
    if said != b"lost 0\n":
        raise RuntimeError(f"Expected to lose no subscriber, was {said!r}")


@contextmanager
def _stalled_subscriber(port: int) -> Iterator[None]:
    """Subscribes like the others and never reads, with little room on the way."""
    with socket.socket() as stalled:
        stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stalled.connect(("127.0.0.1", port))
        stalled.sendall(UPGRADE)
        # Snapshots fill the buffers on the way, so that it stalls before the clock starts.
        for _ in range(20):
            stalled.sendall(subscriptions(ID))
            time.sleep(0.03)
        yield


def _delays(rows: "array[int]", engine: Engine, since: int, *, of_trades: bool) -> list[float]:
    """Milliseconds for every event committed from `since` on, once per subscriber."""
    delays: list[float] = []
    for at in range(0, len(rows), 4):
        is_trades, previous, seq, received = rows[at : at + 4]
        if is_trades == of_trades:
            delays += (
                (received - engine.committed[event]) / 1e6
                for event in range(previous + 1, seq + 1)
                if event > since and (not of_trades or event in engine.trades)
            )
    return delays


async def _phase(servers: Servers, engine: Engine, subscribers: int, rate: float, seconds: float) -> Figures:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "rows")
        async with _subscribers(servers.api_port, subscribers, out):
            await engine.run(rate, WARM_UP_SECONDS)
            since = max(engine.committed)
            before = servers.api.cpu_times()
            begun = time.monotonic()
            events = await engine.run(rate, seconds)
            # The last of them are still on their way.
            await asyncio.sleep(DRAIN_SECONDS)
            lasted, after = time.monotonic() - begun, servers.api.cpu_times()
            rss = servers.api.memory_info().rss
        rows = array("q", out.read_bytes())  # noqa: ASYNC240 - nothing else runs here
    messages = sum(1 for seq in rows[2::4] if seq > since)
    depth, trades = (_delays(rows, engine, since, of_trades=of_trades) for of_trades in (False, True))
    assert len(depth) == subscribers * events, f"Expected {subscribers * events} deliveries, was {len(depth)}"
    return Figures(depth, trades, messages, lasted, after.user - before.user, after.system - before.system, rss)


async def _measure(servers: Servers, subscribers: int, rate: float, seconds: float) -> None:
    conn = await asyncpg.connect(servers.database)
    async with Redis.from_url(servers.redis) as redis:
        lease = await leases.take(conn, ID, "bench", seconds=3600)
        assert lease is not None, "Expected the lease to be free"
        engine = Engine(conn, redis, lease)
        phases: dict[str, list[Figures]] = {"all read": [], "one stalls": []}
        # In turns, so that what else the machine does falls on both alike.
        for _ in range(ROUNDS):
            for name, figures in phases.items():
                with _stalled_subscriber(servers.api_port) if name == "one stalls" else nullcontext():
                    figures.append(await _phase(servers, engine, subscribers, rate, seconds))
                _print(name, figures[-1])
    await conn.close()
    alone, beside = (_p99(figures) for figures in phases.values())
    print(
        f"p99 of all rounds: {alone:.1f} ms, of the others beside one who stalls {beside:.1f} ms:"
        f" {beside / alone - 1:+.1%} (target: at most {TARGET_CHANGE:+.0%})"
    )


def _p99(phases: Sequence[Figures]) -> float:
    return percentile([delay for phase in phases for delay in (*phase.depth, *phase.trades)], 0.99)


def _print(name: str, figures: Figures) -> None:
    delays = "   ".join(
        f"{channel} p50 {percentile(values, 0.5):5.1f} p99 {percentile(values, 0.99):5.1f} ms"
        for channel, values in (("depth", figures.depth), ("trades", figures.trades))
    )
    user, system = (1e6 * cpu / figures.messages for cpu in (figures.user, figures.system))
    print(
        f"{name:10}   {delays}   {figures.messages / figures.seconds:7,.0f} messages/s"
        f"   api {user:.1f} + {system:.1f} µs a message (user + system), {figures.rss / 2**20:.0f} MB"
    )


def main(subscribers: int = 1_000, rate: float = 100, seconds: float = 7) -> None:
    """Measure both phases in turns and print them; `seconds` is the length of each."""
    with _servers() as servers:
        asyncio.run(_measure(servers, subscribers, rate, seconds))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--subscribers", type=int, default=1_000, help="connections, each with depth and trades")
    parser.add_argument("--rate", type=float, default=100, help="engine events a second")
    parser.add_argument("--seconds", type=float, default=7, help="length of each phase")
    main(**vars(parser.parse_args()))

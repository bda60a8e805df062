"""The engine process on a Postgres of its own: rate, delay at low load, and restart with a deep book.

Commands are appended to `matching.commands` as an accepted order does it; what is measured ends with the commit of the
events. Temporal and Redis are away: signals and hints go out beside the matching and never hold it up.
"""

import argparse
import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from random import Random

import asyncpg

from activities.matching.steps import append_commands
from bench.database import own_postgres
from bench.exchange import ROOT, percentile
from domain.instruments import SHIPPED
from domain.matching import AnyCommand, Cancel, New, Side
from engine import lease as leases
from engine import snapshots
from engine.matcher import Matcher
from engine.snapshots import Snapshot
from storage.db import Connection

BTC = SHIPPED[0]
ID = BTC.instrument_id
AT = 1_700_000_000_000
MID = 600_000
APPENDED = 5_000
NOWHERE = "127.0.0.1:1"
WAIT_SECONDS = 600


@asynccontextmanager
async def _engine(database_url: str) -> AsyncIterator[None]:
    """`python -m engine`; stopped in good order in the end, which leaves a snapshot."""
    environment = os.environ | {
        "EXCHANGE_DATABASE_URL": database_url,
        "EXCHANGE_REDIS_URL": f"redis://{NOWHERE}",
        "EXCHANGE_TEMPORAL_ADDRESS": NOWHERE,
        "EXCHANGE_ENGINE_INSTRUMENTS": ID,
        "EXCHANGE_LOG_LEVEL": os.environ.get("EXCHANGE_LOG_LEVEL", "ERROR"),
    }
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "engine", cwd=ROOT, env=environment)
    try:
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        await process.wait()


class Flow:
    """Commands of the `mixed` kind: 60 % limit orders about the mid, 30 % cancels of earlier ones, 10 % market."""

    def __init__(self, seed: int) -> None:
        self._dice = Random(seed)
        self._last_id = 0

    def commands(self, count: int) -> list[AnyCommand]:
        """The next `count` of them."""
        return [self._next() for _ in range(count)]

    def _next(self) -> AnyCommand:
        dice = self._dice
        kind = dice.random()
        if kind < 0.3 and self._last_id:
            order_id = dice.randint(1, self._last_id)
            return Cancel(at=AT, order_id=order_id, user_id=_owner(order_id))
        self._last_id += 1
        is_market = kind > 0.9
        side: Side = "BUY" if dice.random() < 0.5 else "SELL"
        return New(
            at=AT,
            order_id=self._last_id,
            user_id=_owner(self._last_id),
            side=side,
            type="MARKET" if is_market else "LIMIT",
            time_in_force="IOC" if is_market else "GTC",
            price=MID + (100 if side == "BUY" else -100) if is_market else round(dice.gauss(MID, 50)),
            quantity=dice.randint(1, 10),
        )


def _owner(order_id: int) -> int:
    return 1 + order_id % 1_000


def _resting(count: int) -> Iterator[New]:
    """Orders that do not cross, over 2,000 levels a side."""
    for order_id in range(1, count + 1):
        is_bid = order_id % 2 == 0
        away = 1 + order_id // 2 % 2_000
        yield New(
            at=AT,
            order_id=order_id,
            user_id=_owner(order_id),
            side="BUY" if is_bid else "SELL",
            type="LIMIT",
            time_in_force="GTC",
            price=MID - away if is_bid else MID + away,
            quantity=10,
        )


async def _append(conn: Connection, commands: Sequence[AnyCommand]) -> int:
    """Commit the commands to the log; the seq of the last."""
    async with conn.transaction():
        await append_commands(conn, {ID: commands})
    return int(await conn.fetchval("SELECT last_seq FROM matching.sequencers WHERE instrument_id = $1", ID))


async def _until_matched(conn: Connection, command_seq: int, pause_seconds: float) -> None:
    end = time.perf_counter() + WAIT_SECONDS
    while await conn.fetchval("SELECT command_seq FROM matching.cursors WHERE instrument_id = $1", ID) < command_seq:
        if time.perf_counter() > end:
            raise RuntimeError(f"Command {command_seq} was not matched in {WAIT_SECONDS} s")
        await asyncio.sleep(pause_seconds)


async def _measure_rate(conn: Connection, flow: Flow, count: int) -> None:
    """The log is full when the engine looks: what it does in the time is its own speed."""
    await _append(conn, flow.commands(1))
    await _until_matched(conn, 1, 0.01)
    first_event = await conn.fetchval("SELECT event_seq FROM matching.cursors WHERE instrument_id = $1", ID)
    batches = [flow.commands(APPENDED) for _ in range(count // APPENDED)]
    last_seq = 0
    async with conn.transaction():
        for batch in batches:
            await append_commands(conn, {ID: batch})
    begun = time.perf_counter()
    last_seq = await conn.fetchval("SELECT last_seq FROM matching.sequencers WHERE instrument_id = $1", ID)
    await _until_matched(conn, last_seq, 0.01)
    seconds = time.perf_counter() - begun
    events = await conn.fetchval("SELECT event_seq FROM matching.cursors WHERE instrument_id = $1", ID) - first_event
    print(f"log to log: {count / seconds:,.0f} commands/s, {events / seconds:,.0f} events/s ({count:,} commands)")


async def _measure_delay(conn: Connection, flow: Flow, count: int) -> None:
    """From the commit of one command to the first look that finds its events committed, 50 commands a second."""
    delays = []
    for _ in range(count):
        seq = await _append(conn, flow.commands(1))
        committed = time.perf_counter()
        await _until_matched(conn, seq, 0)
        delays.append(1000 * (time.perf_counter() - committed))
        await asyncio.sleep(0.02)
    print(
        f"committed command to committed event: p50 {percentile(delays, 0.5):.1f} ms,"
        f" p99 {percentile(delays, 0.99):.1f} ms ({count} commands, one at a time)"
    )


async def _measure_restart(database_url: str, conn: Connection, orders: int) -> None:
    """A book made here and saved as the engine saves it; then from the start of the process to the first event."""
    matcher = Matcher(BTC)
    for order in _resting(orders):
        matcher.apply(order)
    begun = time.perf_counter()
    payload = matcher.dump()
    dumped = time.perf_counter()
    await conn.execute("TRUNCATE matching.commands, matching.events, matching.trade_tickers, matching.snapshots")
    await conn.execute("UPDATE matching.sequencers SET last_seq = $2 WHERE instrument_id = $1", ID, orders)
    await conn.execute(
        "UPDATE matching.cursors SET command_seq = $2, event_seq = $3 WHERE instrument_id = $1",
        ID,
        orders,
        matcher.event_seq,
    )
    lease = await leases.take(conn, ID, "bench")
    assert lease is not None, "Expected the lease to be free"
    await snapshots.save(conn, lease, Snapshot(orders, matcher.event_seq, payload))
    saved = time.perf_counter()
    await leases.release(conn, lease)
    print(
        f"snapshot of {orders:,} resting orders: {len(payload) / 1e6:.0f} MB, taken in {dumped - begun:.2f} s"
        f" (matching stands still), written in {saved - dumped:.2f} s (beside it)"
    )
    probe = New(
        at=AT, order_id=orders + 1, user_id=1, side="BUY", type="LIMIT", time_in_force="IOC", price=MID, quantity=1
    )
    last_seq = await _append(conn, [probe])
    begun = time.perf_counter()
    async with _engine(database_url):
        await _until_matched(conn, last_seq, 0.005)
        print(f"restart with {orders:,} resting orders: {time.perf_counter() - begun:.2f} s to the first event")


async def _measure(database_url: str, commands: int, delays: int, orders: int) -> None:
    conn = await asyncpg.connect(database_url, command_timeout=WAIT_SECONDS)
    try:
        flow = Flow(seed=1)
        async with _engine(database_url):
            await _measure_rate(conn, flow, commands)
            await _measure_delay(conn, flow, delays)
        await _measure_restart(database_url, conn, orders)
    finally:
        await conn.close()


def main(commands: int = 200_000, delays: int = 500, orders: int = 1_000_000) -> None:
    """Measure and print."""
    with own_postgres() as database_url:
        asyncio.run(_measure(database_url, commands, delays, orders))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--commands", type=int, default=200_000, help="commands in the log for the rate")
    parser.add_argument("--delays", type=int, default=500, help="commands sent one at a time for the delay")
    parser.add_argument("--orders", type=int, default=1_000_000, help="resting orders of the restart")
    main(**vars(parser.parse_args()))

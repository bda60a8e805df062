"""Overload: five times the orders that the exchange can sustain, for a minute.

First the peak: the most that are accepted in a second, from a closed loop over ever more connections, each of which
waits for its answer; the best number of them then runs for as long as the overload will. Then the rate that can be
sustained: that of the fastest open loop (`bench.edge_clients`, a process of its own; latency counts from when an order
was due, so that waiting is not hidden) in which nothing is refused and the p99 stays bounded. Then an open loop at five
times that rate.

Promised, or the exit status is 1: every order that was answered is in the database, once, and came to its end; the
audit is clean. Aimed at: goodput stays at 80 % of the peak, the p99 of accepted orders is bounded, and after it memory
and latency are what they were. Rate limits are off: what is tried is how load is shed.
"""

import argparse
import asyncio
import os
import sys
import tempfile
import time
from array import array
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import asyncpg
import msgspec
import psutil

from bench.edge_clients import DISCONNECTED, NOT_SENT, TIMED_OUT, Job, Report
from bench.exchange import ROOT, Addresses, Trader, open_api, percentile, running_exchange, wait_settled
from stack.servers import launcher

INSTRUMENT = "BTC-USDT-PERP"
PRICE = "60000"
TRADERS = 8
DEPOSIT = "100000000"
NO_RATE_LIMITS = {"EXCHANGE_RATE_LIMIT_ADDRESS": "0", "EXCHANGE_RATE_LIMIT_USER": "0"}
PEAK_CONNECTIONS = (50, 200, 500)
PEAK_SECONDS_MAX = 10.0
# Connections of the open loop: several times what may be in flight in the api process.
CONNECTIONS_MAX = 4_000
OVERLOAD = 5
# Of the peak, tried one after the other until one is not sustained.
SHARES = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
SUSTAINED_P99_MS = 250.0
SETTLED_SECONDS_MAX = 180.0
QUIET_SECONDS = 10.0
SAMPLE_SECONDS = 1.0
GOODPUT_TARGET = 0.8
# Twice EXCHANGE_REQUEST_WAIT_SECONDS_MAX: the wait to be let in comes before that wait.
P99_TARGET_MS = 2_000.0
MEMORY_TARGET = 1.2
SERVICES = ("api", "worker", "engine", "market")
STATUSES = {200: "accepted", DISCONNECTED: "disconnected", TIMED_OUT: "timed out", NOT_SENT: "not sent"}


@dataclass(frozen=True)
class Exchange:
    """What is measured, and who calls it."""

    addresses: Addresses
    traders: Sequence[Trader]


@dataclass(frozen=True)
class Outcome:
    """One load. `counts` by status, `accepted` order ids by clientOrderId, `latencies` of accepted orders in ms;
    `load_seconds` were orders sent, `settled_seconds` until the last one was settled; `cpu` seconds by process."""

    counts: Mapping[int, int]
    accepted: Mapping[str, int]
    refused: Sequence[str]
    latencies: Sequence[float]
    report: Report
    load_seconds: float
    settled_seconds: float
    cpu: Mapping[str, float]

    @property
    def goodput(self) -> float:
        """Accepted orders a second, over the time in which they were sent or still answered."""
        return len(self.accepted) / self.report.seconds

    @property
    def is_sustained(self) -> bool:
        """Whether everything was accepted, and soon."""
        return set(self.counts) == {200} and self.p(0.99) <= SUSTAINED_P99_MS

    @property
    def settled(self) -> float:
        """Accepted orders a second until all of them were settled."""
        return len(self.accepted) / self.settled_seconds

    def p(self, share: float) -> float:
        """A percentile of the milliseconds that accepted orders took."""
        return percentile(self.latencies, share)


@dataclass(frozen=True)
class Peak:
    """The most orders a second that were answered, and settled, when nobody sent more than was answered."""

    accepted: float
    settled: float


class Processes:
    """The processes of the exchange: what they hold and what they have spent, by name."""

    def __init__(self, stack_pid: int) -> None:
        self._stack = psutil.Process(stack_pid)

    def rss(self) -> dict[str, int]:
        """Bytes in memory of each service."""
        return {name: each.memory_info().rss for name, each in self._named() if name in SERVICES}

    def cpu(self) -> dict[str, float]:
        """CPU seconds of everything, servers included."""
        seconds: dict[str, float] = defaultdict(float)
        for name, each in self._named():
            with suppress(psutil.NoSuchProcess):  # backends of Postgres come and go
                times = each.cpu_times()
                seconds[name] += times.user + times.system
        return seconds

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[dict[str, int]]:
        """The highest `rss` seen meanwhile."""
        highest: dict[str, int] = {}

        async def watch() -> None:
            while True:
                for name, value in self.rss().items():
                    highest[name] = max(value, highest.get(name, 0))
                await asyncio.sleep(SAMPLE_SECONDS)

        watching = asyncio.create_task(watch())
        try:
            yield highest
        finally:
            watching.cancel()

    def _named(self) -> list[tuple[str, psutil.Process]]:
        named = []
        for each in self._stack.children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                named.append((_name(each.cmdline()), each))
        return named


def _name(command: Sequence[str]) -> str:
    """Of `python -m api`: api; `python worker.py`: worker; `valkey-server unixsocket:/a/b`: valkey-server; `postgres:
    writer`: postgres."""
    if "-m" in command:
        return command[command.index("-m") + 1]
    program = next((part for part in command if part.endswith(".py")), command[0] if command else "gone")
    return Path(program.partition(" ")[0]).stem.rstrip(":")


async def load(
    exchange: Exchange, processes: Processes, name: str, *, rate: float | None, connections: int, seconds: float
) -> Outcome:
    """Send orders in a process of its own, and wait until all of them are settled."""
    with tempfile.TemporaryDirectory() as folder:
        job = Job(
            port=int(exchange.addresses.api.rpartition(":")[2]),
            authorizations=[trader.headers["Authorization"] for trader in exchange.traders],
            instrument_id=INSTRUMENT,
            price=PRICE,
            prefix=f"{name}-{time.time_ns() // 1_000_000}",
            rate=rate,
            connections=connections,
            seconds=seconds,
            out=str(Path(folder, "rows")),
        )
        cpu, begun = processes.cpu(), time.perf_counter()
        report = await _run_clients(job)
        await _settled(exchange)
        settled_seconds = time.perf_counter() - begun
        spent = {name: value - cpu.get(name, 0) for name, value in processes.cpu().items()}
        spent["clients"] = report.cpu_seconds
        rows = array("q", Path(job.out).read_bytes())  # noqa: ASYNC240 - the load is over
    numbers, statuses, times, order_ids = (rows[n::4] for n in range(4))
    ids = [f"{job.prefix}-{number:08d}" for number in numbers]
    return Outcome(
        Counter(statuses),
        {one: order_id for one, status, order_id in zip(ids, statuses, order_ids, strict=True) if status == 200},
        [one for one, status in zip(ids, statuses, strict=True) if status >= 400],
        [us / 1000 for us, status in zip(times, statuses, strict=True) if status == 200],
        report,
        seconds,
        settled_seconds,
        spent,
    )


async def _run_clients(job: Job) -> Report:
    command = [*launcher(), sys.executable, "-m", "bench.edge_clients"]
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdin=pipe, stdout=pipe)
    said, _ = await process.communicate(msgspec.json.encode(job))
    if process.returncode != 0:
        raise RuntimeError(f"The clients ended with {process.returncode}")
    return msgspec.json.decode(said, type=Report)


async def _settled(exchange: Exchange) -> None:
    async with asyncio.timeout(SETTLED_SECONDS_MAX):
        await wait_settled(exchange.addresses.database, 0)


async def promises_kept(database: str, outcomes: Sequence[Outcome]) -> bool:
    """Whether every accepted order is there, once, as it was answered, and at its end or in the book; prints it."""
    conn = await asyncpg.connect(database)
    try:
        rows = await conn.fetch(
            "SELECT client_order_id, order_id, status FROM orders.orders WHERE client_order_id IS NOT NULL"
        )
        wrongly_filled = await conn.fetchval(
            "SELECT count(*) FROM orders.orders o"
            " LEFT JOIN (SELECT order_id, sum(quantity) AS quantity FROM positions.v_fills GROUP BY order_id) f"
            " USING (order_id)"
            " WHERE coalesce(f.quantity, 0) <> o.filled_quantity OR o.filled_quantity > o.quantity"
        )
    finally:
        await conn.close()
    found = {row["client_order_id"]: row for row in rows}
    accepted = {one: order_id for outcome in outcomes for one, order_id in outcome.accepted.items()}
    lost = [one for one, order_id in accepted.items() if one not in found or found[one]["order_id"] != order_id]
    open_ones = [row for row in rows if row["status"] in ("PENDING", "ACCEPTED")]
    refused = sum(one in found for outcome in outcomes for one in outcome.refused)
    statuses = Counter(row["status"] for row in rows)
    print(
        f"{len(accepted)} accepted orders: {len(lost)} lost, {len(rows) - len(found)} twice,"
        f" {wrongly_filled} with fills that do not add up, {len(open_ones)} on their way for ever; of {len(rows)} in"
        f" the database {dict(statuses)}, {len(rows) - len(accepted) - refused} had no answer, {refused} were refused"
    )
    return not (lost or len(rows) != len(found) or wrongly_filled or open_ones)


def _print(name: str, outcome: Outcome) -> None:
    counts = "   ".join(f"{STATUSES.get(status, status)} {count}" for status, count in sorted(outcome.counts.items()))
    print(
        f"{name:28} {outcome.goodput:7.0f} accepted/s {outcome.settled:7.0f} settled/s"
        f"   p50 {outcome.p(0.5):6.1f} p99 {outcome.p(0.99):7.1f} max {max(outcome.latencies):7.1f} ms   {counts}"
    )
    answered = sum(outcome.counts.values())
    by_cost = sorted(outcome.cpu.items(), key=lambda item: -item[1])
    spent = "   ".join(f"{process} {seconds:.1f}" for process, seconds in by_cost if seconds > 0.05)
    print(
        f"{'':28} offered {answered / outcome.load_seconds:.0f}/s over {outcome.report.connections} connections,"
        f" at most {outcome.report.latest_ms:.0f} ms late, {outcome.report.waiting_max} waiting for a connection"
        f"   {outcome.report.problems or ''}   CPU seconds: {spent}"
    )


async def measure(seconds: float) -> bool:
    """Run everything once and print it; whether all that was promised is so."""
    print(f"load average before: {os.getloadavg()[0]:.1f}")
    with running_exchange(NO_RATE_LIMITS) as addresses:
        async with open_api(addresses, 8) as api:
            exchange = Exchange(addresses, await api.traders(TRADERS, DEPOSIT))
            await api.call("POST", f"/api/admin/mark-price/{INSTRUMENT}", await api.admin(), {"price": PRICE})
        outcomes = await _phases(exchange, Processes(addresses.stack_pid), seconds)
        kept = await promises_kept(addresses.database, outcomes)
        async with open_api(addresses, 8) as api:
            clean = await api.audit_is_clean()
        print(f"audit {'clean' if clean else 'NOT CLEAN'}")
        return kept and clean


async def _phases(exchange: Exchange, processes: Processes, seconds: float) -> list[Outcome]:
    short = min(seconds, PEAK_SECONDS_MAX)
    warm = await load(exchange, processes, "warm", rate=None, connections=50, seconds=short / 2)
    peaks = []
    for connections in PEAK_CONNECTIONS:
        peaks.append(await load(exchange, processes, "peak", rate=None, connections=connections, seconds=short))
        _print(f"peak, {connections} connections", peaks[-1])
    best = PEAK_CONNECTIONS[max(range(len(peaks)), key=lambda n: peaks[n].goodput)]
    peaks.append(await load(exchange, processes, "peak", rate=None, connections=best, seconds=seconds))
    _print(f"peak, {best} connections, long", peaks[-1])
    peak = Peak(peaks[-1].goodput, peaks[-1].settled)

    async def offer(name: str, share: float, seconds: float) -> Outcome:
        rate = share * peak.accepted
        outcome = await load(exchange, processes, name, rate=rate, connections=CONNECTIONS_MAX, seconds=seconds)
        _print(f"{share:g} x the peak, {name}", outcome)
        return outcome

    before, sustained = [], 0.0
    for share in SHARES:
        before.append(await offer("before", share, short))
        if not before[-1].is_sustained:
            break
        sustained = share
    if not sustained:
        raise RuntimeError(f"Not even {SHARES[0]:g} of the peak was sustained")
    await asyncio.sleep(QUIET_SECONDS)
    rss_before = processes.rss()
    async with processes.watched() as rss_highest:
        over = await offer("overload", OVERLOAD * sustained, seconds)
    await asyncio.sleep(QUIET_SECONDS)
    rss_after = processes.rss()
    after = await offer("after", sustained, short)
    for name in SERVICES:
        megabytes = [rss[name] / 2**20 for rss in (rss_before, rss_highest, rss_after)]
        print("{:28} {:.0f} MB before, at most {:.0f}, {:.0f} after".format(name, *megabytes))
    _judge(over, peak, max(rss_after[name] / rss_before[name] for name in SERVICES))
    return [warm, *peaks, *before, over, after]


def _judge(over: Outcome, peak: Peak, memory: float) -> None:
    accepted, settled = over.goodput / peak.accepted, over.settled / peak.settled
    p99, silent = over.p(0.99), over.report.refusals_without_retry_after
    for what, value, is_met in (
        (f"accepted, of the peak (>= {GOODPUT_TARGET:.0%})", f"{accepted:.0%}", accepted >= GOODPUT_TARGET),
        (f"settled, of the peak (>= {GOODPUT_TARGET:.0%})", f"{settled:.0%}", settled >= GOODPUT_TARGET),
        (f"p99 of accepted orders (<= {P99_TARGET_MS:.0f} ms)", f"{p99:.0f} ms", p99 <= P99_TARGET_MS),
        (f"memory after, of before (<= {MEMORY_TARGET:.0%})", f"{memory:.0%}", memory <= MEMORY_TARGET),
        ("refusals without Retry-After (0)", str(silent), not silent),
    ):
        print(f"{what:45} {value:>10}   {'met' if is_met else 'MISSED'}")


def main(seconds: float = 60) -> None:
    """Measure; `seconds` is the length of the overload."""
    if not asyncio.run(measure(seconds)):
        raise SystemExit(1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60, help="length of the overload")
    main(**vars(parser.parse_args()))

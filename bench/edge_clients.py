"""Traders who send orders at a fixed rate, whatever becomes of them, from a process that hardly loads the machine.

Run by `bench.edge`: reads a `Job` as JSON from its input, writes a row (number, status, microseconds, order id; 64 bits
each) for every order to the job's file, and a `Report` as JSON to its output.

Open loop: an order is due at its time, and its latency counts from then, so that a server that stalls does not hide the
orders that would have come meanwhile. Without a rate it is a closed loop: each connection sends its next order when the
last one is answered, which finds how much the exchange can do.
"""

import asyncio
import os
import re
import sys
import time
from array import array
from collections import Counter, deque
from pathlib import Path
from typing import cast

import msgspec
import uvloop

TICK_SECONDS = 0.001
SWEEP_SECONDS = 0.5
# Who has no answer by then gives up: the connection is closed.
PATIENCE_SECONDS = 10.0
# The server closes connections that are idle for five seconds.
IDLE_SECONDS_MAX = 4.0
# In the place of an HTTP status.
DISCONNECTED, TIMED_OUT, NOT_SENT = 1, 2, 3
_LENGTH = re.compile(rb"\r\ncontent-length: (\d+)", re.IGNORECASE)
_ORDER_ID = re.compile(rb'"orderId":(\d+)')
_CODE = re.compile(rb'"code":"(\w+)"')
_HEAD = (
    "POST /api/orders HTTP/1.1\r\nHost: localhost\r\nAuthorization: {}\r\n"
    "Content-Type: application/json\r\nContent-Length: {}\r\n\r\n"
)
_BODY = '{{"instrumentId":"{}","side":"{}","type":"LIMIT","price":"{}","quantity":"0.001","clientOrderId":"{}-%08d"}}'


class Job(msgspec.Struct):
    """What to send where. Authorizations take turns; the even ones buy, the odd ones sell."""

    port: int
    authorizations: list[str]
    instrument_id: str
    price: str
    prefix: str
    # Orders a second; None: as fast as `connections` allow.
    rate: float | None
    connections: int
    seconds: float
    out: str


class Report(msgspec.Struct):
    """What the rows do not tell. `seconds` is from the first order to the last answer."""

    seconds: float
    latest_ms: float
    connections: int
    waiting_max: int
    refusals_without_retry_after: int
    # Problem documents by their code.
    problems: dict[str, int]
    cpu_seconds: float


class Load:
    """The orders of a job, on their way and answered."""

    def __init__(self, job: Job) -> None:
        self.rows: array[int] = array("q")
        self.latest = 0.0
        self.opened = 0
        self.waiting_max = 0
        self.refusals_without_retry_after = 0
        self.problems: Counter[str] = Counter()
        self._requests = [_request(job, n) for n in range(len(job.authorizations))]
        self._job = job
        self._loop = asyncio.get_running_loop()
        self._idle: deque[Connection] = deque()
        self._busy: set[Connection] = set()
        # Number and due time of orders that found all connections busy.
        self._waiting: deque[tuple[int, float]] = deque()
        self._connecting: set[asyncio.Task[None]] = set()
        self._next = 0
        self._begun = time.perf_counter()

    async def run(self) -> None:
        """Send everything; returns when all is answered, or given up."""
        if self._job.rate is None:
            for _ in range(self._job.connections):
                self._send(self._number(), time.perf_counter())
        sweeping = asyncio.create_task(self._sweep())
        while (elapsed := time.perf_counter() - self._begun) < self._job.seconds:
            if self._job.rate is not None:
                self._send_due(elapsed, self._job.rate)
            await asyncio.sleep(TICK_SECONDS)
        while self._busy or self._waiting or self._connecting:  # noqa: ASYNC110 - every answer would have to tell
            await asyncio.sleep(TICK_SECONDS)
        sweeping.cancel()

    def answered(self, connection: "Connection", status: int, order_id: int = 0) -> None:
        """The order of `connection` came to this; the connection is free, unless it is closed."""
        now = time.perf_counter()
        self._busy.discard(connection)
        self._note(connection.number, status, now - connection.due, order_id)
        is_closed = connection.transport is None or connection.transport.is_closing()
        if self._job.rate is None and now - self._begun < self._job.seconds:
            self._waiting.append((self._number(), now))
        if is_closed:
            if self._waiting:
                self._send(*self._waiting.popleft())
        elif self._waiting:
            self._use(connection, *self._waiting.popleft())
        else:
            connection.idle_since = now
            self._idle.append(connection)

    def left(self, connection: "Connection") -> None:
        """The connection was closed by somebody."""
        if connection in self._busy:
            self.answered(connection, DISCONNECTED)
        elif connection in self._idle:
            self._idle.remove(connection)

    def _number(self) -> int:
        self._next += 1
        return self._next - 1

    def _send_due(self, elapsed: float, rate: float) -> None:
        while self._next / rate <= elapsed:
            due = self._begun + self._next / rate
            self.latest = max(self.latest, time.perf_counter() - due)
            self._send(self._number(), due)

    def _send(self, number: int, due: float) -> None:
        if self._idle:
            self._use(self._idle.pop(), number, due)
        elif len(self._busy) + len(self._connecting) < self._job.connections:
            task = self._loop.create_task(self._connect(number, due))
            self._connecting.add(task)
            task.add_done_callback(self._connecting.discard)
        else:
            self._waiting.append((number, due))
            self.waiting_max = max(self.waiting_max, len(self._waiting))

    async def _connect(self, number: int, due: float) -> None:
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                _, connection = await self._loop.create_connection(
                    lambda: Connection(self), "127.0.0.1", self._job.port
                )
        except OSError:  # a time-out is one, too
            self._note(number, DISCONNECTED, time.perf_counter() - due)
            return
        self.opened += 1
        self._use(connection, number, due)

    def _use(self, connection: "Connection", number: int, due: float) -> None:
        connection.number, connection.due = number, due
        self._busy.add(connection)
        assert connection.transport is not None
        connection.transport.write(self._requests[number % len(self._requests)] % number)

    def _note(self, number: int, status: int, seconds: float, order_id: int = 0) -> None:
        self.rows.extend((number, status, round(seconds * 1e6), order_id))

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            now = time.perf_counter()
            while self._waiting and now - self._waiting[0][1] > PATIENCE_SECONDS:
                number, due = self._waiting.popleft()
                self._note(number, NOT_SENT, now - due)
            for connection in [one for one in self._busy if now - one.due > PATIENCE_SECONDS]:
                connection.close()
                self.answered(connection, TIMED_OUT)
            while self._idle and now - self._idle[0].idle_since > IDLE_SECONDS_MAX:
                self._idle.popleft().close()


class Connection(asyncio.Protocol):
    """One keep-alive connection with one order on its way at a time."""

    __slots__ = ("_load", "_received", "due", "idle_since", "number", "transport")

    def __init__(self, load: Load) -> None:
        self.transport: asyncio.Transport | None = None
        self.number = 0
        self.due = self.idle_since = 0.0
        self._load = load
        self._received = b""

    def close(self) -> None:
        """At once."""
        if self.transport is not None:
            self.transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # A cast, because uvloop's transports are no subclasses of asyncio's.
        self.transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        self._load.left(self)

    def data_received(self, data: bytes) -> None:
        data = self._received + data
        head = data.find(b"\r\n\r\n")
        length = _LENGTH.search(data, 0, head + 2) if head >= 0 else None
        if length is None or len(data) < head + 4 + int(length[1]):
            self._received = data
            return
        self._received = b""
        status = int(data[9:12])
        if status == 200:
            order_id = _ORDER_ID.search(data, head)
            assert order_id is not None, f"Expected an order, was {data[head:]!r}"
            self._load.answered(self, status, int(order_id[1]))
        else:
            lower = data[:head].lower()
            code = _CODE.search(data, head)
            self._load.problems[code[1].decode() if code else "none"] += 1
            if status == 503 and b"\r\nretry-after: " not in lower:
                self._load.refusals_without_retry_after += 1
            if b"\r\nconnection: close" in lower:
                self.close()
            self._load.answered(self, status)


def _request(job: Job, trader: int) -> bytes:
    """A request of `trader` with room for the order's number."""
    body = _BODY.format(job.instrument_id, "SELL" if trader % 2 else "BUY", job.price, job.prefix)
    return (_HEAD.format(job.authorizations[trader], len(body % 0)) + body).encode()


async def _main() -> None:
    job = msgspec.json.decode(sys.stdin.buffer.read(), type=Job)
    load = Load(job)
    begun, cpu = time.perf_counter(), time.process_time()
    await load.run()
    report = Report(
        time.perf_counter() - begun,
        load.latest * 1000,
        load.opened,
        load.waiting_max,
        load.refusals_without_retry_after,
        load.problems,
        time.process_time() - cpu,
    )
    Path(job.out).write_bytes(load.rows.tobytes())  # noqa: ASYNC240 - the load is over
    sys.stdout.buffer.write(msgspec.json.encode(report))
    sys.stdout.buffer.flush()
    # Nobody waits for a thousand farewells.
    os._exit(0)


if __name__ == "__main__":
    uvloop.run(_main())

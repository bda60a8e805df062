"""One connected socket: a bounded queue of encoded messages, what it may send, and the code it is closed with."""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

import msgspec
from starlette.websockets import WebSocket, WebSocketDisconnect

from api.sockets.protocol import Outlet, outlet_of
from domain.problems import Problem
from telemetry.metrics import WEBSOCKET_SKIPS, WEBSOCKETS, WEBSOCKETS_DROPPED

# The table of codes is in docs/websocket.md.
UNAUTHENTICATED_CLOSE = 4401
FORBIDDEN_CLOSE = 4403
SLOW_READER_CLOSE = 4008
RATE_LIMITED_CLOSE = 4029
TRY_AGAIN_LATER_CLOSE = 1013
# Even the closing frame of a socket whose reader stands still may not hold us up for longer.
CLOSE_SECONDS = 5.0
# A client may send so many messages in any so many seconds.
RECEIVED_MAX = 50
RECEIVED_SECONDS = 5.0


class Source(Protocol):
    """Where queued messages come from, if it can send a later state in place of all of them."""

    def skipped(self) -> None:
        """Its messages were taken out of the queue; it is to send none until `resume`."""

    def resume(self) -> None:
        """The queue is empty again."""


class SocketClient:
    """Messages go through `offer`, which never waits: a reader that is too slow misses states or is disconnected."""

    def __init__(self, websocket: WebSocket, queue_max: int) -> None:
        self._websocket = websocket
        self._queue_max = queue_max
        self._queue: deque[tuple[bytes, Source | None]] = deque()
        self._skipped: set[Source] = set()
        self._outlet: Outlet | None = None
        self._closing: tuple[int, str] | None = None
        self._closed = asyncio.Event()

    def offer(self, payload: bytes, source: Source | None = None) -> None:
        """Send `payload`, or queue it while the peer does not read.

        When the queue is full, whatever has a `source` gives way; then the socket is closed (4008).
        """
        if self._closing is not None:
            return
        if self._outlet is not None and not self._queue and self._outlet.can_write:
            self._outlet.write(payload)
            return
        self._queue.append((payload, source))
        if len(self._queue) > self._queue_max:
            self._make_room()

    def close(self, code: int, reason: str) -> None:
        """Drop what is queued and close the socket soon."""
        if self._closing is None:
            self._closing = code, reason
            self._queue.clear()
            self._closed.set()

    async def serve(self, on_message: Callable[[bytes], None]) -> None:
        """Read and write until the peer leaves or `close` is called. `on_message` gets every received message."""
        self._outlet = outlet_of(self._websocket)
        self._outlet.on_writable = self._flush
        self._flush()
        tasks = [asyncio.create_task(self._read(on_message)), asyncio.create_task(self._closed.wait())]
        WEBSOCKETS.inc()
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        except WebSocketDisconnect:
            return
        finally:
            self._outlet.on_writable = None
            WEBSOCKETS.dec()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if self._closing is not None:
            await close_socket(self._websocket, *self._closing)

    async def _read(self, on_message: Callable[[bytes], None]) -> None:
        times: deque[float] = deque(maxlen=RECEIVED_MAX + 1)
        while True:
            message = await receive(self._websocket)
            times.append(time.monotonic())
            if len(times) > RECEIVED_MAX and times[-1] - times[0] < RECEIVED_SECONDS:
                self.close(RATE_LIMITED_CLOSE, f"More than {RECEIVED_MAX} messages in {RECEIVED_SECONDS:g} seconds")
                return
            on_message(message)

    def _flush(self) -> None:
        assert self._outlet is not None
        while self._queue and self._outlet.can_write:
            payload, _ = self._queue.popleft()
            self._outlet.write(payload)
        if not self._queue and self._outlet.can_write:
            skipped, self._skipped = self._skipped, set()
            for source in skipped:
                source.resume()

    def _make_room(self) -> None:
        skipped = {source for _, source in self._queue if source is not None}
        WEBSOCKET_SKIPS.inc(len(skipped))
        self._queue = deque(item for item in self._queue if item[1] is None)
        for source in skipped:
            source.skipped()
        self._skipped |= skipped
        if len(self._queue) > self._queue_max:
            WEBSOCKETS_DROPPED.inc()
            self.close(SLOW_READER_CLOSE, "Messages are read too slowly")


async def receive(websocket: WebSocket) -> bytes:
    """The next message, text or binary. Raises WebSocketDisconnect when the peer has left."""
    message = await websocket.receive()
    if message["type"] == "websocket.disconnect":
        raise WebSocketDisconnect(message["code"], message.get("reason"))
    text: str | None = message.get("text")
    return text.encode() if text is not None else bytes(message["bytes"])


async def close_socket(websocket: WebSocket, code: int, reason: str) -> None:
    """Send the closing frame, unless the peer does not even take that. A frame has room for 123 bytes of reason."""
    try:
        async with asyncio.timeout(CLOSE_SECONDS):
            await websocket.close(code, reason.encode()[:123].decode(errors="ignore"))
    except (TimeoutError, WebSocketDisconnect):
        return


def error_message(problem: Problem) -> bytes:
    """What a socket is told about a message it sent."""
    return msgspec.json.encode({"type": "error", "code": problem.code, "detail": problem.detail})

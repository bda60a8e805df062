"""Subscribers that do next to nothing, so that they hardly load the machine that they measure: one process of them.

Run by `bench.fanout`: connects, subscribes each client to depth and trades, says `ready`, and at the end of its input
writes what came when: rows of (is_trades, prevSeq, seq, nanoseconds of the monotonic clock), 64 bits each.
"""

import argparse
import asyncio
import os
import re
import struct
import sys
import time
from array import array
from pathlib import Path
from typing import cast

import msgspec
import uvloop

_POSITION = re.compile(rb'"type":"(\w+)","channel":"(\w+)","instrumentId":"[^"]*","seq":(\d+),"prevSeq":(\d+)')
UPGRADE = (
    b"GET /ws/market HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)
# Not all at once: the listener's queue is finite.
CONNECTING_MAX = 50


def text_frame(text: bytes) -> bytes:
    """A client's frame (RFC 6455 5.2) of up to 125 bytes; masked with zeros, which leaves the text as it is."""
    return bytes((0x81, 0x80 | len(text))) + bytes(4) + text


def subscriptions(instrument_id: str) -> bytes:
    """The frames that subscribe to depth and trades."""
    requests = ({"op": "subscribe", "channel": name, "instrumentId": instrument_id} for name in ("depth", "trades"))
    return b"".join(text_frame(msgspec.json.encode(request)) for request in requests)


class Subscriber(asyncio.Protocol):
    """Notes the position and the time of every update in `rows`; `ready` is set when both snapshots are there."""

    def __init__(self, instrument_id: str, rows: "array[int]") -> None:
        self.ready = asyncio.Event()
        self.lost = False
        self._requests = subscriptions(instrument_id)
        self._rows = rows
        self._pending = b""
        self._snapshots = 0
        self._upgraded = False
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # A cast, because uvloop's transports are no subclasses of asyncio's.
        self._transport = cast(asyncio.Transport, transport)
        self._transport.write(UPGRADE)

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True

    def data_received(self, data: bytes) -> None:
        now = time.monotonic_ns()
        data = self._pending + data
        if not self._upgraded:
            end = data.find(b"\r\n\r\n")
            if end < 0:
                self._pending = data
                return
            data = data[end + 4 :]
            self._upgraded = True
            assert self._transport is not None
            self._transport.write(self._requests)
        self._pending = self._take_frames(data, now)

    def _take_frames(self, data: bytes, now: int) -> bytes:
        """Take in the complete frames; the rest."""
        begin = 0
        while len(data) - begin >= 4:
            length, head = data[begin + 1], 2
            if length == 126:
                length, head = struct.unpack_from("!H", data, begin + 2)[0], 4
            elif length == 127:
                if len(data) - begin < 10:
                    break
                length, head = struct.unpack_from("!Q", data, begin + 2)[0], 10
            end = begin + head + length
            if end > len(data):
                break
            self._take(data, begin + head, end, now)
            begin = end
        return data[begin:]

    def _take(self, data: bytes, begin: int, end: int, now: int) -> None:
        position = _POSITION.search(data, begin, end)
        if position is None:
            return
        kind, channel, seq, previous = position.groups()
        if kind == b"snapshot":
            self._snapshots += 1
            if self._snapshots >= 2:
                self.ready.set()
        else:
            self._rows.extend((channel == b"trades", int(previous), int(seq), now))


async def _measure(port: int, count: int, instrument_id: str, out: Path) -> None:
    rows: array[int] = array("q")
    connecting = asyncio.Semaphore(CONNECTING_MAX)
    loop = asyncio.get_running_loop()

    async def connect() -> Subscriber:
        async with connecting:
            _, subscriber = await loop.create_connection(lambda: Subscriber(instrument_id, rows), "127.0.0.1", port)
            await subscriber.ready.wait()
            return subscriber

    subscribers = await asyncio.gather(*(connect() for _ in range(count)))
    print("ready", flush=True)
    await loop.run_in_executor(None, sys.stdin.read)
    out.write_bytes(rows.tobytes())  # noqa: ASYNC240 - the measurement is over
    print("lost", sum(subscriber.lost for subscriber in subscribers), flush=True)
    # Nobody waits for a thousand farewells.
    os._exit(0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("port", type=int)
    parser.add_argument("count", type=int)
    parser.add_argument("instrument_id")
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    uvloop.run(_measure(arguments.port, arguments.count, arguments.instrument_id, arguments.out))

"""The api's sockets under a rush: connections are let in, and requests for which there is no time are answered."""

import asyncio
import itertools
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import uvloop
from fastapi import FastAPI

from api.edge import server as api_server
from api.edge.gateway import Gateway
from api.edge.http_protocol import refusable
from api.edge.server import Server, server_config
from api.limits.load import Load

ORDER = b"POST /api/orders HTTP/1.1\r\nHost: x\r\nX-Request-Id: abc\r\nContent-Length: 5\r\n\r\nhello"
PROBE = b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n"


@asynccontextmanager
async def serving(in_flight_max: int) -> AsyncIterator[tuple[Server, int]]:
    app = FastAPI()
    app.state.load = Load(in_flight_max, 9, 1)
    app.state.logs_all_requests = False
    app.add_middleware(Gateway)

    @app.get("/health/slow")
    async def slow() -> str:
        await asyncio.sleep(0.3)
        return "at last"

    @app.get("/health/live")
    async def live() -> str:
        return "yes"

    server = Server(server_config(app, "127.0.0.1", 0))
    task = asyncio.create_task(server._serve())
    while not server.started:  # noqa: ASYNC110  # uvicorn tells nobody
        await asyncio.sleep(0.01)
    try:
        yield server, server.listeners[0].getsockname()[1]
    finally:
        server.should_exit = True
        await task


async def talk(port: int, *parts: bytes, answers: int = 1) -> bytes:
    """What is answered to the parts, one after the other, on one connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    said = b""
    async with asyncio.timeout(5):
        for part in parts:
            writer.write(part)
            expected = said.count(b"HTTP/1.1 ") + answers
            while said.count(b"HTTP/1.1 ") < expected:
                data = await reader.read(65536)
                assert data, said
                said += data
    writer.close()
    return said


async def test_a_refusal_is_whole_and_the_connection_goes_on() -> None:
    async with serving(in_flight_max=0) as (server, port):
        said = await talk(port, ORDER, ORDER, PROBE)
        assert said.count(b"HTTP/1.1 503 Service Unavailable\r\n") == 2
        assert said.count(b"HTTP/1.1 200 OK\r\n") == 1
        first = said[: said.index(b'"retryAfter"')].lower()
        for line in (b"retry-after: ", b"x-request-id: abc\r\n", b"cache-control: no-store", b"x-frame-options: deny"):
            assert line in first, line
        assert b"content-type: application/problem+json\r\n" in first
        assert b'"code":"overloaded"' in first
        assert server.config.app.state.load.in_flight == 0  # type: ignore[union-attr]


async def test_a_refusal_does_not_overtake_the_answer_before_it() -> None:
    async with serving(in_flight_max=0) as (_, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(PROBE.replace(b"/health/live", b"/health/slow"))
        await asyncio.sleep(0.1)
        writer.write(ORDER)
        async with asyncio.timeout(5):
            assert b" 200 OK" in await reader.readline()
            await reader.readuntil(b"at last")
            assert b"HTTP/1.1 503 " in await reader.readuntil(b"\r\n\r\n")
        writer.close()


async def test_a_connection_on_which_nothing_follows_a_refusal_is_closed() -> None:
    async with serving(in_flight_max=0) as (server, port):
        server.config.timeout_keep_alive = 1.2  # type: ignore[assignment]  # seconds, which may be fractions
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        begun = time.monotonic()
        for _ in range(4):
            writer.write(ORDER)
            assert b"503" in await reader.read(65536)
            await asyncio.sleep(0.5)
        async with asyncio.timeout(10):
            assert await reader.read() == b""
        # Not while requests came: 1.5 s for the last of them, and 1.2 after it.
        assert time.monotonic() - begun > 2.6
        writer.close()


async def test_requests_in_one_packet_are_all_refused_and_so_is_one_whose_body_comes_later() -> None:
    async with serving(in_flight_max=0) as (_, port):
        assert (await talk(port, 300 * ORDER, answers=300)).count(b"OVERLOADED") == 300
        assert (await talk(port, ORDER[:-3], ORDER[-3:] + ORDER)).count(b"OVERLOADED") == 2


async def test_of_a_refused_request_the_body_that_comes_later_is_skipped(caplog: pytest.LogCaptureFixture) -> None:
    async with serving(in_flight_max=0) as (server, port):
        parts = [ORDER[:-5], ORDER[-5:] + ORDER[:-2], b"l", b"o" + PROBE]
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        async with asyncio.timeout(5):
            for part in parts:
                writer.write(part)
                await asyncio.sleep(0.05)
            said = await reader.readuntil(b'"yes"')
        assert said.count(b"HTTP/1.1 503 ") == 2
        assert said.count(b"HTTP/1.1 200 ") == 1
        assert server.config.app.state.load.refused == 2  # type: ignore[union-attr]
        writer.close()
    # Not a line for each of them.
    assert "status" not in caplog.text
    assert [record for record in caplog.records if record.name == "access"] == []


async def test_who_keeps_back_the_rest_of_a_refused_body_is_closed() -> None:
    async with serving(in_flight_max=0) as (server, port):
        server.config.timeout_keep_alive = 0.2  # type: ignore[assignment]  # seconds, which may be fractions
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(ORDER[:-5])
        async with asyncio.timeout(3):
            assert b"503" in await reader.read()
        writer.close()


@pytest.mark.parametrize(
    "request_",
    [
        ORDER.replace(b"POST", b"HEAD"),
        ORDER.replace(b"Host: x", b"Connection: close"),
        ORDER.replace(b"Host: x", b"Expect: 100-continue"),
        ORDER.replace(b"HTTP/1.1", b"HTTP/1.0"),
    ],
)
async def test_requests_after_which_the_connection_may_not_go_on_are_refused_by_the_gateway(request_: bytes) -> None:
    async with serving(in_flight_max=0) as (_, port):
        said = await talk(port, request_)
        assert b"HTTP/1.1 503 " in said
        assert b"retry-after: " in said.lower()


def test_a_plain_request_is_refused_unread() -> None:
    assert refusable(ORDER) == (b"abc", 0)
    assert refusable(ORDER[:-5]) == (b"abc", 5)
    assert refusable(ORDER[:-1]) == (b"abc", 1)
    assert refusable(b"GET /api/orders?limit=1 HTTP/1.1\r\nHost:x\r\n\r\n") == (b"", 0)


@pytest.mark.parametrize(
    "request_",
    [
        PROBE,
        ORDER + b"G",
        ORDER[:-6],
        ORDER.replace(b"Length: 5", b"Length: 12345678"),
        ORDER.replace(b"Host: x", b"Content-Length: 0"),
        ORDER.replace(b"Length: 5", b"Length: 5, 5"),
        ORDER.replace(b"Length: 5", b"Length: +5"),
        ORDER.replace(b"Length: 5", b"Length: 5\x0b"),
        ORDER.replace(b"Length:", b"Length :"),
        ORDER.replace(b"Host: x", b"Transfer-Encoding: chunked"),
        ORDER.replace(b"Host: x", b"Upgrade: websocket"),
        ORDER.replace(b"Host: x", b"X: a\rContent-Length: 0"),
        ORDER.replace(b"Host: x", b"X: a\n"),
        ORDER.replace(b"Host: x", b"X: a\r\n folded: b"),
        ORDER.replace(b"Host: x", b"no header"),
        ORDER.replace(b"Host: x", b"X: \x00"),
        ORDER.replace(b"POST", b" POST"),
        ORDER.replace(b"POST ", b"POST  "),
        ORDER.replace(b"/api/orders", b"http://x/api/orders"),
    ],
)
def test_of_a_request_that_might_be_read_in_two_ways_the_end_is_left_to_the_parser(request_: bytes) -> None:
    assert refusable(request_) is None


def test_connections_that_came_while_the_loop_was_busy_are_let_in_a_hundred_a_turn() -> None:
    async def rush() -> list[int]:
        async with serving(in_flight_max=10) as (server, port):
            # The kernel takes them; the loop stands still meanwhile.
            clients = [socket.create_connection(("127.0.0.1", port)) for _ in range(250)]
            let_in = []
            for _ in range(12):
                await asyncio.sleep(0)
                let_in.append(len(server.server_state.connections))
            for client in clients:
                client.close()
            return let_in

    assert api_server.CONNECTIONS_A_TURN == 100
    let_in = uvloop.run(rush())
    assert let_in[-1] == 250, let_in
    assert max(after - before for before, after in itertools.pairwise(let_in)) <= 100

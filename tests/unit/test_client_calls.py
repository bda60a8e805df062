"""When the client repeats a call, against a server that is busy at first."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from decimal import Decimal

import pytest

from client import Exchange, Refused, Session, UnavailableError, exchange
from stack.ports import free_port

BUSY = b'{"type":"t","title":"Overloaded","status":503,"detail":"later","code":"OVERLOADED"}'


class Nobody:
    """A caller who proves nothing."""

    def headers(self, method: str, target: str, body: bytes) -> dict[str, str]:
        return {}

    async def renew(self, refused_headers: object) -> bool:
        return False


@asynccontextmanager
async def server(*answers: bytes) -> AsyncIterator[tuple[str, list[bytes]]]:
    """Its address, and the request lines it got: answers 503 with a body of BUSY, and 200 with every other one."""
    requests: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        body = answers[min(len(requests), len(answers) - 1)]
        requests.append(head.split(b"\r\n")[0])
        status = b"503 Busy" if body == BUSY else b"200 OK"
        writer.write(b"HTTP/1.1 %b\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%b" % (status, len(body), body))
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as listening:
        host, port = listening.sockets[0].getsockname()
        yield f"http://{host}:{port}", requests


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "PAUSE_SECONDS", 0.01)


async def test_a_busy_exchange_is_asked_again_while_patience_lasts() -> None:
    heard: list[str] = []
    async with (
        server(BUSY, BUSY, b'{"items":[]}') as (url, requests),
        Exchange(url, patience=5, on_busy=heard.append) as patient,
    ):
        assert await patient.instruments() == []
    assert len(requests) == 3
    assert heard == ["OVERLOADED", "OVERLOADED"]


async def test_without_patience_the_first_refusal_is_raised() -> None:
    async with server(BUSY) as (url, requests), Exchange(url) as hasty:
        with pytest.raises(Refused) as refusal:
            await hasty.instruments()
    assert (refusal.value.status, refusal.value.code) == (503, "OVERLOADED")
    assert len(requests) == 1


async def test_what_would_count_twice_is_sent_once() -> None:
    async with server(BUSY) as (url, requests), Exchange(url, patience=5) as patient:
        with pytest.raises(Refused):
            await Session(patient, Nobody()).add_margin("BTC-USDT-PERP", Decimal(1))
    assert len(requests) == 1


async def test_an_exchange_that_stays_away_is_unavailable() -> None:
    async with Exchange(f"http://127.0.0.1:{free_port()}", patience=0.05) as patient:
        with pytest.raises(UnavailableError):
            await patient.instruments()

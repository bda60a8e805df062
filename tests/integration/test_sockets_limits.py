"""What a socket may do: how much it may send, how many subscriptions and connections it may have, and for how long it
may be silent; docs/websocket.md states all of it.
"""

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import msgspec
import psutil
import pytest
from redis.asyncio import Redis
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from api.edge import server
from api.routes import sockets
from api.sockets import client as socket_client
from api.sockets import market_feed
from api.sockets import protocol as socket_protocol
from settings import Settings
from tests.integration.market_app import BTC, ETH, eventually
from tests.integration.socket_app import Api, connect_slow_reader, running_api

Document = dict[str, Any]


@pytest.fixture
async def api(settings: Settings) -> AsyncIterator[Api]:
    async with running_api(settings) as api:
        yield api


async def receive(socket: ClientConnection) -> Document:
    async with asyncio.timeout(10):
        decoded: Document = msgspec.json.decode(await socket.recv())
        return decoded


async def close_of(socket: ClientConnection, seconds: float = 10) -> tuple[int, str]:
    """The code and reason that the server closes with."""
    async with asyncio.timeout(seconds):
        with suppress(ConnectionClosed):
            while True:
                await socket.recv()
    assert socket.close_code is not None
    return socket.close_code, socket.close_reason or ""


def subscription(channel: str, instrument_id: str = BTC) -> bytes:
    return msgspec.json.encode({"op": "subscribe", "channel": channel, "instrumentId": instrument_id})


def snapshot(data: str = "[]", seq: int = 1, kind: str = "snapshot", previous: int = 1) -> bytes:
    return msgspec.json.encode({"type": kind, "channel": "trades", "seq": seq, "prevSeq": previous, "data": data})


async def test_a_ping_is_answered_with_a_pong_on_market_sockets(api: Api) -> None:
    async with connect(f"{api.ws}/ws/market") as socket:
        await socket.send('{"op":"ping"}')
        assert await receive(socket) == {"type": "pong"}


async def test_a_ping_is_answered_with_a_pong_on_user_sockets(api: Api) -> None:
    token, _ = await api.sign_in(1001)
    async with connect(f"{api.ws}/ws/user") as socket:
        await socket.send(msgspec.json.encode({"op": "auth", "token": token}))
        assert (await receive(socket))["channel"] == "auth"
        await socket.send('{"op":"ping"}')
        assert await receive(socket) == {"type": "pong"}


async def test_compression_is_refused(api: Api) -> None:
    async with connect(f"{api.ws}/ws/market", compression="deflate") as socket:
        assert socket.protocol.extensions == []


async def test_one_subscription_too_many_is_refused_and_the_others_live_on(
    api: Api, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(market_feed, "SUBSCRIPTIONS_MAX", 1)
    await redis.set(f"market:trades:{BTC}", snapshot())
    async with connect(f"{api.ws}/ws/market") as socket:
        await socket.send(subscription("trades"))
        assert (await receive(socket))["type"] == "snapshot"
        await socket.send(subscription("trades", ETH))
        answer = await receive(socket)
        assert (answer["type"], answer["code"]) == ("error", "RATE_LIMITED")
        assert "1 subscriptions" in answer["detail"]
        # The same once more is none more.
        await socket.send(subscription("trades"))
        assert (await receive(socket))["type"] == "snapshot"
        await socket.send(msgspec.json.encode({"op": "unsubscribe", "channel": "trades", "instrumentId": BTC}))
        await redis.set(f"market:trades:{ETH}", snapshot())
        await socket.send(subscription("trades", ETH))
        assert (await receive(socket))["type"] == "snapshot"


async def test_a_socket_that_sends_too_much_is_closed(api: Api) -> None:
    async with connect(f"{api.ws}/ws/market") as socket:
        for _ in range(socket_client.RECEIVED_MAX + 1):
            await socket.send('{"op":"ping"}')
        assert await close_of(socket) == (4029, "More than 50 messages in 5 seconds")


async def test_as_much_as_is_allowed_is_answered(api: Api) -> None:
    async with connect(f"{api.ws}/ws/market") as socket:
        for _ in range(socket_client.RECEIVED_MAX):
            await socket.send('{"op":"ping"}')
        for _ in range(socket_client.RECEIVED_MAX):
            assert await receive(socket) == {"type": "pong"}


async def test_a_message_that_is_too_large_closes_the_socket(api: Api) -> None:
    async with connect(f"{api.ws}/ws/market") as socket:
        await socket.send("x" * (server.SOCKET_MESSAGE_BYTES_MAX + 1))
        assert (await close_of(socket))[0] == 1009


async def test_an_address_may_have_so_many_sockets_and_gets_room_again_when_one_leaves(settings: Settings) -> None:
    async with (
        running_api(settings.model_copy(update={"sockets_per_address": 2})) as api,
        connect(f"{api.ws}/ws/market"),
    ):
        async with connect(f"{api.ws}/ws/user"):
            with pytest.raises(InvalidStatus) as refused:
                await connect(f"{api.ws}/ws/market")
            assert refused.value.response.status_code == 429
            assert msgspec.json.decode(refused.value.response.body or b"")["code"] == "RATE_LIMITED"

        async def has_room() -> bool:
            return api.state.feeds.sockets.total() == 1

        await eventually(has_room)
        async with connect(f"{api.ws}/ws/market") as socket:
            await socket.send('{"op":"ping"}')
            assert await receive(socket) == {"type": "pong"}


async def test_a_peer_that_answers_no_ping_is_closed_and_its_connection_ends(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "PING_SECONDS", 0.2)
    monkeypatch.setattr(server, "PONG_SECONDS", 0.2)
    async with running_api(settings) as api:
        host, port = api.host.split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(
            b"GET /ws/market HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        async with asyncio.timeout(5):
            said = await reader.read()
        # A closing frame with its code, two bytes; then the end.
        assert (1011).to_bytes(2, "big") + b"keepalive ping timeout" in said
        writer.close()


async def test_a_peer_that_reads_nothing_is_let_go_with_all_that_was_kept_for_it(
    settings: Settings, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sockets, "MARKET_QUEUE_MAX", 10)
    monkeypatch.setattr(socket_client, "CLOSE_SECONDS", 0.1)
    monkeypatch.setattr(socket_protocol, "ABORT_SECONDS", 0.1)
    await redis.set(f"market:trades:{BTC}", snapshot())
    async with running_api(settings) as api, connect_slow_reader(api, "/ws/market") as slow:
        await slow.send(subscription("trades"))
        assert (await receive(slow))["type"] == "snapshot"
        slow.transport.pause_reading()
        feed = api.state.feeds.market
        for seq in itertools.count(2):
            feed.on_message(f"ws:trades:{BTC}", snapshot("x" * 5_000, seq, "update", seq - 1))
            if not api.state.feeds.sockets:
                break
            assert seq < 10_000, "Expected the socket to be closed"
            await asyncio.sleep(0.001)
        # It reads no more, yet nothing of it stays: neither a task nor a connection with its buffer.
        await eventually(lambda: no_connection_to(int(api.host.split(":")[1])))
        slow.transport.abort()


async def no_connection_to(port: int) -> bool:
    """Whether the api, which runs in this process, has no connection left."""
    connections = psutil.Process().net_connections("tcp")
    return not any(each.laddr.port == port and each.status == "ESTABLISHED" for each in connections)


async def test_what_waits_for_a_slow_reader_is_bounded(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stalled:
        on_writable = None
        can_write = False

        def write(self, payload: bytes) -> None:
            raise AssertionError("Expected no writing")

    client = socket_client.SocketClient(None, 100)  # type: ignore[arg-type]  # it is never served
    monkeypatch.setattr(client, "_outlet", Stalled())
    for number in range(1_000):
        client.offer(b"%d" % number)
        assert len(client._queue) <= 100
    assert client._closing == (4008, "Messages are read too slowly")


@pytest.mark.parametrize(
    "message",
    [
        '{"op":"subscribe","channel":"depth","instrumentId":"BTC-USDT-PERP","wrongName":1}',
        '{"op":"subscribe","channel":"depth","instrumentId":"BTC-USDT-PERP","instrumentid":"ETH-USDT-PERP"}',
        '{"op":"subscribe","channel":"depth","instrumentId":"BTC-USDT-PERP","instrument_id":"ETH-USDT-PERP"}',
        '{"op":"subscribe","channel":"depth","channel":"trades","instrumentId":"BTC-USDT-PERP"}',
        '{"op":"ping","args":{"op":"ping","op":"pong"}}',
        '["ping"]',
        "ping",
        "[" * 5_000 + "]" * 5_000,
    ],
)
async def test_what_a_message_should_not_have_is_refused_and_the_socket_stays(api: Api, message: str) -> None:
    async with connect(api.ws + "/ws/market") as socket:
        await socket.send(message)
        answer = await receive(socket)
        assert (answer["type"], answer["code"]) == ("error", "VALIDATION_FAILED")
        await socket.send('{"op":"ping"}')
        assert await receive(socket) == {"type": "pong"}


async def test_a_first_message_that_should_not_have_something_opens_nothing(api: Api) -> None:
    token, _ = await api.sign_in(1000)
    for member in ('"userId":"1"', f'"token":"{token}"', '"apikey":"x"'):
        async with connect(api.ws + "/ws/user") as socket:
            await socket.send(f'{{"op":"auth","token":"{token}",{member}}}')
            assert (await close_of(socket))[0] == 4401, member


@pytest.mark.parametrize(
    "target",
    [
        "/ws/market?wrongName=1",
        "/ws/market/depth?instrumentId=BTC-USDT-PERP&instrument_id=ETH-USDT-PERP",
        "/ws/market/depth?instrumentId=BTC-USDT-PERP&instrumentId=ETH-USDT-PERP",
        "/ws/market/depth?symbol=BTC-USDT-PERP",
        "/ws/user?token=x",
    ],
)
async def test_a_handshake_with_a_parameter_that_it_should_not_have_is_refused(api: Api, target: str) -> None:
    with pytest.raises(InvalidStatus) as refusal:
        async with connect(api.ws + target):
            pass
    assert refusal.value.response.status_code == 422
    assert "VALIDATION_FAILED" in (refusal.value.response.body or b"").decode()

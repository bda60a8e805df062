"""Private sockets on a running server: who gets what, and when a socket is closed."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
from redis.asyncio import Redis
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from activities.identity.sessions import REVOKED_CHANNEL, session_key
from api.routes import sockets
from api.sockets import client as socket_client
from api.sockets.client import SocketClient, Source
from api.sockets.user_feed import UserFeed
from domain.identity import Identity
from monitors.relay import run_relay
from settings import Settings
from storage.db import Pool
from storage.outbox import UserPush, emit
from tests.integration.socket_app import Api, connect_slow_reader, running_api
from tests.waiting import PUSHED_SECONDS

Document = dict[str, Any]
ALICE, BOB = 1001, 1002


@pytest.fixture
async def api(settings: Settings) -> AsyncIterator[Api]:
    async with running_api(settings) as api:
        yield api


@pytest.fixture
async def relay(pool: Pool, redis: Redis) -> AsyncIterator[None]:
    stop = asyncio.Event()
    task = asyncio.create_task(run_relay(pool, redis, stop))
    yield
    stop.set()
    await task


async def receive(socket: ClientConnection) -> Document:
    async with asyncio.timeout(10):
        decoded: Document = msgspec.json.decode(await socket.recv())
        return decoded


async def authenticate(socket: ClientConnection, token: str) -> None:
    await socket.send(msgspec.json.encode({"op": "auth", "token": token}))
    assert (await receive(socket))["channel"] == "auth"


async def close_code(socket: ClientConnection) -> int | None:
    """The code the server closes the socket with."""
    try:
        while True:
            await receive(socket)
    except ConnectionClosed as closed:
        return closed.rcvd.code if closed.rcvd else None


async def push(pool: Pool, *pushes: UserPush) -> None:
    async with pool.acquire() as conn, conn.transaction():
        await emit(conn, pushes=pushes)


async def add(redis: Redis, message_id: str, user_id: int, data: object) -> None:
    """What the relay writes for one push."""
    payload = msgspec.json.encode([{"userId": user_id, "channel": "order", "data": data}])
    await redis.xadd("gateway.user-push", {"id": message_id, "event": "UserPush", "data": payload})


@pytest.mark.usefixtures("relay")
async def test_a_user_gets_what_is_pushed_to_it_in_order_and_nothing_else(api: Api, pool: Pool) -> None:
    alice, _ = await api.sign_in(ALICE)
    bob, _ = await api.sign_in(BOB)
    async with connect(f"{api.ws}/ws/user") as first, connect(f"{api.ws}/ws/user") as second:
        await authenticate(first, alice)
        await authenticate(second, bob)
        await push(pool, UserPush(BOB, "balance", {"available": "1"}), UserPush(ALICE, "order", {"orderId": 1}))
        await push(pool, UserPush(ALICE, "fill", {"tradeId": 2}))
        assert await receive(first) == {"channel": "order", "data": {"orderId": 1}}
        assert await receive(first) == {"channel": "fill", "data": {"tradeId": 2}}
        assert await receive(second) == {"channel": "balance", "data": {"available": "1"}}


@pytest.mark.usefixtures("relay")
async def test_all_sockets_of_a_user_get_its_messages(api: Api, pool: Pool) -> None:
    token, _ = await api.sign_in(ALICE)
    async with connect(f"{api.ws}/ws/user") as first, connect(f"{api.ws}/ws/user") as second:
        await authenticate(first, token)
        await authenticate(second, token)
        await push(pool, UserPush(ALICE, "order", {"orderId": 1}))
        assert await receive(first) == await receive(second)


async def test_what_was_pushed_before_is_not_repeated(api: Api, redis: Redis) -> None:
    token, _ = await api.sign_in(ALICE)
    await add(redis, "1-0", ALICE, "old")
    async with connect(f"{api.ws}/ws/user") as socket:
        await authenticate(socket, token)
        await add(redis, "2-0", ALICE, "new")
        assert (await receive(socket))["data"] == "new"


async def test_what_is_pushed_before_a_new_socket_is_answered_comes_after_the_answer(
    api: Api, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    join, offer, is_offered = UserFeed.join, SocketClient.offer, asyncio.Event()

    async def join_as_something_happens(feed: UserFeed, client: SocketClient, identity: Identity) -> None:
        await join(feed, client, identity)
        await add(redis, "1-0", ALICE, "meanwhile")
        await is_offered.wait()

    def noted(client: SocketClient, payload: bytes, source: Source | None = None) -> None:
        offer(client, payload, source)
        if b"meanwhile" in payload:
            is_offered.set()

    monkeypatch.setattr(UserFeed, "join", join_as_something_happens)
    monkeypatch.setattr(SocketClient, "offer", noted)
    token, _ = await api.sign_in(ALICE)
    async with connect(f"{api.ws}/ws/user") as socket:
        await authenticate(socket, token)
        assert (await receive(socket))["data"] == "meanwhile"


async def test_an_entry_that_the_relay_repeats_is_sent_once(api: Api, redis: Redis) -> None:
    token, _ = await api.sign_in(ALICE)
    async with connect(f"{api.ws}/ws/user") as socket:
        await authenticate(socket, token)
        for message_id in ("1-0", "1-1", "1-0", "1-1", "2-0"):
            await add(redis, message_id, ALICE, message_id)
        assert [(await receive(socket))["data"] for _ in range(3)] == ["1-0", "1-1", "2-0"]


async def test_a_burst_larger_than_one_read_arrives_whole(api: Api, redis: Redis) -> None:
    token, _ = await api.sign_in(ALICE)
    async with connect(f"{api.ws}/ws/user") as socket:
        await authenticate(socket, token)
        async with redis.pipeline(transaction=False) as pipe:
            for number in range(5000):
                payload = msgspec.json.encode([{"userId": ALICE, "channel": "order", "data": number}])
                pipe.xadd("gateway.user-push", {"id": f"{number}-0", "event": "UserPush", "data": payload})
            await pipe.execute()
        assert [(await receive(socket))["data"] for _ in range(5000)] == list(range(5000))


async def test_a_revoked_session_closes_its_sockets_at_once_and_no_others(api: Api, redis: Redis) -> None:
    token, session_id = await api.sign_in(ALICE)
    other_token, _ = await api.sign_in(ALICE)
    async with connect(f"{api.ws}/ws/user") as revoked, connect(f"{api.ws}/ws/user") as other:
        await authenticate(revoked, token)
        await authenticate(other, other_token)
        await redis.publish(REVOKED_CHANNEL, session_id)
        async with asyncio.timeout(PUSHED_SECONDS):
            assert await close_code(revoked) == 4401
        await add(redis, "1-0", ALICE, "still here")
        assert (await receive(other))["data"] == "still here"


async def test_a_revocation_that_redis_did_not_deliver_is_noticed_on_reconnect(
    api: Api, redis: Redis, pool: Pool
) -> None:
    token, session_id = await api.sign_in(ALICE)
    async with connect(f"{api.ws}/ws/user") as socket:
        await authenticate(socket, token)
        await pool.execute("UPDATE auth.auth_sessions SET revoked_at = now() WHERE session_id = $1", session_id)
        await redis.delete(session_key(session_id))
        await redis.client_kill_filter(_type="pubsub")
        assert await close_code(socket) == 4401


@pytest.mark.parametrize(
    "first_message",
    ['{"op":"auth","token":"forged"}', '{"op":"auth"}', '{"op":"subscribe","channel":"depth"}', "not json", "[]"],
)
async def test_a_socket_without_a_good_token_is_closed(api: Api, first_message: str) -> None:
    async with connect(f"{api.ws}/ws/user") as socket:
        await socket.send(first_message)
        assert await close_code(socket) == 4401


async def test_the_token_of_an_ended_session_is_refused(api: Api, redis: Redis, pool: Pool) -> None:
    token, session_id = await api.sign_in(ALICE)
    await pool.execute("UPDATE auth.auth_sessions SET revoked_at = now() WHERE session_id = $1", session_id)
    await redis.delete(session_key(session_id))
    async with connect(f"{api.ws}/ws/user") as socket:
        await socket.send(msgspec.json.encode({"op": "auth", "token": token}))
        assert await close_code(socket) == 4401


async def test_a_socket_that_says_nothing_is_closed(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "AUTH_SECONDS", 0.2)
    async with connect(f"{api.ws}/ws/user") as socket:
        assert await close_code(socket) == 4401


async def test_a_message_after_the_first_is_answered_with_an_error(api: Api, redis: Redis) -> None:
    token, _ = await api.sign_in(ALICE)
    async with connect(f"{api.ws}/ws/user") as socket:
        await authenticate(socket, token)
        await socket.send('{"op":"dance"}')
        assert (await receive(socket))["code"] == "VALIDATION_FAILED"
        await add(redis, "1-0", ALICE, 1)
        assert (await receive(socket))["data"] == 1


async def test_a_reader_that_stands_still_is_disconnected_and_others_are_served(
    api: Api, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sockets, "USER_QUEUE_MAX", 10)
    monkeypatch.setattr(socket_client, "CLOSE_SECONDS", 30.0)
    slow_token, _ = await api.sign_in(ALICE)
    quick_token, _ = await api.sign_in(BOB)
    large = "x" * 20_000
    async with (
        connect_slow_reader(api, "/ws/user") as slow,
        connect(f"{api.ws}/ws/user") as quick,
    ):
        await authenticate(slow, slow_token)
        await authenticate(quick, quick_token)
        for number in range(150):
            await add(redis, f"{number}-0", ALICE, large)
            if number % 10 == 0:
                await add(redis, f"{number}-1", BOB, number)
                assert (await receive(quick))["data"] == number
        # What had been buffered on the way comes first, then the end.
        assert await close_code(slow) == 4008

"""Private sockets of programs: opened by a message that an API key has signed, and as good as the key."""

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import httpx
import msgspec
import pytest
from redis.asyncio import Redis
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from api.identity.signatures import canonical
from settings import Settings
from storage.db import Pool
from tests.integration.identity_app import Exchange, bearer
from tests.integration.socket_app import Api, running_api
from tests.integration.test_identity_api_keys import Sign, make, signed
from tests.waiting import PUSHED_SECONDS

UNAUTHENTICATED, FORBIDDEN = 4401, 4403


@dataclass(frozen=True)
class Keys:
    """An api with a user who makes API keys."""

    api: Api
    exchange: Exchange
    user_id: int
    headers: dict[str, str]

    async def make(self, **changes: Any) -> tuple[str, Sign]:
        """A new key of the user: its id, and how a program signs with it."""
        return await make(self.exchange, self.headers, **changes)

    def connect(self) -> connect:
        """A socket that has said nothing yet."""
        return connect(f"{self.api.ws}/ws/user")


@pytest.fixture
async def keys(settings: Settings) -> AsyncIterator[Keys]:
    async with running_api(settings) as api, httpx.AsyncClient(base_url=api.http, trust_env=False) as client:
        exchange = Exchange(client, api.app, api.state)
        user_id = await exchange.add_user()
        yield Keys(api, exchange, user_id, bearer((await exchange.login())["accessToken"]))


def auth(key_id: str, sign: Sign, **changes: Any) -> dict[str, Any]:
    """The first message, well signed; `changes` are made before signing."""
    values = {"timestamp": time.time_ns() // 1_000_000, "recvWindow": 5000, "nonce": "", **changes}
    text = canonical("GET", "/ws/user", str(values["timestamp"]), str(values["recvWindow"]), values["nonce"], b"")
    return {"op": "auth", "apiKey": key_id, **values, "signature": sign(text)}


async def answer(socket: ClientConnection, message: dict[str, Any]) -> dict[str, Any] | int:
    """What the socket says to a message, or the code it is closed with."""
    await socket.send(msgspec.json.encode(message).decode())
    return await heard(socket)


async def heard(socket: ClientConnection) -> dict[str, Any] | int:
    try:
        async with asyncio.timeout(10):
            decoded: dict[str, Any] = msgspec.json.decode(await socket.recv())
            return decoded
    except ConnectionClosed as closed:
        return 0 if closed.rcvd is None else closed.rcvd.code


async def tried(keys: Keys, message: dict[str, Any]) -> dict[str, Any] | int:
    """The same for the first message of a new socket."""
    async with keys.connect() as socket:
        return await answer(socket, message)


async def push(redis: Redis, user_id: int, data: object) -> None:
    payload = msgspec.json.encode([{"userId": user_id, "channel": "order", "data": data}])
    await redis.xadd("gateway.user-push", {"id": f"{time.time_ns()}-0", "event": "UserPush", "data": payload})


def welcome(keys: Keys) -> dict[str, Any]:
    return {"channel": "auth", "data": {"userId": str(keys.user_id)}}


@pytest.mark.parametrize("algorithm", ["HMAC_SHA256", "ED25519"])
async def test_a_signed_message_opens_the_users_socket(keys: Keys, redis: Redis, algorithm: str) -> None:
    key_id, sign = await keys.make(algorithm=algorithm, permissions=["READ"], allowedAddresses=["127.0.0.0/8"])
    async with keys.connect() as socket:
        assert await answer(socket, auth(key_id, sign)) == welcome(keys)
        await push(redis, keys.user_id, 1)
        assert await heard(socket) == {"channel": "order", "data": 1}


async def test_the_receive_window_may_be_left_out(keys: Keys) -> None:
    message = auth(*await keys.make())
    assert (message.pop("recvWindow"), message.pop("nonce")) == (5000, "")
    assert await tried(keys, message) == welcome(keys)


async def test_whatever_is_changed_after_signing_opens_nothing(keys: Keys) -> None:
    key_id, sign = await keys.make()
    other_id, _ = await keys.make()
    message = auth(key_id, sign)
    changes: list[dict[str, Any]] = [
        {"apiKey": other_id},
        {"apiKey": "ak_unknownunknownunknown"},
        {"apiKey": "' OR 1=1 --"},
        {"timestamp": message["timestamp"] + 1},
        {"timestamp": "soon"},
        {"timestamp": -1},
        {"timestamp": 10**400},
        {"recvWindow": 5001},
        {"nonce": "x"},
        {"nonce": "x\ny"},
        {"signature": "00" * 32},
        {"signature": ""},
        {"signature": "no hex"},
        {"token": "x"},
        {"token": keys.headers["Authorization"].removeprefix("Bearer ")},
    ]
    for change in changes:
        assert await tried(keys, {**message, **change}) == UNAUTHENTICATED, change
    # None of these has used the message up.
    assert await tried(keys, message) == welcome(keys)


async def test_a_message_is_good_once_and_within_its_window(keys: Keys) -> None:
    key_id, sign = await keys.make()
    now = time.time_ns() // 1_000_000
    message = auth(key_id, sign)
    assert await tried(keys, message) == welcome(keys)
    assert await tried(keys, message) == UNAUTHENTICATED
    assert await tried(keys, auth(key_id, sign, timestamp=message["timestamp"], nonce="2")) == welcome(keys)
    assert await tried(keys, auth(key_id, sign, timestamp=now - 6_000)) == UNAUTHENTICATED
    assert await tried(keys, auth(key_id, sign, timestamp=now - 6_000, recvWindow=30_000)) == welcome(keys)
    assert await tried(keys, auth(key_id, sign, timestamp=now + 60_000)) == UNAUTHENTICATED
    assert await tried(keys, auth(key_id, sign, recvWindow=60_001)) == UNAUTHENTICATED
    once = auth(key_id, sign)
    answers = await asyncio.gather(*(tried(keys, once) for _ in range(5)))
    assert sorted(answers, key=str) == [UNAUTHENTICATED] * 4 + [welcome(keys)]


async def test_a_signed_request_opens_no_socket_and_a_socket_message_makes_no_request(keys: Keys) -> None:
    key_id, sign = await keys.make()
    headers = signed(key_id, sign, "GET", "/api/users/me")
    stolen = {"apiKey": key_id, "timestamp": int(headers["X-Api-timestamp"]), "signature": headers["X-Api-Signature"]}
    assert await tried(keys, {"op": "auth", **stolen}) == UNAUTHENTICATED
    message = auth(key_id, sign)
    request = {
        "X-Api-Key": key_id,
        "X-Api-Timestamp": str(message["timestamp"]),
        "X-Api-Signature": message["signature"],
    }
    assert (await keys.exchange.client.get("/api/users/me", headers=request)).status_code == 401


@pytest.mark.parametrize(
    "limits", [{"permissions": ["TRADE"]}, {"allowedAddresses": ["192.0.2.0/24"]}], ids=["no READ", "elsewhere"]
)
async def test_a_key_that_may_not_read_or_not_from_here_is_refused(keys: Keys, limits: dict[str, Any]) -> None:
    assert await tried(keys, auth(*await keys.make(**limits))) == FORBIDDEN


async def test_a_revoked_key_ends_its_sockets_at_once_and_no_others(keys: Keys, redis: Redis) -> None:
    (first_id, sign_first), (second_id, sign_second) = await keys.make(), await keys.make()
    async with keys.connect() as first, keys.connect() as second:
        assert await answer(first, auth(first_id, sign_first)) == welcome(keys)
        assert await answer(second, auth(second_id, sign_second)) == welcome(keys)
        async with asyncio.timeout(PUSHED_SECONDS):
            await keys.exchange.client.delete(f"/api/auth/api-keys/{first_id}", headers=keys.headers)
            assert await heard(first) == UNAUTHENTICATED
        await push(redis, keys.user_id, "still here")
        assert await heard(second) == {"channel": "order", "data": "still here"}
    assert await tried(keys, auth(first_id, sign_first)) == UNAUTHENTICATED


async def test_an_operators_lock_ends_the_sockets_of_the_users_keys_and_unlocking_ends_none(
    keys: Keys, pool: Pool, redis: Redis
) -> None:
    root = await keys.exchange.add_user("root@example.com")
    await pool.execute("UPDATE auth.auth_credentials SET roles = '{user,admin}' WHERE user_id = $1", root)
    admin = bearer((await keys.exchange.login("root@example.com"))["accessToken"])
    url = f"/api/admin/users/{keys.user_id}"
    key_id, sign = await keys.make()
    async with keys.connect() as socket:
        assert await answer(socket, auth(key_id, sign)) == welcome(keys)
        assert (await keys.exchange.client.post(f"{url}/unlock", headers=admin)).status_code == 200
        await push(redis, keys.user_id, "still here")
        assert await heard(socket) == {"channel": "order", "data": "still here"}
        async with asyncio.timeout(PUSHED_SECONDS):
            assert (await keys.exchange.client.post(f"{url}/lock", headers=admin)).status_code == 200
            assert await heard(socket) == UNAUTHENTICATED
    assert await tried(keys, auth(key_id, sign)) == UNAUTHENTICATED


async def test_a_revocation_that_redis_did_not_deliver_is_noticed_on_reconnect(
    keys: Keys, redis: Redis, pool: Pool
) -> None:
    key_id, sign = await keys.make()
    async with keys.connect() as socket:
        assert await answer(socket, auth(key_id, sign)) == welcome(keys)
        await pool.execute("UPDATE auth.api_keys SET revoked_at = now() WHERE key_id = $1", key_id)
        await redis.client_kill_filter(_type="pubsub")
        assert await heard(socket) == UNAUTHENTICATED


async def test_a_doubt_that_cannot_be_settled_is_kept_until_it_can(
    keys: Keys, redis: Redis, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    key_id, sign = await keys.make()
    token = (await keys.exchange.login())["accessToken"]
    tries = 0
    require = keys.api.state.keys.require

    async def failing_require(key_id: str) -> None:
        nonlocal tries
        tries += 1
        if tries < 3:
            raise ConnectionError("the database is away")
        await require(key_id)

    async with keys.connect() as program, keys.connect() as person:
        assert await answer(program, auth(key_id, sign)) == welcome(keys)
        assert await answer(person, {"op": "auth", "token": token}) == welcome(keys)
        monkeypatch.setattr(keys.api.state.keys, "require", failing_require)
        await keys.exchange.client.delete(f"/api/auth/api-keys/{key_id}", headers=keys.headers)
        assert await heard(program) == UNAUTHENTICATED
        assert tries == 3
        await push(redis, keys.user_id, "still here")
        assert await heard(person) == {"channel": "order", "data": "still here"}

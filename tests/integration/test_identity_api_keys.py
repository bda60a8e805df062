"""API keys: requests that a program has signed, and all that is refused."""

import asyncio
import hmac
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from api.identity.signatures import REMEMBERED_SECONDS, canonical
from storage.db import Pool
from tests.integration.identity_app import (
    Exchange,
    bearer,
    running_exchange,
    settings_without_workflows,
)
from tests.waiting import PUSHED_SECONDS

Sign = Callable[[bytes], str]
ED25519 = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))


@pytest_asyncio.fixture
async def exchange(database_url: str, redis_url: str, temporal_address: str, tmp_path: Path) -> AsyncIterator[Exchange]:
    settings = settings_without_workflows(database_url, redis_url, temporal_address, tmp_path)
    async with running_exchange(settings) as exchange:
        await exchange.add_user()
        yield exchange


@pytest_asyncio.fixture
async def alice(exchange: Exchange) -> dict[str, str]:
    return bearer((await exchange.login())["accessToken"])


async def make(exchange: Exchange, headers: dict[str, str], **changes: Any) -> tuple[str, Sign]:
    """A new key: its id, and how a program signs with it."""
    body = {"label": "bot", "algorithm": "HMAC_SHA256", "permissions": ["READ", "TRADE"], **changes}
    if body["algorithm"] == "ED25519":
        body["publicKey"] = ED25519.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw).hex()
    answer = await exchange.client.post("/api/auth/api-keys", json=body, headers=headers)
    assert answer.status_code == 201, answer.text
    key = answer.json()
    if key["secret"] is None:
        return key["keyId"], lambda text: ED25519.sign(text).hex()
    return key["keyId"], lambda text: hmac.digest(key["secret"].encode(), text, "sha256").hex()


def signed(key_id: str, sign: Sign, method: str, target: str, body: bytes = b"", /, **changes: str) -> dict[str, str]:
    """The headers of a signed request; `changes` are made before signing."""
    values = {"timestamp": str(time.time_ns() // 1_000_000), "recv-window": "5000", "nonce": "", **changes}
    signature = sign(canonical(method, target, values["timestamp"], values["recv-window"], values["nonce"], body))
    return {"X-Api-Key": key_id, "X-Api-Signature": signature, **{f"X-Api-{name}": it for name, it in values.items()}}


async def me(exchange: Exchange, headers: dict[str, str], target: str = "/api/users/me") -> tuple[int, str | None]:
    answer = await exchange.client.get(target, headers=headers)
    return answer.status_code, answer.json().get("code", answer.json().get("email"))


@pytest.mark.parametrize("algorithm", ["HMAC_SHA256", "ED25519"])
async def test_a_signed_request_is_its_users(exchange: Exchange, alice: dict[str, str], algorithm: str) -> None:
    key_id, sign = await make(exchange, alice, algorithm=algorithm)
    assert await me(exchange, signed(key_id, sign, "GET", "/api/users/me")) == (200, "alice@example.com")
    for target in ("/api/ledger/entries?asset=%2F&limit=1&cursor=7", "/api/orders?instrument_id=a+b%2F&limit=1"):
        assert await me(exchange, signed(key_id, sign, "GET", target), target) == (200, None)


async def test_whatever_is_changed_after_signing_makes_the_signature_worthless(
    exchange: Exchange, alice: dict[str, str]
) -> None:
    key_id, sign = await make(exchange, alice)
    other_id, _ = await make(exchange, alice)
    headers = signed(key_id, sign, "GET", "/api/users/me")
    changes = [
        {"X-Api-Key": other_id},
        {"X-Api-Key": "ak_unknownunknownunknown"},
        {"X-Api-Key": "' OR 1=1 --"},
        {"X-Api-Timestamp": str(int(headers["X-Api-timestamp"]) + 1)},
        {"X-Api-Recv-Window": "5001"},
        {"X-Api-Nonce": "x"},
        {"X-Api-Signature": "00" * 32},
        {"X-Api-Signature": ""},
        {"X-Api-Signature": "no hex"},
    ]
    for change in changes:
        changed = {**_lower(headers), **_lower(change)}
        assert await me(exchange, changed) == (401, "UNAUTHENTICATED"), change
    ask = signed(key_id, sign, "GET", "/api/orders?instrument_id=A&limit=1")
    for target in ("limit=1&instrument_id=A", "instrumentId=A&limit=1", "instrument_id=A&limit=2", "instrument_id=A"):
        assert await me(exchange, ask, f"/api/orders?{target}") == (401, "UNAUTHENTICATED")
    assert await me(exchange, {**headers, **alice}) == (401, "UNAUTHENTICATED")
    body = b'{"marginMode": "CROSS"}'
    url = "/api/positions/BTC-USDT-PERP/margin-mode"
    put = signed(key_id, sign, "PUT", url, body)
    answer = await exchange.client.put(
        url, content=b'{"marginMode": "ISOLATED"}', headers={**put, "Content-Type": "application/json"}
    )
    assert answer.status_code == 401
    answer = await exchange.client.put(url, content=body, headers={**put, "Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["marginMode"]) == (200, "CROSS")


def _lower(headers: dict[str, str]) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items()}


async def test_a_request_is_good_once_and_within_its_window(exchange: Exchange, alice: dict[str, str]) -> None:
    key_id, sign = await make(exchange, alice)
    now = time.time_ns() // 1_000_000

    async def ask(**changes: str) -> int:
        return (await me(exchange, signed(key_id, sign, "GET", "/api/users/me", **changes)))[0]

    assert [await ask(timestamp=str(now)), await ask(timestamp=str(now))] == [200, 401]
    assert await ask(timestamp=str(now), nonce="another") == 200
    assert await ask(timestamp=str(now - 6_000)) == 401
    assert await ask(timestamp=str(now - 6_000), **{"recv-window": "30000"}) == 200
    assert await ask(timestamp=str(now + 5_000)) == 401
    assert await ask(**{"recv-window": "60001"}) == 401
    assert await ask(timestamp="soon") == 401
    assert await ask(nonce="x" * 65) == 401
    answers = await asyncio.gather(*(ask(timestamp=str(now + 1)) for _ in range(5)))
    assert sorted(answers) == [200, 401, 401, 401, 401]


async def test_a_key_may_do_what_it_is_for_and_from_where(exchange: Exchange, alice: dict[str, str]) -> None:
    reader, sign = await make(exchange, alice, permissions=["READ"])
    url = "/api/orders/cancel-all-after"
    body = b'{"timeoutMs": 0}'

    async def post(key_id: str, sign: Sign) -> tuple[int, str | None]:
        headers = {**signed(key_id, sign, "POST", url, body), "Content-Type": "application/json"}
        answer = await exchange.client.post(url, content=body, headers=headers)
        return answer.status_code, answer.json().get("code")

    assert await post(reader, sign) == (403, "FORBIDDEN")
    trader, sign = await make(exchange, alice, permissions=["TRADE"])
    assert await me(exchange, signed(trader, sign, "GET", "/api/users/me")) == (403, "FORBIDDEN")
    assert await post(trader, sign) == (200, None)
    assert await post(*await make(exchange, alice)) == (200, None)
    elsewhere, sign = await make(exchange, alice, allowedAddresses=["192.0.2.0/24", "2001:db8::/32"])
    assert await me(exchange, signed(elsewhere, sign, "GET", "/api/users/me")) == (403, "FORBIDDEN")
    here, sign = await make(exchange, alice, allowedAddresses=["127.0.0.0/8"])
    assert await me(exchange, signed(here, sign, "GET", "/api/users/me")) == (200, "alice@example.com")


async def test_a_key_manages_no_account_and_is_never_an_operators(
    exchange: Exchange, alice: dict[str, str], pool: Pool
) -> None:
    await pool.execute("UPDATE auth.auth_credentials SET roles = '{user,admin}'")
    admin = bearer((await exchange.login())["accessToken"])
    key_id, sign = await make(exchange, admin)
    for url in ("/api/auth/api-keys", "/api/auth/sessions", "/api/admin/ledger/audit"):
        assert (await me(exchange, signed(key_id, sign, "GET", url), url))[0] == 401
        assert (await exchange.client.get(url, headers=admin)).status_code == 200
    other = await exchange.add_user("bob@example.com")
    url = f"/api/positions?userId={other}"
    assert (await exchange.client.get(url, headers=admin)).status_code == 200
    assert await me(exchange, signed(key_id, sign, "GET", url), url) == (403, "FORBIDDEN")


async def test_keys_are_listed_without_secrets_and_belong_to_their_user(
    exchange: Exchange, alice: dict[str, str], pool: Pool
) -> None:
    key_id, _ = await make(exchange, alice, label="first")
    await make(exchange, alice, algorithm="ED25519")
    await exchange.add_user("bob@example.com")
    bob = bearer((await exchange.login("bob@example.com"))["accessToken"])
    listed = (await exchange.client.get("/api/auth/api-keys", headers=alice)).json()
    assert [key["label"] for key in listed] == ["bot", "first"]
    assert all("secret" not in key for key in listed)
    assert (await exchange.client.get("/api/auth/api-keys", headers=bob)).json() == []
    assert (await exchange.client.delete(f"/api/auth/api-keys/{key_id}", headers=bob)).status_code == 404
    stored = await pool.fetchval("SELECT secret FROM auth.api_keys WHERE key_id = $1", key_id)
    assert exchange.state.vault is not None
    assert len(exchange.state.vault.decrypt(stored)) == 43
    assert exchange.state.vault.decrypt(stored) not in stored


async def test_a_revoked_key_is_refused_at_once_by_every_process(exchange: Exchange, alice: dict[str, str]) -> None:
    key_id, sign = await make(exchange, alice)
    async with running_exchange(exchange.state.settings) as second:
        for each in (exchange, second):
            assert (await me(each, signed(key_id, sign, "GET", "/api/users/me", nonce=str(id(each)))))[0] == 200
        started = time.monotonic()
        assert (await exchange.client.delete(f"/api/auth/api-keys/{key_id}", headers=alice)).status_code == 204
        for each in (exchange, second):
            while (await me(each, signed(key_id, sign, "GET", "/api/users/me", nonce=str(time.time_ns()))))[0] == 200:
                assert time.monotonic() - started < PUSHED_SECONDS
    # For so long one goes on that did not hear of it.
    assert REMEMBERED_SECONDS <= 1
    assert (await exchange.client.delete(f"/api/auth/api-keys/{key_id}", headers=alice)).status_code == 404


async def test_an_operators_lock_stops_the_users_keys(exchange: Exchange, alice: dict[str, str], pool: Pool) -> None:
    key_id, sign = await make(exchange, alice)
    assert (await me(exchange, signed(key_id, sign, "GET", "/api/users/me")))[0] == 200
    user_id = await exchange.add_user("root@example.com")
    await pool.execute("UPDATE auth.auth_credentials SET roles = '{user,admin}' WHERE user_id = $1", user_id)
    admin = bearer((await exchange.login("root@example.com"))["accessToken"])
    alice_id = await pool.fetchval("SELECT user_id FROM users.users WHERE email = 'alice@example.com'")
    await exchange.client.post(f"/api/admin/users/{alice_id}/lock", headers=admin)
    await asyncio.sleep(0.2)
    assert (await me(exchange, signed(key_id, sign, "GET", "/api/users/me")))[0] == 401


@pytest.mark.parametrize(
    "change",
    [
        {"algorithm": "RSA"},
        {"permissions": []},
        {"permissions": ["ADMIN"]},
        {"allowedAddresses": ["anywhere"]},
        {"allowedAddresses": ["192.0.2.1/24"]},
        {"label": ""},
        {"publicKey": "00"},
        {"algorithm": "ED25519"},
    ],
)
async def test_a_key_that_makes_no_sense_is_not_made(
    exchange: Exchange, alice: dict[str, str], change: dict[str, Any]
) -> None:
    body = {"label": "bot", "algorithm": "HMAC_SHA256", "permissions": ["READ"], **change}
    answer = await exchange.client.post("/api/auth/api-keys", json=body, headers=alice)
    assert (answer.status_code, answer.json()["code"]) == (422, "VALIDATION_FAILED")


async def test_a_user_has_no_more_than_so_many_keys(
    exchange: Exchange, alice: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("activities.api_keys.ACTIVE_KEYS_MAX", 2)
    body = {"label": "bot", "algorithm": "HMAC_SHA256", "permissions": ["READ"]}
    answers = await asyncio.gather(
        *(exchange.client.post("/api/auth/api-keys", json=body, headers=alice) for _ in range(4))
    )
    assert sorted(answer.status_code for answer in answers) == [201, 201, 422, 422]

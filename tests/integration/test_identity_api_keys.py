"""API keys: requests that a program has signed, and all that is refused."""

import asyncio
import hmac
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from api.identity.signatures import REMEMBERED_SECONDS, SignedRequest, canonical
from domain.clock import to_ms
from domain.identity import PROOF_LIFETIME
from domain.problems import Problem
from storage.db import Pool
from tests.integration.identity_app import (
    PASSWORD,
    Exchange,
    bearer,
    running_exchange,
    settings_without_workflows,
)
from tests.security.document import calls
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
    monkeypatch.setattr("activities.identity.api_keys.ACTIVE_KEYS_MAX", 2)
    body = {"label": "bot", "algorithm": "HMAC_SHA256", "permissions": ["READ"]}
    answers = await asyncio.gather(
        *(exchange.client.post("/api/auth/api-keys", json=body, headers=alice) for _ in range(4))
    )
    assert sorted(answer.status_code for answer in answers) == [201, 201, 422, 422]


async def age(pool: Pool) -> None:
    """Everybody signed in a while ago."""
    await pool.execute("UPDATE auth.auth_sessions SET created_at = created_at - $1::interval", PROOF_LIFETIME)


BODY: dict[str, Any] = {"label": "bot", "algorithm": "HMAC_SHA256", "permissions": ["READ", "TRADE"]}


async def test_a_key_is_made_with_the_password_or_soon_after_it_was_shown(
    exchange: Exchange, alice: dict[str, str], pool: Pool
) -> None:
    async def post(**more: str) -> tuple[int, str | None]:
        answer = await exchange.client.post("/api/auth/api-keys", json={**BODY, **more}, headers=alice)
        return answer.status_code, answer.json().get("code")

    assert await post() == (201, None)
    await age(pool)
    assert await post() == (403, "PASSWORD_NEEDED")
    assert await post(password="wrong password") == (401, "INVALID_CREDENTIALS")
    assert await post(password=PASSWORD) == (201, None)
    # The password is proven for this key only.
    assert await post() == (403, "PASSWORD_NEEDED")
    assert await pool.fetchval("SELECT count(*) FROM auth.api_keys") == 2
    assert await pool.fetchval("SELECT count(*) FROM auth.login_audits WHERE outcome = 'FAILED'") == 1


async def test_refreshing_a_session_proves_no_password(exchange: Exchange, pool: Pool) -> None:
    tokens = await exchange.login()
    await age(pool)
    body = {"refreshToken": tokens["refreshToken"]}
    tokens = (await exchange.client.post("/api/auth/token/refresh", json=body)).json()
    answer = await exchange.client.post("/api/auth/api-keys", json=BODY, headers=bearer(tokens["accessToken"]))
    assert answer.json()["code"] == "PASSWORD_NEEDED"


async def test_guessing_the_password_for_a_key_is_slowed(
    exchange: Exchange, alice: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api.limits.login_throttle.ACCOUNT_FREE", 1)
    statuses = [
        (
            await exchange.client.post("/api/auth/api-keys", json={**BODY, "password": f"guess {n}"}, headers=alice)
        ).status_code
        for n in range(3)
    ]
    assert statuses == [401, 401, 429]


async def test_a_key_expires_when_its_user_says_and_no_later_than_the_maximum(
    exchange: Exchange, alice: dict[str, str], pool: Pool
) -> None:
    async def post(expires_at: str) -> tuple[int, str]:
        answer = await exchange.client.post("/api/auth/api-keys", json={**BODY, "expiresAt": expires_at}, headers=alice)
        return answer.status_code, answer.text

    now = datetime.now(UTC)
    for wrong in (now, now - timedelta(days=1), now + timedelta(days=366)):
        status, text = await post(wrong.isoformat())
        assert (status, "expiresAt" in text) == (422, True)
    assert (await post("2030-01-01T00:00:00"))[0] == 422
    assert (await post((now + timedelta(days=364)).isoformat()))[0] == 201
    key_id, sign = await make(exchange, alice)
    key = (await exchange.client.get("/api/auth/api-keys", headers=alice)).json()[0]
    assert timedelta(days=89) < datetime.fromisoformat(key["expiresAt"]) - now < timedelta(days=91)
    assert (await me(exchange, signed(key_id, sign, "GET", "/api/users/me")))[0] == 200
    await pool.execute("UPDATE auth.api_keys SET expires_at = now() WHERE key_id = $1", key_id)
    exchange.state.keys.forget(key_id)
    assert (await me(exchange, signed(key_id, sign, "GET", "/api/users/me", nonce="2")))[0] == 401
    # Whoever looks for the reason finds it.
    assert key_id in {key["keyId"] for key in (await exchange.client.get("/api/auth/api-keys", headers=alice)).json()}


async def test_a_key_that_is_remembered_expires_to_the_moment(exchange: Exchange, alice: dict[str, str]) -> None:
    soon = datetime.now(UTC) + timedelta(seconds=1)
    key_id, sign = await make(exchange, alice, expiresAt=soon.isoformat())
    request = SignedRequest(key_id, "GET", "/x", str(to_ms(soon)), "5000", "", "", None)
    request = replace(request, signature=sign(request.text))
    await exchange.state.keys.authenticate(request, soon - timedelta(milliseconds=1))
    with pytest.raises(Problem, match="UNAUTHENTICATED"):
        await exchange.state.keys.authenticate(replace(request, nonce="2"), soon)


async def test_expired_keys_do_not_count_among_those_that_one_may_have(
    exchange: Exchange, alice: dict[str, str], pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("activities.identity.api_keys.ACTIVE_KEYS_MAX", 1)
    await make(exchange, alice)
    assert (await exchange.client.post("/api/auth/api-keys", json=BODY, headers=alice)).status_code == 422
    await pool.execute("UPDATE auth.api_keys SET expires_at = now()")
    await make(exchange, alice)


async def test_a_key_shows_when_it_was_used_last(exchange: Exchange, alice: dict[str, str], pool: Pool) -> None:
    key_id, sign = await make(exchange, alice)

    async def last_used() -> str | None:
        [key] = (await exchange.client.get("/api/auth/api-keys", headers=alice)).json()
        used: str | None = key["lastUsedAt"]
        return used

    assert await last_used() is None
    wrong = {**signed(key_id, sign, "GET", "/api/users/me"), "X-Api-Signature": "00" * 32}
    assert (await me(exchange, wrong))[0] == 401
    assert await last_used() is None
    assert (await me(exchange, signed(key_id, sign, "GET", "/api/users/me")))[0] == 200
    first = await last_used()
    assert first is not None
    assert timedelta(0) <= datetime.now(UTC) - datetime.fromisoformat(first) < timedelta(seconds=30)
    # Within a minute nothing is written again, by any process.
    async with running_exchange(exchange.state.settings) as second:
        for each in (exchange, second):
            assert (await me(each, signed(key_id, sign, "GET", "/api/users/me", nonce=str(id(each)))))[0] == 200
        assert await last_used() == first
        await pool.execute("UPDATE auth.api_keys SET last_used_at = last_used_at - interval '2 min'")
    async with running_exchange(exchange.state.settings) as third:
        assert (await me(third, signed(key_id, sign, "GET", "/api/users/me", nonce="3")))[0] == 200
    assert (await last_used() or "") > first


async def test_a_key_is_renamed_by_its_user_only(exchange: Exchange, alice: dict[str, str]) -> None:
    key_id, _ = await make(exchange, alice)
    await exchange.add_user("bob@example.com")
    bob = bearer((await exchange.login("bob@example.com"))["accessToken"])
    url = f"/api/auth/api-keys/{key_id}"
    assert (await exchange.client.patch(url, json={"label": "his"}, headers=bob)).status_code == 404
    assert (await exchange.client.patch(url, json={"label": ""}, headers=alice)).status_code == 422
    renamed = await exchange.client.patch(url, json={"label": "new name"}, headers=alice)
    assert (renamed.status_code, renamed.json()["label"], "secret" in renamed.json()) == (200, "new name", False)
    assert [key["label"] for key in (await exchange.client.get("/api/auth/api-keys", headers=alice)).json()] == [
        "new name"
    ]


async def test_all_keys_of_a_user_end_at_once_and_no_others(exchange: Exchange, alice: dict[str, str]) -> None:
    keys = [await make(exchange, alice) for _ in range(3)]
    await exchange.add_user("bob@example.com")
    bobs = await make(exchange, bearer((await exchange.login("bob@example.com"))["accessToken"]))

    async def statuses() -> list[int]:
        nonce = str(time.time_ns())
        return [
            (await me(exchange, signed(key_id, sign, "GET", "/api/users/me", nonce=nonce)))[0]
            for key_id, sign in (*keys, bobs)
        ]

    assert await statuses() == [200] * 4
    assert (await exchange.client.delete("/api/auth/api-keys", headers=alice)).status_code == 204
    await until_equal(statuses, [401, 401, 401, 200])
    assert (await exchange.client.get("/api/auth/api-keys", headers=alice)).json() == []


async def until_equal(ask: Callable[[], Awaitable[object]], expected: object) -> None:
    started = time.monotonic()
    while (answer := await ask()) != expected:
        assert time.monotonic() - started < PUSHED_SECONDS, answer
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("path", ["/api/auth/password", "/api/auth/password/renew"])
@pytest.mark.parametrize(("ends", "status"), [(True, 401), (False, 200)])
async def test_keys_end_with_the_password_if_the_user_asks(
    exchange: Exchange, alice: dict[str, str], path: str, ends: bool, status: int
) -> None:
    key_id, sign = await make(exchange, alice)
    body: dict[str, Any] = {"currentPassword": PASSWORD, "newPassword": "quite another battery", "endApiKeys": ends}
    body |= {"email": "alice@example.com"} if path.endswith("renew") else {}
    assert (await exchange.client.post(path, json=body, headers=alice)).status_code == 204

    async def ask() -> int:
        return (await me(exchange, signed(key_id, sign, "GET", "/api/users/me", nonce=str(time.time_ns()))))[0]

    await until_equal(ask, status)


@pytest.mark.parametrize("permission", ["WITHDRAW", "withdraw", "ADMIN", "*"])
async def test_nothing_but_reading_and_trading_is_a_permission(
    exchange: Exchange, alice: dict[str, str], permission: str
) -> None:
    answer = await exchange.client.post("/api/auth/api-keys", json={**BODY, "permissions": [permission]}, headers=alice)
    assert answer.status_code == 422


BTC, ETH = "BTC-USDT-PERP", "ETH-USDT-PERP"
# What a key with TRADE may call, and what it is about.
CHANGES: dict[str, dict[str, Any] | None] = {
    "POST /api/orders": {"instrumentId": "{}", "side": "BUY", "type": "LIMIT", "quantity": "1", "price": "60000"},
    "POST /api/orders/batch": {
        "orders": [{"instrumentId": "{}", "side": "BUY", "type": "LIMIT", "quantity": "1", "price": "60000"}]
    },
    "POST /api/orders/{order_id}/amend": {"price": "60000"},
    "DELETE /api/orders/{order_id}": None,
    "DELETE /api/orders?instrumentId={instrument_id}": None,
    "PUT /api/positions/{instrument_id}/leverage": {"leverage": 5},
    "POST /api/positions/{instrument_id}/margin": {"amount": "1"},
    "PUT /api/positions/{instrument_id}/margin-mode": {"marginMode": "CROSS"},
}
# About all instruments; and about none, since it changes nothing.
ABOUT_ALL = {"DELETE /api/orders": None, "POST /api/orders/cancel-all-after": {"timeoutMs": 0}}
ABOUT_NONE = {"POST /api/risk/pre-check"}


async def test_a_key_that_is_bound_to_instruments_changes_nothing_else(
    exchange: Exchange, alice: dict[str, str], pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Nobody works here: what is allowed is not finished.
    monkeypatch.setattr("api.routes.positions.CHANGE_SECONDS_MAX", 0.1)
    taken = {
        call.name
        for call in calls(exchange.app.openapi())
        if call.method != "GET" and "apiKey" in call.schemes and call.roles != {"internal"}
    }
    assert {name.partition("?")[0] for name in (*CHANGES, *ABOUT_ALL)} | ABOUT_NONE == taken
    for number, instrument_id in ((1, BTC), (2, ETH)):
        await pool.execute(
            "INSERT INTO orders.orders (order_id, user_id, instrument_id, side, type, time_in_force, price,"
            " bound_price, quantity, status, stp_mode) VALUES ($1, 1000, $2, 'BUY', 'LIMIT', 'GTC', 60000, 60000, 1,"
            " 'CANCELLED', 'EXPIRE_TAKER')",
            number,
            instrument_id,
        )
    free, bound = await make(exchange, alice), await make(exchange, alice, instruments=[BTC])

    async def ask(key: tuple[str, Sign], name: str, body: dict[str, Any] | None, instrument_id: str = BTC) -> str:
        method, _, target = name.partition(" ")
        target = target.format(order_id=1 if instrument_id == BTC else 2, instrument_id=instrument_id)
        content = b"" if body is None else json.dumps(body).replace("{}", instrument_id).encode()
        headers = signed(*key, method, target, content, nonce=str(time.time_ns()))
        headers |= {"Content-Type": "application/json"} if content else {}
        async with asyncio.timeout(30):
            answer = await exchange.client.request(method, target, content=content, headers=headers)
        return "FORBIDDEN" if "FORBIDDEN" in answer.text else "allowed"

    for name, body in CHANGES.items():
        answers = [await ask(key, name, body, each) for key in (free, bound) for each in (BTC, ETH)]
        assert answers == ["allowed", "allowed", "allowed", "FORBIDDEN"], name
    for name, body in ABOUT_ALL.items():
        assert [await ask(key, name, body) for key in (free, bound)] == ["allowed", "FORBIDDEN"], name
    answer = await exchange.client.post("/api/auth/api-keys", json={**BODY, "instruments": ["X"]}, headers=alice)
    assert (answer.status_code, answer.json()["code"]) == (404, "INSTRUMENT_NOT_FOUND")

"""Attacks on the api: refused, logged, and the service stays up (see the fixture)."""

import asyncio
import base64
import json
import logging
import uuid
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from api.edge.gateway import BODY_BYTES_MAX
from api.identity.tokens import AUDIENCE, ISSUER, key_id, load_keys
from storage.db import Pool
from tests.integration.identity_app import INTERNAL_TOKEN, PASSWORD, Exchange, bearer
from tests.integration.test_identity_api_keys import make
from tests.security.conftest import sign_in
from tests.security.document import Call, calls

ALICE = 1000
JSON = {"Content-Type": "application/json"}
INJECTIONS = [
    "' OR '1'='1",
    "'; DROP TABLE users.users; --",
    '" UNION SELECT secret_hash FROM auth.auth_credentials --',
    "1); SELECT pg_sleep(10); --",
    "%27%20OR%201=1",
    "\\'; COPY users.users TO PROGRAM 'id'; --",
]


def key_of(exchange: Exchange) -> Ed25519PrivateKey:
    assert exchange.state.settings.jwt_private_key_file is not None
    return load_keys(exchange.state.settings.jwt_private_key_file)[0]


def claims(session_id: str, **changes: object) -> dict[str, Any]:
    now = int(datetime.now(UTC).timestamp())
    usual = {
        "iss": ISSUER,
        "aud": AUDIENCE,
        "sub": str(ALICE),
        "sid": session_id,
        "roles": ["user"],
        "iat": now,
        "exp": now + 600,
        "jti": "x",
    }
    return {**usual, **changes}


def parts(*documents: dict[str, Any]) -> str:
    encoded = [base64.urlsafe_b64encode(json.dumps(each).encode()).decode().rstrip("=") for each in documents]
    return ".".join(encoded) + "."


async def test_no_tampered_token_opens_anything_and_each_is_logged(
    exchange: Exchange, caplog: pytest.LogCaptureFixture
) -> None:
    tokens = await exchange.login()
    good, sid, key = tokens["accessToken"], tokens["sessionId"], key_of(exchange)
    header = {"typ": "at+jwt", "kid": key_id(key)}
    public = key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    pem = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    now = datetime.now(UTC)

    def sign(body: dict[str, Any], headers: dict[str, Any] | None = None, with_key: Any = key) -> str:
        return jwt.encode(body, with_key, algorithm="EdDSA", headers=headers or header)

    assert (await me(exchange, sign(claims(sid)))).status_code == 200
    head, payload, signature = good.split(".")
    mac_head = parts({"alg": "HS256", **header}, claims(sid, roles=["user", "admin"]))[:-1]
    mac = jwt.api_jws.PyJWS().get_algorithm_by_name("HS256").sign
    forged = {
        "alg none": parts({"alg": "none", **header}, claims(sid)),
        "alg None": parts({"alg": "nOnE", **header}, claims(sid)) + signature,
        "HS256 with the public key": f"{mac_head}.{base64url(mac(mac_head.encode(), public))}",
        "HS256 with its PEM": f"{mac_head}.{base64url(mac(mac_head.encode(), pem))}",
        "another key": sign(claims(sid), with_key=Ed25519PrivateKey.generate()),
        "another key with its own kid in a header": sign(
            claims(sid), {**header, "jwk": {"kty": "OKP", "crv": "Ed25519", "x": "AA"}}, Ed25519PrivateKey.generate()
        ),
        "expired": sign(claims(sid, exp=int((now - timedelta(minutes=1)).timestamp()))),
        "not yet": sign(claims(sid, nbf=int((now + timedelta(minutes=9)).timestamp()))),
        "another audience": sign(claims(sid, aud="another-api")),
        "another issuer": sign(claims(sid, iss="another")),
        "another type": sign(claims(sid), {**header, "typ": "JWT"}),
        "no kid": sign(claims(sid), {"typ": "at+jwt"}),
        "unknown kid": sign(claims(sid), {**header, "kid": "../../etc/passwd"}),
        "kid of another kind": parts({"alg": "EdDSA", "typ": "at+jwt", "kid": ["a"]}, claims(sid)) + signature,
        "cut off": good[:-4],
        "refresh token": tokens["refreshToken"],
        "no session": sign(claims(str(uuid.uuid4()))),
        "changed payload": f"{head}.{parts(claims(sid, sub='1'))[:-1]}.{signature}",
        "no signature": f"{head}.{payload}.",
        "empty": "",
        "very long": "a" * 20_000,
    }
    for what, token in forged.items():
        caplog.clear()
        answer = await me(exchange, token)
        assert (answer.status_code, answer.json()["code"]) == (401, "UNAUTHENTICATED"), what
        assert any(record.name == "access" and record.levelno == logging.WARNING for record in caplog.records), what
        assert len(token) < 30 or token not in caplog.text


async def me(exchange: Exchange, token: str) -> httpx.Response:
    return await exchange.client.get("/api/users/me", headers=bearer(token))


def base64url(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


async def add_order(pool: Pool) -> int:
    """An open order of Alice's, as a row."""
    order_id: int = await pool.fetchval(
        "INSERT INTO orders.orders (order_id, user_id, instrument_id, side, type, time_in_force, price, bound_price,"
        " quantity, status, stp_mode) VALUES (nextval('orders.order_id_seq'), $1, 'BTC-USDT-PERP', 'BUY', 'LIMIT',"
        " 'GTC', 60000, 60000, 1, 'PLACED', 'EXPIRE_TAKER') RETURNING order_id",
        ALICE,
    )
    return order_id


async def test_what_belongs_to_another_is_out_of_reach_on_every_route_that_takes_an_id(
    exchange: Exchange, pool: Pool
) -> None:
    alice, bob_id = await exchange.login(), await exchange.add_user("bob@example.com")
    bob = await sign_in(exchange, bob_id)
    order_id = str(await add_order(pool))
    alices_key, _ = await make(exchange, bearer(alice["accessToken"]))
    ids = {"order_id": order_id, "session_id": alice["sessionId"], "keyId": alices_key, "userId": str(ALICE)}
    # What everybody may name.
    public = {"instrument_id", "instrumentId"}
    tried = 0
    for call in calls(exchange.app.openapi()):
        in_query = {each["name"] for each in call.parameters if each["in"] == "query"} & {"userId"}
        properties = {*(call.body or {}).get("properties", {})} & {"userId", "orderId"}
        named = {*call.in_path, *in_query} - public
        if call.security == [] or not (named or properties):
            continue
        assert named <= set(ids), f"{call.name} takes an id that this test does not know: say whose it is"
        body = {name: {"userId": str(ALICE), "orderId": int(order_id)}[name] for name in properties}
        order = {"instrumentId": "BTC-USDT-PERP", "side": "BUY", "quantity": "1", "price": "60000", "label": "mine"}
        body |= {name: value for name, value in order.items() if name in (call.body or {}).get("properties", {})}
        query = {name: ids[name] for name in in_query}
        answer = await exchange.client.request(
            call.method, call.url(**ids), params=query, json=body if call.body else None, headers=bob
        )
        assert answer.status_code in (403, 404), (call.name, answer.text)
        tried += 1
    assert tried >= 12
    # Nothing has happened to any of it.
    assert (await me(exchange, alice["accessToken"])).status_code == 200
    row = await pool.fetchrow("SELECT status, price FROM orders.orders")
    assert row is not None
    assert tuple(row) == ("PLACED", 60000)
    assert await pool.fetchval("SELECT count(*) FROM auth.api_keys WHERE revoked_at IS NULL") == 1


async def test_members_that_a_request_does_not_have_are_refused_and_change_nothing(
    exchange: Exchange, pool: Pool
) -> None:
    more = {
        "roles": ["admin"],
        "status": "ACTIVE",
        "userId": "1",
        "user_id": 1,
        "isAdmin": True,
        "createdAt": "2000-01-01T00:00:00Z",
        "expiresAt": "2100-01-01T00:00:00Z",
        "permissionsOverride": ["ADMIN"],
    }
    headers = bearer((await exchange.login())["accessToken"])
    bodies: dict[str, dict[str, Any]] = {
        "/api/users": {"email": "mallory@example.com", "password": PASSWORD},
        "/api/auth/login": {"email": "alice@example.com", "password": PASSWORD},
        "/api/auth/api-keys": {"label": "bot", "algorithm": "HMAC_SHA256", "permissions": ["READ"]},
        "/api/positions/BTC-USDT-PERP/margin-mode": {"marginMode": "CROSS"},
    }
    counts = """SELECT (SELECT count(*) FROM users.users), (SELECT count(*) FROM auth.auth_sessions),
                       (SELECT count(*) FROM auth.api_keys), (SELECT count(*) FROM risk.exposures)"""
    before = await pool.fetchrow(counts)
    for url, body in bodies.items():
        for name, value in more.items():
            method = "PUT" if url.endswith("margin-mode") else "POST"
            answer = await exchange.client.request(method, url, json={**body, name: value}, headers=headers)
            assert answer.status_code == 422, (url, name)
            assert name in [error["field"] for error in answer.json()["errors"]], (url, name)
    assert await pool.fetchrow(counts) == before


async def test_sql_in_any_string_is_only_a_string(
    exchange: Exchange, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api.routes.users.REGISTRATION_SECONDS_MAX", 0.1)
    monkeypatch.setattr("api.limits.login_throttle.ACCOUNT_FREE", 10**6)
    monkeypatch.setattr("api.limits.login_throttle.ADDRESS_FREE", 10**6)
    admin_id = await exchange.add_user("root@example.com")
    count = "SELECT (SELECT count(*) FROM users.users), (SELECT count(*) FROM auth.auth_credentials)"
    before = await pool.fetchrow(count)
    for call in calls(exchange.app.openapi()):
        for text in INJECTIONS:
            headers = await sign_in(exchange, admin_id, "admin") if call.roles != {"internal"} else service()
            async with asyncio.timeout(20):
                answer = await exchange.client.request(call.method, **_filled_with(call, text), headers=headers)
            assert answer.status_code < 500 or answer.json()["code"] == "OVERLOADED", (call.name, text, answer.text)
            assert "syntax" not in answer.text
    assert await pool.fetchrow(count) == before


def service() -> dict[str, str]:
    return {"X-Internal-Token": INTERNAL_TOKEN}


def _filled_with(call: Call, text: str) -> dict[str, Any]:
    query = {each["name"]: text for each in call.parameters if each["in"] == "query"}
    filled: dict[str, Any] = {"url": call.url(**dict.fromkeys(call.in_path, text.replace("/", ""))), "params": query}
    if call.body is not None:
        filled["json"] = dict.fromkeys(call.body.get("properties", {}), text)
    return filled


async def test_monstrous_bodies_are_refused_on_every_route(exchange: Exchange) -> None:
    admin_id = await exchange.add_user("root@example.com")
    monsters = {
        b'{"email": "' + b"a" * BODY_BYTES_MAX + b'"}': 413,
        b"[" * 200_000 + b"]" * 200_000: 422,
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000: 422,
        b'{"quantity": ' + b"9" * 100_000 + b"}": 422,
        b'{"quantity": 1e999999999, "price": "1e999999999", "amount": "NaN", "leverage": 1e400}': 422,
        b'{"orders": [' + b"{}," * 300_000 + b"{}]}": 422,
    }
    for call in calls(exchange.app.openapi()):
        if call.body is None:
            continue
        for body, status in monsters.items():
            headers = await sign_in(exchange, admin_id, "admin") if call.roles != {"internal"} else service()
            async with asyncio.timeout(10):
                answer = await exchange.client.request(
                    call.method, call.url(), content=body, headers={**headers, **JSON}
                )
            # 404: a body whose members mean nothing here, for what does not exist.
            assert answer.status_code in (status, 404), (call.name, body[:30], answer.text[:200])
            assert len(answer.content) < 10_000


async def test_line_breaks_in_what_a_client_sends_never_reach_the_headers(exchange: Exchange) -> None:
    evil = "x\r\nSet-Cookie: admin=1\r\n\r\n<script>"
    answer = await exchange.client.get("/health/live", headers={"X-Request-Id": evil})
    assert "set-cookie" not in answer.headers
    assert len(answer.headers["x-request-id"]) == 32
    body = {"email": "alice@example.com", "password": "wrong"}
    await exchange.client.post("/api/auth/login", json=body, headers={"User-Agent": evil, "X-Forwarded-For": evil})
    for url in ("/api/%0d%0aSet-Cookie:%20a=b", "/api/market/depth/%0d%0aX:%20y", "/health/live?x=%0d%0aSet-Cookie:a"):
        answer = await exchange.client.get(url, headers={"Origin": evil})
        assert "set-cookie" not in answer.headers
        assert all("\n" not in value and "\r" not in value for value in answer.headers.values())


async def test_a_logged_line_is_one_line(exchange: Exchange, caplog: pytest.LogCaptureFixture) -> None:
    from logs import JsonLines

    await exchange.client.get("/api/x%0a2026-01-01%20INFO%20forged", headers={"X-Request-Id": "x\nforged"})
    assert caplog.records
    assert all("\n" not in JsonLines().format(record) for record in caplog.records)


@pytest.mark.parametrize("path", ["/api/auth/credentials", "/api/matching/cancel"])
async def test_internal_routes_are_closed_to_the_outside(exchange: Exchange, path: str) -> None:
    body = {"userId": str(ALICE), "type": "PASSWORD", "secretHash": "$argon2id$v=19$m=8,t=1,p=1$c2FsdHNhbHQ$aGFzaA"}
    attempts: list[dict[str, str]] = [
        {},
        {"X-Internal-Token": ""},
        {"X-Internal-Token": "None"},
        {"X-Internal-Token": INTERNAL_TOKEN[:-1]},
        {"X-Internal-Token": INTERNAL_TOKEN + " x"},
        {"X-Internal-Token": INTERNAL_TOKEN.upper()},
        {"Authorization": "Bearer "},
        {"Authorization": f"Basic {INTERNAL_TOKEN}"},
        {"X-Forwarded-For": "127.0.0.1", "X-Real-IP": "127.0.0.1"},
        {"Cookie": f"X-Internal-Token={INTERNAL_TOKEN}"},
    ]
    for headers in attempts:
        assert (await exchange.client.post(path, json=body, headers=headers)).status_code == 401, headers
        query = {"X-Internal-Token": INTERNAL_TOKEN}
        answer = await exchange.client.post(path, json=body, headers=headers, params=query)
        assert (answer.status_code, answer.json()["errors"][0]["field"]) == (422, "X-Internal-Token"), headers
    for url in (path + "/", "/" + path, path.upper(), path.replace("/auth", "//auth"), path + "%2f", path + ";x"):
        assert (await exchange.client.post(url, json=body)).status_code in (401, 404, 405)
    assert (await exchange.client.post(path, json=body, headers=await sign_in(exchange, ALICE))).status_code == 403


async def test_guessing_from_many_addresses_gets_few_guesses_and_all_are_on_record(
    exchange: Exchange, pool: Pool, caplog: pytest.LogCaptureFixture
) -> None:
    async def guess(number: int) -> int:
        transport = httpx.ASGITransport(exchange.app, client=(f"198.51.{number // 250}.{number % 250}", 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://exchange") as attacker:
            body = {"email": "alice@example.com", "password": f"guess number {number}"}
            return (await attacker.post("/api/auth/login", json=body)).status_code

    statuses = [status for start in range(0, 300, 30) for status in await _all(guess, start)]
    assert statuses.count(401) < 20
    assert statuses.count(401) + statuses.count(429) == 300
    audited = await pool.fetch(
        "SELECT reason, count(*) AS times, count(DISTINCT ip) AS places FROM auth.login_audits GROUP BY 1"
    )
    assert {row["reason"]: row["times"] for row in audited} == {
        "INVALID_CREDENTIALS": statuses.count(401),
        "RATE_LIMITED": statuses.count(429),
    }
    assert sum(row["places"] for row in audited) == 300
    assert "refused for user 1000" in caplog.text
    # Another account is not held up by any of it.
    await exchange.add_user("bob@example.com")
    await exchange.login("bob@example.com")


async def _all(guess: Callable[[int], Awaitable[int]], start: int) -> list[int]:
    return await asyncio.gather(*(guess(number) for number in range(start, start + 30)))

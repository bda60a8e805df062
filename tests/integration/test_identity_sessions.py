"""Signing in, refreshing, signing out, and sessions that end at once everywhere."""

import asyncio
import json
import statistics
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import pytest
import pytest_asyncio
from argon2 import PasswordHasher
from redis.asyncio import Redis

from activities.identity.sessions import REVOKED_CHANNEL, revoke, session_key
from domain.identity import REFRESH_REPEATED
from storage.db import Pool
from tests.integration.identity_app import (
    PASSWORD,
    Exchange,
    bearer,
    running_exchange,
    settings_without_workflows,
    write_key,
)

WEEK_SECONDS = 7 * 24 * 3600


@pytest_asyncio.fixture
async def exchange(database_url: str, redis_url: str, temporal_address: str, tmp_path: Path) -> AsyncIterator[Exchange]:
    settings = settings_without_workflows(database_url, redis_url, temporal_address, tmp_path)
    async with running_exchange(settings) as exchange:
        await exchange.add_user()
        yield exchange


async def me(exchange: Exchange, tokens: dict[str, Any]) -> httpx.Response:
    return await exchange.client.get("/api/users/me", headers=bearer(tokens["accessToken"]))


async def refresh(exchange: Exchange, refresh_token: str) -> httpx.Response:
    return await exchange.client.post("/api/auth/token/refresh", json={"refreshToken": refresh_token})


async def last_audit(pool: Pool) -> asyncpg.Record:
    row = await pool.fetchrow("SELECT * FROM auth.login_audits ORDER BY audit_id DESC LIMIT 1")
    assert row is not None
    return row


async def revocations(pool: Pool) -> list[dict[str, str]]:
    rows = await pool.fetch("SELECT payload FROM outbox.messages WHERE name = 'AuthSessionRevoked' ORDER BY message_id")
    return [json.loads(line) for row in rows for line in row["payload"].splitlines()]


async def test_signing_in_gives_tokens_that_open_ones_account(exchange: Exchange) -> None:
    tokens = await exchange.login(" ALICE@example.com")
    of_refresh = {"accessToken", "refreshToken", "tokenType", "expiresIn", "refreshExpiresIn", "sessionId"}
    assert set(tokens) == {*of_refresh, "deviceToken"}
    assert set((await refresh(exchange, tokens["refreshToken"])).json()) == of_refresh
    assert tokens["tokenType"] == "Bearer"
    assert [tokens["expiresIn"], tokens["refreshExpiresIn"]] == [900, WEEK_SECONDS]
    account = await me(exchange, tokens)
    assert account.status_code == 200
    assert (account.json()["email"], account.json()["status"]) == ("alice@example.com", "ACTIVE")


async def test_a_session_is_a_row_and_a_key_and_its_refresh_token_is_stored_hashed(
    exchange: Exchange, pool: Pool, redis: Redis
) -> None:
    headers = {"User-Agent": "Trader/1.0", "X-Device-Fingerprint": "device-7"}
    body = {"email": "alice@example.com", "password": PASSWORD}
    tokens = (await exchange.client.post("/api/auth/login", json=body, headers=headers)).json()
    key = session_key(tokens["sessionId"])
    user_id = (await me(exchange, tokens)).json()["userId"]
    stored = await redis.get(key)
    assert stored is not None
    assert json.loads(stored) == {
        "userId": user_id,
        "roles": ["user"],
        "ip": "127.0.0.1",
        "deviceFingerprint": "device-7",
    }
    assert WEEK_SECONDS - 60 < await redis.ttl(key) <= WEEK_SECONDS
    row = await pool.fetchrow("SELECT * FROM auth.auth_sessions")
    assert row is not None
    assert str(row["session_id"]) == tokens["sessionId"]
    assert len(row["refresh_token_hash"]) == 64
    assert tokens["refreshToken"] not in str(dict(row))


async def test_the_tokens_are_never_cached(exchange: Exchange) -> None:
    body = {"email": "alice@example.com", "password": PASSWORD}
    assert (await exchange.client.post("/api/auth/login", json=body)).headers["cache-control"] == "no-store"


async def test_an_unknown_user_and_a_wrong_password_get_the_same_answer(exchange: Exchange) -> None:
    answers = [
        await exchange.client.post("/api/auth/login", json={"email": email, "password": "wrong password"})
        for email in ("alice@example.com", "nobody@example.com", "not an address")
    ]
    assert {answer.status_code for answer in answers} == {401}
    assert len({answer.text for answer in answers}) == 1
    assert answers[0].json()["code"] == "INVALID_CREDENTIALS"


async def test_an_unknown_user_takes_as_long_as_a_wrong_password(exchange: Exchange) -> None:
    async def seconds(email: str) -> float:
        started = time.perf_counter()
        await exchange.client.post("/api/auth/login", json={"email": email, "password": "wrong password"})
        return time.perf_counter() - started

    # In turns, since the machine is quicker at one time than at another.
    pairs = [(await seconds("nobody@example.com"), await seconds("alice@example.com")) for _ in range(7)]
    assert 0.5 < statistics.median(unknown / known for unknown, known in pairs) < 2


async def test_every_attempt_is_audited(exchange: Exchange, pool: Pool) -> None:
    headers = {"User-Agent": "Trader/1.0"}
    attempts = [("alice@example.com", PASSWORD), ("alice@example.com", "wrong"), ("nobody@example.com", PASSWORD)]
    audits = []
    for email, password in attempts:
        await exchange.client.post("/api/auth/login", json={"email": email, "password": password}, headers=headers)
        audits.append(await last_audit(pool))
    assert [(row["email"], row["outcome"], row["reason"]) for row in audits] == [
        ("alice@example.com", "SUCCESS", None),
        ("alice@example.com", "FAILED", "INVALID_CREDENTIALS"),
        ("nobody@example.com", "FAILED", "INVALID_CREDENTIALS"),
    ]
    assert [row["user_id"] is None for row in audits] == [False, False, True]
    assert {(str(row["ip"]), row["device"]) for row in audits} == {("127.0.0.1", "Trader/1.0")}


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ("status = 'LOCKED'", "CREDENTIAL_LOCKED"),
        ("status = 'EXPIRED'", "CREDENTIAL_EXPIRED"),
        ("expires_at = now() - interval '1 s'", "CREDENTIAL_EXPIRED"),
    ],
)
async def test_a_locked_or_expired_credential_opens_and_prolongs_no_session(
    exchange: Exchange, pool: Pool, change: str, code: str
) -> None:
    before = await exchange.login()
    await pool.execute(f"UPDATE auth.auth_credentials SET {change}")
    body = {"email": "alice@example.com", "password": PASSWORD}
    answer = await exchange.client.post("/api/auth/login", json=body)
    assert (answer.status_code, answer.json()["code"]) == (403, code)
    assert (await last_audit(pool))["reason"] == code
    refreshed = await refresh(exchange, before["refreshToken"])
    assert (refreshed.status_code, refreshed.json()["code"]) == (403, code)
    # Only the right password learns that the credential is locked.
    wrong = await exchange.client.post("/api/auth/login", json={**body, "password": "wrong password"})
    assert wrong.json()["code"] == "INVALID_CREDENTIALS"


async def test_a_hash_with_old_parameters_is_replaced_at_the_next_login(exchange: Exchange, pool: Pool) -> None:
    old = PasswordHasher(memory_cost=8192, time_cost=1, parallelism=1).hash(PASSWORD)
    await pool.execute("UPDATE auth.auth_credentials SET secret_hash = $1", old)
    await exchange.login()
    renewed = await pool.fetchval("SELECT secret_hash FROM auth.auth_credentials")
    assert renewed.startswith("$argon2id$v=19$m=47104,t=1,p=1$")
    await exchange.login()


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"email": "alice@example.com"},
        {"email": "alice@example.com", "password": ""},
        {"email": "alice@example.com", "password": "x" * 129},
        {"email": "alice@example.com", "password": "secret\x00secret"},
        {"email": ["alice@example.com"], "password": PASSWORD},
        [],
        "text",
        None,
    ],
)
async def test_a_malformed_login_is_refused_without_echo(exchange: Exchange, body: object) -> None:
    answer = await exchange.client.post("/api/auth/login", json=body)
    assert (answer.status_code, answer.json()["code"]) == (422, "VALIDATION_FAILED")
    assert PASSWORD not in answer.text
    assert "x" * 129 not in answer.text


async def test_refreshing_rotates_the_refresh_token_and_prolongs_the_session(
    exchange: Exchange, pool: Pool, redis: Redis
) -> None:
    first = await exchange.login()
    key = session_key(first["sessionId"])
    await pool.execute("UPDATE auth.auth_sessions SET expires_at = now() + interval '1 h'")
    await redis.expire(key, 3600)
    second = (await refresh(exchange, first["refreshToken"])).json()
    assert second["sessionId"] == first["sessionId"]
    assert second["refreshToken"] != first["refreshToken"]
    assert (await me(exchange, second)).status_code == 200
    assert await redis.ttl(key) > WEEK_SECONDS - 60
    third = await refresh(exchange, second["refreshToken"])
    assert third.status_code == 200


async def test_a_refresh_repeated_within_seconds_gets_the_same_answer(exchange: Exchange, pool: Pool) -> None:
    first = await exchange.login()
    second = await refresh(exchange, first["refreshToken"])
    for _ in range(2):
        again = await refresh(exchange, first["refreshToken"])
        assert (again.status_code, again.json()) == (200, second.json())
    assert (await refresh(exchange, second.json()["refreshToken"])).status_code == 200
    assert await revocations(pool) == []


async def test_simultaneous_refreshes_get_one_answer(exchange: Exchange) -> None:
    tokens = await exchange.login()
    answers = await asyncio.gather(*(refresh(exchange, tokens["refreshToken"]) for _ in range(5)))
    assert [answer.status_code for answer in answers] == [200] * 5
    assert len({answer.text for answer in answers}) == 1


async def test_a_repeated_refresh_gets_the_same_answer_from_another_process_whose_first_key_is_another(
    exchange: Exchange, tmp_path: Path
) -> None:
    old = exchange.state.settings.jwt_private_key_file
    assert old is not None
    both = tmp_path / "both.pem"
    both.write_bytes(write_key(tmp_path / "new.pem").read_bytes() + old.read_bytes())
    first = await exchange.login()
    second = (await refresh(exchange, first["refreshToken"])).json()
    async with running_exchange(exchange.state.settings.model_copy(update={"jwt_private_key_file": both})) as other:
        again = (await refresh(other, first["refreshToken"])).json()
        assert again["refreshToken"] == second["refreshToken"]
        assert (await refresh(other, again["refreshToken"])).status_code == 200


async def has_ended(exchange: Exchange, pool: Pool, redis: Redis, tokens: dict[str, Any]) -> bool:
    ended = (await me(exchange, tokens)).status_code == 401
    assert await redis.exists(session_key(tokens["sessionId"])) == (not ended)
    assert len(await revocations(pool)) == ended
    return ended


async def test_a_refresh_token_used_again_later_revokes_the_session(
    exchange: Exchange, pool: Pool, redis: Redis
) -> None:
    first = await exchange.login()
    second = (await refresh(exchange, first["refreshToken"])).json()
    await pool.execute("UPDATE auth.auth_sessions SET rotated_at = rotated_at - $1::interval", REFRESH_REPEATED)
    reused = await refresh(exchange, first["refreshToken"])
    assert (reused.status_code, reused.json()["code"]) == (401, "UNAUTHENTICATED")
    assert await has_ended(exchange, pool, redis, second)
    assert (await refresh(exchange, second["refreshToken"])).status_code == 401
    [event] = await revocations(pool)
    assert event["reason"] == "REFRESH_TOKEN_REUSED"


async def test_a_refresh_token_used_again_after_the_next_one_was_revokes_the_session(
    exchange: Exchange, pool: Pool, redis: Redis
) -> None:
    first = await exchange.login()
    second = (await refresh(exchange, first["refreshToken"])).json()
    third = (await refresh(exchange, second["refreshToken"])).json()
    assert not await has_ended(exchange, pool, redis, third)
    assert (await refresh(exchange, first["refreshToken"])).status_code == 401
    assert await has_ended(exchange, pool, redis, third)


async def test_a_forged_refresh_token_changes_nothing(exchange: Exchange, pool: Pool, redis: Redis) -> None:
    tokens, others = await exchange.login(), await exchange.login()
    session_id, number, signature = tokens["refreshToken"].split(".")
    forged = [
        f"{session_id}.anything",
        f"{session_id}.",
        session_id,
        f"{session_id}.{number}",
        f"{session_id}.{number}.",
        f"{session_id}.{number}.{signature[:-4]}AAAA",
        f"{session_id}.{number}x.{signature}",
        f"{session_id}.{others['refreshToken'].partition('.')[2]}",
        f"{session_id}.{number}.{'A' * 86}",
        tokens["refreshToken"].upper(),
    ]
    row = await pool.fetchrow("SELECT * FROM auth.auth_sessions WHERE session_id = $1", session_id)
    for token in forged:
        answer = await refresh(exchange, token)
        assert (answer.status_code, answer.json()["code"]) == (401, "UNAUTHENTICATED"), token
    assert await pool.fetchrow("SELECT * FROM auth.auth_sessions WHERE session_id = $1", session_id) == row
    assert not await has_ended(exchange, pool, redis, tokens)
    assert (await refresh(exchange, tokens["refreshToken"])).status_code == 200


async def test_a_session_lives_thirty_days_however_often_it_is_refreshed(
    exchange: Exchange, pool: Pool, redis: Redis
) -> None:
    tokens = await exchange.login()
    await pool.execute("UPDATE auth.auth_sessions SET created_at = now() - interval '29 days 1 hour'")
    second = (await refresh(exchange, tokens["refreshToken"])).json()
    assert 22 * 3600 < second["refreshExpiresIn"] <= 23 * 3600
    assert 22 * 3600 < await redis.ttl(session_key(tokens["sessionId"])) <= 23 * 3600
    await pool.execute("UPDATE auth.auth_sessions SET created_at = now() - interval '30 days', expires_at = now()")
    assert (await refresh(exchange, second["refreshToken"])).status_code == 401


async def test_of_too_many_sessions_the_oldest_ends(
    exchange: Exchange, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("activities.identity.sessions.SESSIONS_MAX", 3)
    await exchange.add_user("bob@example.com")
    bobs, *alices = [await exchange.login("bob@example.com"), *[await exchange.login() for _ in range(4)]]
    assert [(await me(exchange, tokens)).status_code for tokens in (bobs, *alices)] == [200, 401, 200, 200, 200]
    [event] = await revocations(pool)
    assert (event["sessionId"], event["reason"]) == (alices[0]["sessionId"], "TOO_MANY_SESSIONS")


async def test_an_expired_session_is_not_prolonged(exchange: Exchange, pool: Pool) -> None:
    tokens = await exchange.login()
    await pool.execute("UPDATE auth.auth_sessions SET expires_at = now() - interval '1 s'")
    assert (await refresh(exchange, tokens["refreshToken"])).status_code == 401


@pytest.mark.parametrize("token", ["x", "no-uuid.secret", "6f1f1f5e-0000-4000-8000-000000000001.secret", "é" * 100])
async def test_a_refresh_token_that_was_never_issued_is_refused(exchange: Exchange, token: str) -> None:
    answer = await refresh(exchange, token)
    assert (answer.status_code, answer.json()["code"]) == (401, "UNAUTHENTICATED")


async def test_a_refresh_token_is_no_access_token(exchange: Exchange) -> None:
    tokens = await exchange.login()
    answer = await exchange.client.get("/api/users/me", headers=bearer(tokens["refreshToken"]))
    assert (answer.status_code, answer.json()["code"]) == (401, "UNAUTHENTICATED")


async def test_signing_out_ends_the_session_at_once(exchange: Exchange, pool: Pool, redis: Redis) -> None:
    tokens, other = await exchange.login(), await exchange.login()
    user_id = (await me(exchange, tokens)).json()["userId"]
    answer = await exchange.client.post("/api/auth/logout", headers=bearer(tokens["accessToken"]))
    assert (answer.status_code, answer.content) == (204, b"")
    assert await redis.exists(session_key(tokens["sessionId"])) == 0
    assert (await me(exchange, tokens)).status_code == 401
    assert (await refresh(exchange, tokens["refreshToken"])).status_code == 401
    assert (await me(exchange, other)).status_code == 200
    assert await revocations(pool) == [{"sessionId": tokens["sessionId"], "userId": user_id, "reason": "LOGOUT"}]


async def test_a_revocation_is_published_for_open_sockets(exchange: Exchange, redis: Redis) -> None:
    tokens = await exchange.login()
    async with redis.pubsub(ignore_subscribe_messages=True) as listener:
        await listener.subscribe(REVOKED_CHANNEL)
        await listener.get_message(timeout=1)
        await exchange.client.post("/api/auth/logout", headers=bearer(tokens["accessToken"]))
        message = None
        for _ in range(50):
            message = message or await listener.get_message(timeout=0.1)
    assert message is not None
    assert message["data"].decode() == tokens["sessionId"]


async def test_one_sees_and_ends_ones_own_sessions_only(exchange: Exchange) -> None:
    await exchange.add_user("bob@example.com")
    first, second, bobs = await exchange.login(), await exchange.login(), await exchange.login("bob@example.com")
    listed = await exchange.client.get("/api/auth/sessions", headers=bearer(second["accessToken"]))
    items = listed.json()["items"]
    assert [(item["sessionId"], item["current"]) for item in items] == [
        (second["sessionId"], True),
        (first["sessionId"], False),
    ]
    assert set(items[0]) == {"sessionId", "ip", "deviceFingerprint", "createdAt", "expiresAt", "current"}

    async def delete(session_id: str) -> int:
        url = f"/api/auth/sessions/{session_id}"
        return (await exchange.client.delete(url, headers=bearer(second["accessToken"]))).status_code

    assert await delete(bobs["sessionId"]) == 404
    assert (await me(exchange, bobs)).status_code == 200
    assert await delete(first["sessionId"]) == 204
    assert await delete(first["sessionId"]) == 404
    assert await delete("no-uuid") == 422
    assert (await me(exchange, first)).status_code == 401
    assert (await me(exchange, second)).status_code == 200


async def test_a_flushed_redis_is_refilled_from_the_rows(exchange: Exchange, redis: Redis) -> None:
    tokens, ended = await exchange.login(), await exchange.login()
    await exchange.client.post("/api/auth/logout", headers=bearer(ended["accessToken"]))
    await redis.flushall()
    assert (await me(exchange, tokens)).status_code == 200
    assert await redis.exists(session_key(tokens["sessionId"])) == 1
    assert (await me(exchange, ended)).status_code == 401
    assert await redis.exists(session_key(ended["sessionId"])) == 0


async def test_restoring_never_revives_a_session_that_is_being_revoked(
    exchange: Exchange, pool: Pool, redis: Redis
) -> None:
    tokens = await exchange.login()
    user_id = await pool.fetchval("SELECT user_id FROM auth.auth_sessions")
    async with pool.acquire() as conn:
        async with conn.transaction():
            now = datetime.now(UTC)
            await revoke(conn, redis, user_id, session_id=tokens["sessionId"], reason="TEST", now=now)
            # The key is gone, the row not yet committed: the request has to wait for the row.
            request = asyncio.create_task(me(exchange, tokens))
            await asyncio.sleep(0.3)
            assert not request.done()
        assert (await request).status_code == 401
    assert await redis.exists(session_key(tokens["sessionId"])) == 0


async def test_a_revocation_that_fails_leaves_the_session_good(exchange: Exchange, pool: Pool, redis: Redis) -> None:
    tokens = await exchange.login()
    user_id = await pool.fetchval("SELECT user_id FROM auth.auth_sessions")
    async with pool.acquire() as conn:
        transaction = conn.transaction()
        await transaction.start()
        await revoke(conn, redis, user_id, session_id=None, reason="TEST", now=datetime.now(UTC))
        await transaction.rollback()
    assert (await me(exchange, tokens)).status_code == 200
    assert await revocations(pool) == []


async def test_an_expired_access_token_is_refused(exchange: Exchange) -> None:
    tokens = await exchange.login()
    identity = exchange.state.tokens.verify(tokens["accessToken"], datetime.now(UTC))
    old = exchange.state.tokens.issue(identity, datetime.now(UTC) - timedelta(minutes=16))
    answer = await exchange.client.get("/api/users/me", headers=bearer(old))
    assert (answer.status_code, answer.json()["code"]) == (401, "UNAUTHENTICATED")


async def test_a_valid_token_of_no_session_is_refused(exchange: Exchange) -> None:
    tokens = await exchange.login()
    identity = exchange.state.tokens.verify(tokens["accessToken"], datetime.now(UTC))
    forged = replace(identity, session_id="6f1f1f5e-0000-4000-8000-000000000001")
    token = exchange.state.tokens.issue(forged, datetime.now(UTC))
    assert (await exchange.client.get("/api/users/me", headers=bearer(token))).status_code == 401


async def test_requests_of_one_turn_share_one_look_into_redis(exchange: Exchange, redis: Redis) -> None:
    looks = []
    # The order desk looks for prices ten times a second, at times in between.
    for _ in range(5):
        all_tokens = [await exchange.login() for _ in range(3)]
        now = datetime.now(UTC)
        before = (await redis.info("commandstats")).get("cmdstat_mget", {}).get("calls", 0)
        sessions = [tokens["sessionId"] for tokens in all_tokens]
        await asyncio.gather(*(exchange.state.sessions.require(each, now) for each in sessions * 100))
        looks.append((await redis.info("commandstats"))["cmdstat_mget"]["calls"] - before)
    assert min(looks) == 1

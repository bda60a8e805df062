"""Guessing passwords: ever slower, then locked; and the operator's locks. Changing passwords."""

import asyncio
from collections.abc import AsyncIterator
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from redis.asyncio import Redis

from api.limits import login_throttle as throttle
from domain.problems import Problem
from storage.db import Pool
from tests.integration.identity_app import (
    PASSWORD,
    Exchange,
    bearer,
    running_exchange,
    settings_without_workflows,
)

ALICE = "alice@example.com"
NEW_PASSWORD = "quite another battery"


@pytest_asyncio.fixture
async def exchange(database_url: str, redis_url: str, temporal_address: str, tmp_path: Path) -> AsyncIterator[Exchange]:
    settings = settings_without_workflows(database_url, redis_url, temporal_address, tmp_path)
    async with running_exchange(settings) as exchange:
        await exchange.add_user()
        yield exchange


async def attempt(exchange: Exchange, password: str = "wrong password", email: str = ALICE) -> httpx.Response:
    return await exchange.client.post("/api/auth/login", json={"email": email, "password": password})


async def reasons(pool: Pool) -> list[str | None]:
    return [row["reason"] for row in await pool.fetch("SELECT reason FROM auth.login_audits ORDER BY audit_id")]


async def admin(exchange: Exchange, pool: Pool) -> dict[str, str]:
    await exchange.add_user("root@example.com")
    await pool.execute("UPDATE auth.auth_credentials SET roles = '{user,admin}' WHERE email = 'root@example.com'")
    return bearer((await exchange.login("root@example.com"))["accessToken"])


async def alice_id(pool: Pool) -> int:
    user_id: int = await pool.fetchval("SELECT user_id FROM users.users WHERE email = $1", ALICE)
    return user_id


@pytest.mark.parametrize("email", [ALICE, "nobody@example.com"])
async def test_after_its_free_failures_an_account_waits_ever_longer_known_or_not(
    exchange: Exchange, pool: Pool, email: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(throttle, "ACCOUNT_FREE", 2)
    assert [(await attempt(exchange, email=email)).status_code for _ in range(3)] == [401, 401, 401]
    refused = await attempt(exchange, PASSWORD, email)
    assert (refused.status_code, refused.json()["code"]) == (429, "RATE_LIMITED")
    assert refused.headers["retry-after"] == "1"
    await asyncio.sleep(1.05)
    assert (await attempt(exchange, email=email)).status_code == 401
    assert (await attempt(exchange, email=email)).headers["retry-after"] == "2"
    assert (await reasons(pool))[-1] == "RATE_LIMITED"


async def test_guesses_sent_at_once_get_no_more_checks_than_guesses_in_turn(
    exchange: Exchange, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(throttle, "ACCOUNT_FREE", 2)
    answers = await asyncio.gather(*(attempt(exchange, f"guess number {n}") for n in range(20)))
    assert sorted(answer.status_code for answer in answers) == [401] * 3 + [429] * 17


async def test_a_right_password_clears_the_account_and_keeps_the_addresss_failures(
    exchange: Exchange, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(throttle, "ACCOUNT_FREE", 2)
    for _ in range(4):
        await attempt(exchange)
        await exchange.login()
    assert [key async for key in redis.scan_iter("auth:failures:account:*")] == []
    assert await redis.hget("auth:failures:address:127.0.0.1", "n") == b"4"


async def test_an_address_that_tries_many_accounts_waits_and_others_do_not(
    exchange: Exchange, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(throttle, "ADDRESS_FREE", 3)
    statuses = [(await attempt(exchange, email=f"user{n}@example.com")).status_code for n in range(6)]
    assert statuses == [401, 401, 401, 401, 429, 429]
    transport = httpx.ASGITransport(exchange.app, client=("192.0.2.7", 1))
    async with httpx.AsyncClient(transport=transport, base_url="http://exchange") as elsewhere:
        answer = await elsewhere.post("/api/auth/login", json={"email": ALICE, "password": PASSWORD})
        assert answer.status_code == 200


async def test_a_whole_ipv6_network_is_one_address(exchange: Exchange, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throttle, "ADDRESS_FREE", 1)
    for host in ("2001:db8::1", "2001:db8::2"):
        await exchange.state.throttle.admit(f"{host}@example.com", ip_address(host))
    with pytest.raises(Problem, match="wait 1 s"):
        await exchange.state.throttle.admit("c@example.com", ip_address("2001:db8::ffff"))
    await exchange.state.throttle.admit("d@example.com", ip_address("2001:db8:0:1::1"))


@pytest.mark.parametrize("email", [ALICE, "nobody@example.com"])
async def test_after_too_many_failures_in_a_row_even_the_right_password_is_locked_out_for_a_while(
    exchange: Exchange, pool: Pool, redis: Redis, email: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(throttle, "LOCK_AFTER", 3)
    before = await exchange.login()
    assert [(await attempt(exchange, email=email)).status_code for _ in range(3)] == [401, 401, 401]
    for password in (PASSWORD, "wrong password"):
        locked = await attempt(exchange, password, email)
        assert (locked.status_code, locked.json()["code"]) == (403, "CREDENTIAL_LOCKED")
        assert throttle.LOCK_SECONDS - 60 < int(locked.headers["retry-after"]) <= throttle.LOCK_SECONDS
    # Whoever is signed in stays so: nobody ends another's session by guessing badly.
    body = {"refreshToken": before["refreshToken"]}
    assert (await exchange.client.post("/api/auth/token/refresh", json=body)).status_code == 200
    if email == ALICE:
        await redis.flushall()
        assert (await attempt(exchange, PASSWORD)).json()["code"] == "CREDENTIAL_LOCKED"
        await pool.execute("UPDATE auth.auth_credentials SET locked_until = now() - interval '1 s'")
        await exchange.login()


async def test_a_busy_hasher_costs_no_attempt(
    exchange: Exchange, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api.identity.passwords.WAITING_MAX", 0)
    assert (await attempt(exchange)).status_code == 503
    assert [key async for key in redis.scan_iter("auth:failures:*")] == []


async def test_an_operator_locks_and_unlocks(exchange: Exchange, pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    operator, user_id = await admin(exchange, pool), await alice_id(pool)
    tokens = await exchange.login()

    async def post(word: str, headers: dict[str, str] = operator, who: object = user_id) -> httpx.Response:
        return await exchange.client.post(f"/api/admin/users/{who}/{word}", headers=headers)

    assert (await post("lock", bearer(tokens["accessToken"]))).status_code == 403
    assert (await post("lock", {})).status_code == 401
    assert (await post("lock", who=1)).status_code == 404
    locked = await post("lock")
    assert locked.json() == {"userId": str(user_id), "status": "LOCKED", "expiresAt": None}
    assert (await exchange.client.get("/api/users/me", headers=bearer(tokens["accessToken"]))).status_code == 401
    assert (await attempt(exchange, PASSWORD)).json()["code"] == "CREDENTIAL_LOCKED"
    assert (await post("unlock")).status_code == 200
    await exchange.login()
    monkeypatch.setattr(throttle, "LOCK_AFTER", 1)
    await attempt(exchange)
    assert (await attempt(exchange, PASSWORD)).json()["code"] == "CREDENTIAL_LOCKED"
    await post("unlock")
    await exchange.login()


async def test_an_expired_password_opens_nothing_until_it_is_renewed(exchange: Exchange, pool: Pool) -> None:
    operator, user_id = await admin(exchange, pool), await alice_id(pool)
    await exchange.client.post(f"/api/admin/users/{user_id}/expire", headers=operator)
    expired = await attempt(exchange, PASSWORD)
    assert (expired.status_code, expired.json()["code"]) == (403, "CREDENTIAL_EXPIRED")
    body = {"email": ALICE, "currentPassword": PASSWORD, "newPassword": NEW_PASSWORD}
    wrong = await exchange.client.post("/api/auth/password/renew", json={**body, "currentPassword": "wrong"})
    assert (wrong.status_code, wrong.json()["code"]) == (401, "INVALID_CREDENTIALS")
    assert (await exchange.client.post("/api/auth/password/renew", json=body)).status_code == 204
    await exchange.login(password=NEW_PASSWORD)
    assert (await attempt(exchange, PASSWORD)).status_code == 401


async def change(exchange: Exchange, tokens: dict[str, Any], current: str, new: str) -> httpx.Response:
    body = {"currentPassword": current, "newPassword": new}
    return await exchange.client.post("/api/auth/password", json=body, headers=bearer(tokens["accessToken"]))


async def test_changing_the_password_ends_all_other_sessions(exchange: Exchange, pool: Pool) -> None:
    mine, other = await exchange.login(), await exchange.login()
    assert (await change(exchange, mine, PASSWORD, NEW_PASSWORD)).status_code == 204
    assert (await exchange.client.get("/api/users/me", headers=bearer(mine["accessToken"]))).status_code == 200
    assert (await exchange.client.get("/api/users/me", headers=bearer(other["accessToken"]))).status_code == 401
    reason = await pool.fetchval(
        "SELECT revoke_reason FROM auth.auth_sessions WHERE session_id = $1", other["sessionId"]
    )
    assert reason == "PASSWORD_CHANGED"
    assert (await attempt(exchange, PASSWORD)).status_code == 401
    await exchange.login(password=NEW_PASSWORD)


async def test_a_wrong_current_password_changes_nothing_and_counts_as_a_failure(
    exchange: Exchange, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(throttle, "ACCOUNT_FREE", 1)
    tokens = await exchange.login()
    answers = [await change(exchange, tokens, "wrong password", NEW_PASSWORD) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [401, 401, 429]


async def test_of_two_changes_at_once_one_succeeds(exchange: Exchange) -> None:
    tokens = await exchange.login()
    news = [NEW_PASSWORD, "a third battery"]
    answers = await asyncio.gather(*(change(exchange, tokens, PASSWORD, new) for new in news))
    assert sorted(answer.status_code for answer in answers) == [204, 401]


@pytest.mark.parametrize("new", ["password1", "QWERTYUIOP", "aaaaaaaaaaaa", ALICE, PASSWORD, "1234567", "x" * 129])
async def test_easily_guessed_passwords_are_refused(exchange: Exchange, new: str) -> None:
    tokens = await exchange.login()
    answer = await change(exchange, tokens, PASSWORD, new)
    assert (answer.status_code, answer.json()["errors"][0]["field"]) == (422, "newPassword")
    assert new not in answer.text
    if new != PASSWORD:
        body = {"email": ALICE, "password": new}
        registration = await exchange.client.post("/api/users", json=body)
        assert (registration.status_code, registration.json()["errors"][0]["field"]) == (422, "password")
    await exchange.login()


async def test_sessions_are_listed_in_parts(exchange: Exchange) -> None:
    tokens = [await exchange.login() for _ in range(5)]
    headers = bearer(tokens[0]["accessToken"])
    seen, cursor = [], None
    while True:
        query = {"limit": 2, **({"cursor": cursor} if cursor else {})}
        page = (await exchange.client.get("/api/auth/sessions", params=query, headers=headers)).json()
        seen += [item["sessionId"] for item in page["items"]]
        cursor = page["nextCursor"]
        if cursor is None:
            break
    assert seen == [each["sessionId"] for each in reversed(tokens)]
    assert (await exchange.client.get("/api/auth/sessions?cursor=x", headers=headers)).status_code == 422

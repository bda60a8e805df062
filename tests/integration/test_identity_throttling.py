"""Guessing passwords: ever slower, then locked; and the operator's locks. Changing passwords."""

import asyncio
import itertools
from collections.abc import AsyncIterator
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from redis.asyncio import Redis

from api.identity.proofs import Work, zero_bits
from api.limits import login_throttle as throttle
from api.limits.login_throttle import Place
from client import Exchange as ExchangeClient
from client import sign_in
from domain.problems import Problem
from storage.db import Pool
from tests.integration.identity_app import (
    PASSWORD,
    Exchange,
    bearer,
    running_exchange,
    settings_without_workflows,
)
from tests.integration.socket_app import running_api

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
async def test_after_its_free_failures_a_place_waits_ever_longer_whether_there_is_the_account_or_not(
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


async def test_a_right_password_clears_the_place_and_keeps_the_addresss_failures(
    exchange: Exchange, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(throttle, "ACCOUNT_FREE", 2)
    for _ in range(4):
        exchange.client.cookies.clear()
        await attempt(exchange)
        exchange.client.cookies.clear()
        await exchange.login()
    assert [key async for key in redis.scan_iter("auth:failures:place:*")] == []
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
        await exchange.state.throttle.admit(f"{host}@example.com", Place(ip_address(host)))
    with pytest.raises(Problem, match="wait 1 s"):
        await exchange.state.throttle.admit("c@example.com", Place(ip_address("2001:db8::ffff")))
    await exchange.state.throttle.admit("d@example.com", Place(ip_address("2001:db8:0:1::1")))


@pytest.mark.parametrize("email", [ALICE, "nobody@example.com"])
async def test_after_too_many_failures_in_a_row_a_place_is_locked_out_for_a_while_and_no_other(
    exchange: Exchange, email: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(throttle, "LOCK_AFTER", 3)
    before = await exchange.login()
    exchange.client.cookies.clear()
    assert [(await attempt(exchange, email=email)).status_code for _ in range(3)] == [401, 401, 401]
    for password in (PASSWORD, "wrong password"):
        locked = await attempt(exchange, password, email)
        assert (locked.status_code, locked.json()["code"]) == (403, "CREDENTIAL_LOCKED")
        assert throttle.LOCK_SECONDS - 60 < int(locked.headers["retry-after"]) <= throttle.LOCK_SECONDS
    # Whoever is signed in stays so: nobody ends another's session by guessing badly.
    body = {"refreshToken": before["refreshToken"]}
    assert (await exchange.client.post("/api/auth/token/refresh", json=body)).status_code == 200
    headers = {"X-Device-Token": before["deviceToken"]}
    assert await status_from(exchange, "127.0.0.1", headers=headers) == 200


async def status_from(
    exchange: Exchange,
    host: str,
    password: str = PASSWORD,
    *,
    headers: dict[str, str] | None = None,
    email: str = ALICE,
    **more: Any,
) -> int:
    return (await answer_from(exchange, host, password, headers=headers, email=email, **more)).status_code


async def answer_from(
    exchange: Exchange,
    host: str,
    password: str = PASSWORD,
    *,
    headers: dict[str, str] | None = None,
    email: str = ALICE,
    **more: Any,
) -> httpx.Response:
    """Of a sign-in from another address, without cookies."""
    transport = httpx.ASGITransport(exchange.app, client=(host, 1))
    async with httpx.AsyncClient(transport=transport, base_url="http://exchange", headers=headers) as client:
        return await client.post("/api/auth/login", json={"email": email, "password": password, **more})


async def test_one_guesser_holds_up_nobody_else(exchange: Exchange) -> None:
    guesses = [await status_from(exchange, "192.0.2.66", f"guess {n}") for n in range(60)]
    assert guesses.count(401) == throttle.ACCOUNT_FREE + 1
    assert guesses.count(429) == 60 - guesses.count(401)
    assert [await status_from(exchange, f"198.51.100.{n}") for n in range(25)] == [200] * 25


async def spent(exchange: Exchange, email: str = ALICE) -> int:
    """Strangers guess until further ones must work or wait; how many of their guesses were looked at."""
    statuses = [await status_from(exchange, f"192.0.2.{n}", f"guess {n}", email=email) for n in range(30)]
    assert set(statuses) == {401, 429}
    return statuses.count(401)


@pytest.mark.parametrize("email", [ALICE, "nobody@example.com"])
async def test_of_all_strangers_together_few_guesses_are_looked_at(exchange: Exchange, email: str) -> None:
    assert await spent(exchange, email) == throttle.STRANGERS_FREE
    refused = await answer_from(exchange, "203.0.113.1", email=email)
    assert (refused.status_code, refused.json()["code"]) == (429, "RATE_LIMITED")
    assert refused.headers["retry-after"] == str(throttle.STRANGER_WAIT_SECONDS)
    assert refused.json()["work"]["bits"] == throttle.WORK_BITS


async def test_a_device_and_a_network_that_signed_in_before_keep_working(exchange: Exchange) -> None:
    tokens = (await answer_from(exchange, "203.0.113.5")).json()
    await spent(exchange)
    assert await status_from(exchange, "203.0.113.5") == 200
    assert await status_from(exchange, "203.0.113.77") == 429
    device = {"X-Device-Token": tokens["deviceToken"]}
    assert await status_from(exchange, "203.0.113.77", headers=device) == 200
    # It stands for this account only, as it is, and opens nothing by itself.
    await exchange.add_user("bob@example.com")
    await spent(exchange, "bob@example.com")
    assert await status_from(exchange, "203.0.113.77", headers=device, email="bob@example.com") == 429
    assert await status_from(exchange, "203.0.113.78", headers={"X-Device-Token": tokens["deviceToken"][:-2]}) == 429
    assert await status_from(exchange, "203.0.113.77", "wrong password", headers=device) == 401


async def test_a_browser_keeps_its_device_as_a_cookie_for_each_account(exchange: Exchange) -> None:
    await exchange.add_user("bob@example.com")
    answers = [await attempt(exchange, PASSWORD, email) for email in (ALICE, "bob@example.com", ALICE)]
    assert len(exchange.client.cookies) == 2
    for answer in answers:
        cookie = answer.headers["set-cookie"].lower()
        assert all(word in cookie for word in ("httponly", "samesite=strict", "path=/api/auth"))
        assert "secure" not in cookie
    await spent(exchange)
    transport = httpx.ASGITransport(exchange.app, client=("203.0.113.9", 1))
    for cookies, status in (({}, 429), (exchange.client.cookies, 200)):
        async with httpx.AsyncClient(transport=transport, base_url="http://exchange", cookies=cookies) as client:
            answer = await client.post("/api/auth/login", json={"email": ALICE, "password": PASSWORD})
            assert answer.status_code == status


async def test_a_device_waits_for_its_own_failures_only(exchange: Exchange, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throttle, "ACCOUNT_FREE", 2)
    device = {"X-Device-Token": (await exchange.login())["deviceToken"]}
    other = {"X-Device-Token": (await answer_from(exchange, "192.0.2.1")).json()["deviceToken"]}
    statuses = [await status_from(exchange, "127.0.0.1", "wrong password", headers=device) for _ in range(4)]
    assert statuses == [401, 401, 401, 429]
    assert await status_from(exchange, "127.0.0.1", headers=other) == 200
    assert await status_from(exchange, "127.0.0.1") == 200


def solved(work: dict[str, Any]) -> dict[str, str]:
    for number in itertools.count():
        done = Work(work["challenge"], str(number))
        if zero_bits(done) >= work["bits"]:
            return {"challenge": done.challenge, "solution": done.solution}
    raise AssertionError


async def test_a_stranger_works_for_one_attempt(
    exchange: Exchange, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(throttle, "WORK_BITS", 8)
    await spent(exchange)
    asked = (await answer_from(exchange, "203.0.113.1")).json()["work"]
    done = solved(asked)
    unsolved = next(
        {"challenge": asked["challenge"], "solution": f"x{n}"}
        for n in itertools.count()
        if zero_bits(Work(asked["challenge"], f"x{n}")) < asked["bits"]
    )
    easier = solved({"challenge": asked["challenge"].replace("-8.", "-1."), "bits": 1})
    await exchange.add_user("bob@example.com")
    await spent(exchange, "bob@example.com")
    assert await status_from(exchange, "203.0.113.2", work=done, email="bob@example.com") == 429
    for work in (unsolved, easier, {"challenge": "x", "solution": "1"}):
        assert await status_from(exchange, "203.0.113.1", work=work) == 429
    # Works from anywhere, once.
    assert await status_from(exchange, "203.0.113.3", "wrong password", work=done) == 401
    await redis.delete(f"auth:worked:{throttle.account_of(ALICE)}")
    assert await status_from(exchange, "203.0.113.4", work=done) == 429
    again = solved((await answer_from(exchange, "203.0.113.1")).json()["work"])
    assert await status_from(exchange, "203.0.113.1", work=again) == 200


async def test_the_client_works_by_itself(
    exchange: Exchange, redis: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(throttle, "WORK_BITS", 10)
    account = f"auth:failures:account:{throttle.account_of(ALICE)}"
    await redis.hset(account, mapping={"n": throttle.STRANGERS_FREE, "s": throttle.STRANGERS_FREE})
    settings = exchange.state.settings.model_copy(update={"state_dir": tmp_path})
    async with running_api(settings) as api, ExchangeClient(api.http, patience=30) as client:
        assert (await (await sign_in(client, ALICE, PASSWORD)).me()).email == ALICE


async def test_work_opens_one_attempt_in_a_while_and_waiting_another(
    exchange: Exchange, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(throttle, "WORK_BITS", 1)
    await spent(exchange)
    workers = [solved((await answer_from(exchange, f"203.0.113.{n}")).json()["work"]) for n in range(5)]
    statuses = await asyncio.gather(
        *(status_from(exchange, f"203.0.113.{n}", "wrong password", work=work) for n, work in enumerate(workers))
    )
    assert sorted(statuses) == [401, 429, 429, 429, 429]
    # Whoever waits has a turn of their own, which others who work or wait cannot take.
    mine = f"auth:waiting:{throttle.account_of(ALICE)}:203.0.113.50"
    assert await status_from(exchange, "203.0.113.50") == 429
    assert await redis.ttl(mine) > throttle.STRANGER_WAIT_SECONDS
    await redis.set(mine, "1")
    assert await status_from(exchange, "203.0.113.50", "wrong password") == 401
    assert await status_from(exchange, "203.0.113.50", "wrong password") == 429
    await redis.set(mine, "1")
    assert await status_from(exchange, "203.0.113.50") == 200
    assert await status_from(exchange, "203.0.113.50") == 200


async def test_work_and_waiting_grow_with_the_failures_up_to_a_bound(exchange: Exchange, redis: Redis) -> None:
    account = f"auth:failures:account:{throttle.account_of(ALICE)}"
    for number, (failures, bits, seconds) in enumerate(
        [(10, 18, 60), (39, 19, 240), (40, 20, 240), (320, 23, 1920), (1_000_000, 24, 3600)]
    ):
        await redis.hset(account, mapping={"n": failures, "s": 10})
        refused = await answer_from(exchange, f"203.0.113.{number}")
        assert (refused.json()["work"]["bits"], refused.headers["retry-after"]) == (bits, str(seconds))


async def test_a_single_guesser_makes_strangers_work_only_after_a_hundred_failures(
    exchange: Exchange, redis: Redis
) -> None:
    account = f"auth:failures:account:{throttle.account_of(ALICE)}"
    await redis.hset(account, mapping={"n": throttle.LOCK_AFTER - 1, "s": throttle.STRANGER_SHARE})
    assert await status_from(exchange, "203.0.113.1", "wrong password") == 401
    assert await status_from(exchange, "203.0.113.2") == 429


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
    exchange.client.cookies.clear()
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

"""The first operator: made once, and never changed by a start."""

import asyncio
import logging
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from pydantic import SecretStr
from redis.asyncio import Redis

from activities.identity.auth import set_status
from api.bootstrap import bootstrap, reset
from settings import Settings
from storage.db import Pool
from tests.integration.identity_app import Exchange, bearer, running_exchange, settings_without_workflows

ADMIN = "admin@exchange.local"
CHOSEN = "chosen by the operator"


@pytest_asyncio.fixture
async def exchange(database_url: str, redis_url: str, temporal_address: str, tmp_path: Path) -> AsyncIterator[Exchange]:
    settings = settings_without_workflows(database_url, redis_url, temporal_address, tmp_path)
    async with running_exchange(settings) as exchange:
        yield exchange


def settings_of(exchange: Exchange, password: str = "first password", email: str = ADMIN) -> Settings:
    return exchange.state.settings.model_copy(update={"admin_password": SecretStr(password), "admin_email": email})


async def everything(pool: Pool) -> list[Any]:
    """All that says who is an operator and how they sign in."""
    return [
        *await pool.fetch("SELECT * FROM users.users ORDER BY user_id"),
        *await pool.fetch("SELECT * FROM auth.auth_credentials ORDER BY user_id"),
        *await pool.fetch("SELECT * FROM auth.auth_sessions ORDER BY session_id"),
    ]


async def status_of_login(exchange: Exchange, password: str, email: str = ADMIN) -> int:
    return (await exchange.client.post("/api/auth/login", json={"email": email, "password": password})).status_code


async def test_the_first_operator_signs_in_and_a_restart_changes_nothing(exchange: Exchange, pool: Pool) -> None:
    user_id = await bootstrap(settings_of(exchange), pool)
    tokens = await exchange.login(ADMIN, "first password")
    before = await everything(pool)
    assert await bootstrap(settings_of(exchange), pool) == user_id
    assert await everything(pool) == before
    for path in ("/api/users/me", "/api/admin/accounts"):
        assert (await exchange.client.get(path, headers=bearer(tokens["accessToken"]))).status_code == 200


async def test_a_restart_undoes_no_change_of_a_leaked_password(exchange: Exchange, pool: Pool) -> None:
    await bootstrap(settings_of(exchange), pool)
    headers = bearer((await exchange.login(ADMIN, "first password"))["accessToken"])
    change = {"currentPassword": "first password", "newPassword": CHOSEN}
    assert (await exchange.client.post("/api/auth/password", json=change, headers=headers)).status_code == 204
    before = await everything(pool)
    for password in ("first password", "second password"):
        await bootstrap(settings_of(exchange, password), pool)
        assert await everything(pool) == before
        assert await status_of_login(exchange, password) == 401
    await exchange.login(ADMIN, CHOSEN)


@pytest.mark.parametrize(("status", "code"), [("LOCKED", 403), ("EXPIRED", 403)])
async def test_a_restart_undoes_no_lock(exchange: Exchange, pool: Pool, status: Any, code: int) -> None:
    user_id = await bootstrap(settings_of(exchange), pool)
    async with pool.acquire() as conn:
        await set_status(conn, user_id, status)
    for password in ("first password", "second password"):
        await bootstrap(settings_of(exchange, password), pool)
        assert await status_of_login(exchange, password) in (401, code)
    assert await status_of_login(exchange, "first password") == code


async def test_a_changed_setting_of_the_email_leaves_one_operator_and_is_told(
    exchange: Exchange, pool: Pool, caplog: pytest.LogCaptureFixture
) -> None:
    user_id = await bootstrap(settings_of(exchange), pool)
    before = await everything(pool)
    with caplog.at_level(logging.INFO):
        assert await bootstrap(settings_of(exchange, email="other@exchange.local"), pool) == user_id
    assert await everything(pool) == before
    assert "the first operator is admin@exchange.local, not EXCHANGE_ADMIN_EMAIL" in caplog.text
    assert "python -m api.bootstrap --reset" in caplog.text
    assert await status_of_login(exchange, "first password", "other@exchange.local") == 401


async def test_no_users_account_becomes_an_operators(exchange: Exchange, pool: Pool) -> None:
    await exchange.add_user(ADMIN)
    before = await everything(pool)
    with pytest.raises(RuntimeError, match="no operator"):
        await bootstrap(settings_of(exchange), pool)
    assert await everything(pool) == before
    with pytest.raises(RuntimeError, match="not that of an operator"):
        await reset(settings_of(exchange), pool, exchange.state.redis)
    assert await everything(pool) == before


async def test_two_starts_at_once_make_one_operator(exchange: Exchange, pool: Pool) -> None:
    starts = [settings_of(exchange, email=f"{name}@exchange.local") for name in ("one", "two", "three")]
    ids = await asyncio.gather(*(bootstrap(settings, pool) for settings in starts))
    assert len(set(ids)) == 1
    assert await pool.fetchval("SELECT count(*) FROM users.users WHERE 'admin' = ANY (roles)") == 1


@pytest.mark.parametrize(
    "change", [{"admin_password": None}, {"admin_password": SecretStr("short")}, {"admin_email": "admin"}]
)
async def test_an_operator_without_proper_email_and_password_is_not_made(
    exchange: Exchange, pool: Pool, change: dict[str, str | SecretStr | None]
) -> None:
    settings = settings_of(exchange).model_copy(update=change)
    with pytest.raises(RuntimeError, match="EXCHANGE_ADMIN"):
        await bootstrap(settings, pool)
    assert await pool.fetchval("SELECT count(*) FROM users.users WHERE 'admin' = ANY (roles)") == 0


async def test_the_command_resets_a_forgotten_password_and_a_lock_and_ends_all_sessions(
    exchange: Exchange, pool: Pool, redis: Redis, database_url: str, redis_url: str
) -> None:
    user_id = await bootstrap(settings_of(exchange), pool)
    headers = bearer((await exchange.login(ADMIN, "first password"))["accessToken"])
    async with pool.acquire() as conn:
        await set_status(conn, user_id, "LOCKED")
    environment = {
        **os.environ,
        "EXCHANGE_DATABASE_URL": database_url,
        "EXCHANGE_REDIS_URL": redis_url,
        "EXCHANGE_ADMIN_EMAIL": ADMIN,
        "EXCHANGE_ADMIN_PASSWORD": "second password",
    }
    for arguments, status in ([], 401), (["--reset"], 200):
        command = [sys.executable, "-m", "api.bootstrap", *arguments]
        process = await asyncio.create_subprocess_exec(*command, env=environment)
        assert await process.wait() == 0
        # A lock is told only to whoever knows the password.
        assert await status_of_login(exchange, "second password") == status
    assert (await exchange.client.get("/api/users/me", headers=headers)).status_code == 401
    assert await status_of_login(exchange, "first password") == 401

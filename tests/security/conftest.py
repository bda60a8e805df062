"""An api under attack: whatever a test did, it must still serve, and nothing unforeseen may have happened."""

import logging
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
import pytest_asyncio

from activities.identity.sessions import new_session, open_session
from domain.identity import Identity
from tests.integration.identity_app import Exchange, bearer, running_exchange, settings_without_workflows


@pytest_asyncio.fixture
async def exchange(
    database_url: str, redis_url: str, temporal_address: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> AsyncIterator[Exchange]:
    caplog.set_level(logging.INFO)
    settings = settings_without_workflows(database_url, redis_url, temporal_address, tmp_path)
    async with running_exchange(settings.model_copy(update={"access_log": "all"})) as exchange:
        await exchange.add_user()
        yield exchange
        for probe in ("/health/live", "/health/ready"):
            assert (await exchange.client.get(probe)).status_code == 200
        assert (await exchange.client.get("/api/users/me", headers=await sign_in(exchange, 1000))).status_code == 200
        failures = [record for record in caplog.records if record.name == "api.edge.gateway" and record.exc_info]
        assert not failures, failures


async def sign_in(exchange: Exchange, user_id: int, *roles: str) -> dict[str, str]:
    """The headers of a new session; no password is checked."""
    now = datetime.now(UTC)
    session = new_session(user_id, ["user", *roles], "127.0.0.1", None, now)
    async with exchange.state.pool.acquire() as conn, conn.transaction():
        await open_session(conn, exchange.state.redis, session, "0" * 64)
    return bearer(exchange.state.tokens.issue(Identity(user_id, frozenset(session.roles), session.session_id), now))

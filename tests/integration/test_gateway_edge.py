"""The edge: problem documents, limits, request ids, tokens at the door, and servers that are away."""

import asyncio
import json
import os
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import pytest
import pytest_asyncio
from redis.asyncio import Redis
from temporalio.client import Client

from api.edge.gateway import BODY_BYTES_MAX, Admin, Caller, ServedUserId
from api.identity.sessions import SessionGuard
from storage.db import Pool
from tests.integration.identity_app import (
    INTERNAL_TOKEN,
    PASSWORD,
    Exchange,
    bearer,
    running_exchange,
    settings_without_workflows,
)

JSON = {"Content-Type": "application/json"}
LOGIN = {"email": "alice@example.com", "password": PASSWORD}


@pytest_asyncio.fixture
async def exchange(database_url: str, redis_url: str, temporal_address: str, tmp_path: Path) -> AsyncIterator[Exchange]:
    settings = settings_without_workflows(database_url, redis_url, temporal_address, tmp_path)
    async with running_exchange(settings) as exchange:
        await exchange.add_user()
        yield exchange


def closed_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@asynccontextmanager
async def wire_to(address: str) -> AsyncIterator[str]:
    """An address that leads to `address`, until it is cut."""
    host, port = address.rsplit(":", 1)
    ends: list[asyncio.StreamWriter] = []

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(host, int(port))
        ends.extend((writer, far_writer))
        await asyncio.gather(copy(reader, far_writer), copy(far_reader, writer))

    server = await asyncio.start_server(connect, "127.0.0.1", 0)
    name, open_port = server.sockets[0].getsockname()
    yield f"{name}:{open_port}"
    server.close()
    for end in ends:
        end.transport.abort()


def assert_problem(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = response.json()
    assert {"type", "title", "status", "detail", "code"} <= set(problem)
    assert (problem["status"], problem["code"]) == (status, code)
    return problem


async def test_an_unknown_path_is_a_problem(exchange: Exchange) -> None:
    assert_problem(await exchange.client.get("/api/nothing"), 404, "NOT_FOUND")


async def test_a_wrong_method_is_a_problem_that_names_the_right_ones(exchange: Exchange) -> None:
    response = await exchange.client.put("/api/users", json={})
    assert_problem(response, 405, "METHOD_NOT_ALLOWED")
    assert "POST" in response.headers["allow"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"not json",
        b'{"email": "a@b.de", "password": "12345678"} trailing',
        b'{"email": "\xff\xfe"}',
        b"[" * 100_000,
        b'{"email": ' + b"9" * 5000 + b"}",
        b"[]",
        b"null",
    ],
)
async def test_a_body_that_is_not_the_json_asked_for_is_a_validation_problem(exchange: Exchange, body: bytes) -> None:
    assert_problem(await exchange.client.post("/api/users", content=body, headers=JSON), 422, "VALIDATION_FAILED")


async def test_a_form_instead_of_json_is_a_validation_problem(exchange: Exchange) -> None:
    assert_problem(await exchange.client.post("/api/auth/login", data=LOGIN), 422, "VALIDATION_FAILED")


async def test_a_body_that_announces_too_much_is_refused(exchange: Exchange) -> None:
    body = json.dumps({"email": "a" * BODY_BYTES_MAX}).encode()
    response = await exchange.client.post("/api/users", content=body, headers=JSON)
    assert_problem(response, 413, "REQUEST_TOO_LARGE")


async def test_a_chunked_body_is_refused_as_soon_as_it_is_too_long(exchange: Exchange) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(64):
            sent += 1 << 16
            yield b" " * (1 << 16)

    response = await exchange.client.post("/api/users", content=endless(), headers=JSON)
    assert_problem(response, 413, "REQUEST_TOO_LARGE")
    assert sent <= BODY_BYTES_MAX + (1 << 16)


async def test_a_body_of_just_the_limit_is_read(exchange: Exchange) -> None:
    body = json.dumps(LOGIN).encode()
    response = await exchange.client.post(
        "/api/auth/login", content=body + b" " * (BODY_BYTES_MAX - len(body)), headers=JSON
    )
    assert response.status_code == 200


@pytest.mark.parametrize("url", ["/api/users/%00", "/api/users/me?x=%00", "/%00"])
async def test_nul_characters_in_the_address_are_refused(exchange: Exchange, url: str) -> None:
    assert_problem(await exchange.client.get(url), 422, "VALIDATION_FAILED")


async def test_every_response_has_a_request_id_and_keeps_the_callers(exchange: Exchange) -> None:
    own = (await exchange.client.get("/health/live")).headers["x-request-id"]
    assert re.fullmatch(r"[0-9a-f]{32}", own)
    assert (await exchange.client.get("/nothing")).headers["x-request-id"] != own
    kept = await exchange.client.get("/health/live", headers={"X-Request-Id": "trader-7:42"})
    assert kept.headers.get_list("x-request-id") == ["trader-7:42"]
    replaced = await exchange.client.get("/health/live", headers={"X-Request-Id": "x" * 65})
    assert re.fullmatch(r"[0-9a-f]{32}", replaced.headers["x-request-id"])


async def test_an_unforeseen_error_shows_nothing_of_the_inside(
    exchange: Exchange, pool: Pool, caplog: pytest.LogCaptureFixture
) -> None:
    await pool.execute("ALTER TABLE auth.login_audits RENAME TO elsewhere")
    response = await exchange.client.post("/api/auth/login", json=LOGIN, headers={"X-Request-Id": "find-me"})
    problem = assert_problem(response, 500, "REMOTE_SERVICE_ERROR")
    assert "login_audits" not in response.text
    assert problem["detail"] == "The request could not be served"
    assert "find-me" in caplog.text
    assert "login_audits" in caplog.text
    assert PASSWORD not in caplog.text


async def test_what_postgres_cannot_hold_is_the_callers_fault(exchange: Exchange) -> None:
    # A route that checks nothing: the net under those that forgot to.
    @exchange.app.get("/unchecked")
    async def unchecked() -> None:
        await exchange.state.pool.fetchval("SELECT $1::text", "\ud800")

    @exchange.app.get("/too-large")
    async def too_large() -> None:
        await exchange.state.pool.fetchval("SELECT $1::bigint", 2**80)

    for url in ("/unchecked", "/too-large"):
        assert_problem(await exchange.client.get(url), 422, "VALIDATION_FAILED")


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer x"},
        {"Authorization": "Basic YTpi"},
        {"Authorization": f"Bearer {INTERNAL_TOKEN}"},
        {"X-Internal-Token": INTERNAL_TOKEN},
    ],
)
async def test_without_a_users_token_a_users_endpoint_answers_401(exchange: Exchange, headers: dict[str, str]) -> None:
    response = await exchange.client.get("/api/users/me", headers=headers)
    assert_problem(response, 401, "UNAUTHENTICATED")
    assert response.headers["www-authenticate"] == "Bearer"


async def test_operators_services_and_owners_are_told_apart(exchange: Exchange, pool: Pool) -> None:
    @exchange.app.get("/for-admins")
    async def for_admins(_: Admin) -> None: ...

    @exchange.app.get("/for-owners")
    async def for_owners(user_id: ServedUserId) -> int:
        return user_id

    @exchange.app.get("/for-callers")
    async def for_callers(caller: Caller) -> bool:
        return caller.is_internal

    alice = await exchange.state.pool.fetchval("SELECT user_id FROM users.users")
    await exchange.add_user("root@example.com")
    await pool.execute("UPDATE auth.auth_credentials SET roles = '{user,admin}' WHERE email = 'root@example.com'")
    user = bearer((await exchange.login())["accessToken"])
    admin = bearer((await exchange.login("root@example.com"))["accessToken"])

    async def get(url: str, headers: dict[str, str]) -> tuple[int, Any]:
        response = await exchange.client.get(url, headers=headers)
        return response.status_code, response.json() if response.status_code == 200 else response.json()["code"]

    assert await get("/for-admins", user) == (403, "FORBIDDEN")
    assert await get("/for-admins", admin) == (200, None)
    assert await get("/for-admins", {"X-Internal-Token": INTERNAL_TOKEN}) == (401, "UNAUTHENTICATED")
    assert await get("/for-owners", user) == (200, alice)
    assert await get(f"/for-owners?userId={alice}", user) == (200, alice)
    assert await get(f"/for-owners?userId={alice + 1}", user) == (403, "FORBIDDEN")
    assert await get(f"/for-owners?userId={alice}", admin) == (200, alice)
    assert await get("/for-owners?userId=x", user) == (422, "VALIDATION_FAILED")
    assert await get("/for-callers", user) == (200, False)
    assert await get("/for-callers", {"X-Internal-Token": INTERNAL_TOKEN}) == (200, True)
    assert await get("/for-callers", bearer(INTERNAL_TOKEN)) == (200, True)
    assert await get("/for-callers", {"X-Internal-Token": "wrong"}) == (401, "UNAUTHENTICATED")


async def test_without_a_configured_service_token_nobody_is_a_service(exchange: Exchange) -> None:
    settings = exchange.state.settings.model_copy(update={"internal_token": None})
    exchange.app.state.exchange = replace(exchange.state, settings=settings)
    for token in ("", "None", INTERNAL_TOKEN):
        response = await exchange.client.post("/api/auth/credentials", json={}, headers={"X-Internal-Token": token})
        assert response.status_code == 401


async def test_while_redis_is_away_a_users_request_is_to_be_retried(exchange: Exchange) -> None:
    tokens = await exchange.login()
    async with Redis(port=closed_port()) as away:
        guard = SessionGuard(exchange.state.pool, away)
        exchange.app.state.exchange = replace(exchange.state, redis=away, sessions=guard)
        responses = await asyncio.gather(
            *(exchange.client.get("/api/users/me", headers=bearer(tokens["accessToken"])) for _ in range(3))
        )
        for response in responses:
            assert_problem(response, 503, "OVERLOADED")
            assert int(response.headers["retry-after"]) >= 1
        ready = assert_problem(await exchange.client.get("/health/ready"), 503, "OVERLOADED")
        assert ready["failed"] == ["redis"]


async def test_while_postgres_is_away_requests_are_to_be_retried(exchange: Exchange) -> None:
    away = asyncpg.create_pool(host="127.0.0.1", port=closed_port(), user="x", min_size=0)
    async with away:
        exchange.app.state.exchange = replace(exchange.state, pool=away)
        response = await exchange.client.post("/api/auth/login", json=LOGIN)
        assert_problem(response, 503, "OVERLOADED")
        assert "127.0.0.1" not in response.text
        ready = assert_problem(await exchange.client.get("/health/ready"), 503, "OVERLOADED")
        assert ready["failed"] == ["postgres"]


async def test_while_temporal_is_away_a_registration_waits_for_it(
    exchange: Exchange, pool: Pool, temporal_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api.routes.users.REGISTRATION_SECONDS_MAX", 0.5)
    async with wire_to(temporal_address) as address:
        temporal = await Client.connect(address, namespace="test-0")
    exchange.app.state.exchange = replace(exchange.state, temporal=temporal)
    response = await exchange.client.post("/api/users", json={"email": "bob@example.com", "password": PASSWORD})
    problem = assert_problem(response, 500, "REMOTE_SERVICE_ERROR")
    status = "SELECT status FROM users.user_registration_prepare WHERE user_id = $1"
    assert await pool.fetchval(status, int(problem["userId"])) == "PREPARE"
    ready = assert_problem(await exchange.client.get("/health/ready"), 503, "OVERLOADED")
    assert ready["failed"] == ["temporal"]


async def test_a_killed_database_connection_costs_one_answer_at_most(exchange: Exchange, pool: Pool) -> None:
    await pool.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    statuses = [(await exchange.client.post("/api/auth/login", json=LOGIN)).status_code for _ in range(8)]
    assert set(statuses) <= {200, 503}
    assert statuses[-1] == 200


async def test_the_probes_answer_while_all_is_well(exchange: Exchange) -> None:
    for probe in ("live", "ready"):
        response = await exchange.client.get(f"/health/{probe}")
        assert (response.status_code, response.json()) == (200, {"status": "UP"})


async def test_the_process_serves_and_stops_on_sigterm_after_answering(
    database_url: str, redis_url: str, temporal_address: str, tmp_path: Path
) -> None:
    settings = settings_without_workflows(database_url, redis_url, temporal_address, tmp_path)
    port = closed_port()
    environment = {
        **os.environ,
        "EXCHANGE_DATABASE_URL": database_url,
        "EXCHANGE_REDIS_URL": redis_url,
        "EXCHANGE_TEMPORAL_ADDRESS": temporal_address,
        "EXCHANGE_TEMPORAL_NAMESPACE": settings.temporal_namespace,
        "EXCHANGE_JWT_PRIVATE_KEY_FILE": str(settings.jwt_private_key_file),
        "EXCHANGE_API_PORT": str(port),
    }
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "api", env=environment)
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
            await until_ready(client)
            hashing = asyncio.create_task(client.post("/api/auth/login", json=LOGIN))
            await asyncio.sleep(0.02)
            process.send_signal(signal.SIGTERM)
            assert_problem(await hashing, 401, "INVALID_CREDENTIALS")
            assert await asyncio.wait_for(process.wait(), 20) in (0, -signal.SIGTERM)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def until_ready(client: httpx.AsyncClient) -> None:
    for _ in range(200):
        try:
            if (await client.get("/health/ready")).status_code == 200:
                return
        except httpx.TransportError:
            pass
        await asyncio.sleep(0.1)
    raise AssertionError("The api did not become ready in 20 seconds")

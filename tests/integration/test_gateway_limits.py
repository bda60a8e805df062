"""Rates, load, headers, origins, proxies, slow clients and the log of the gateway."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from redis.asyncio import Redis

from api.app import create_app
from api.edge import gateway, http_protocol
from api.edge.server import Server, server_config
from api.limits.rate_limits import Limit, RateLimiter
from domain.problems import Problem
from logs import JsonLines, TextLines
from settings import Settings
from tests.integration.identity_app import (
    PASSWORD,
    Exchange,
    bearer,
    running_exchange,
    settings_without_workflows,
)
from tests.integration.test_gateway_edge import closed_port

Running = Callable[..., AbstractAsyncContextManager[Exchange]]


@pytest.fixture
def running(database_url: str, redis_url: str, temporal_address: str, tmp_path: Path) -> Running:
    settings = settings_without_workflows(database_url, redis_url, temporal_address, tmp_path)

    @asynccontextmanager
    async def run(**changes: Any) -> AsyncIterator[Exchange]:
        async with running_exchange(settings.model_copy(update=changes)) as exchange:
            yield exchange

    return run


@pytest_asyncio.fixture
async def exchange(running: Running) -> AsyncIterator[Exchange]:
    async with running(access_log="all") as exchange:
        await exchange.add_user()
        yield exchange


async def test_a_limit_lets_its_burst_through_and_then_its_rate(redis: Redis) -> None:
    limit, limiter = Limit("test", 50, 20), RateLimiter(redis)

    async def passed() -> int:
        count = 0
        for _ in range(60):
            try:
                await limiter.spend(limit, "alice")
            except Problem as problem:
                assert problem.code == "RATE_LIMITED"  # noqa: PT017 - the others count
                break
            count += 1
        return count

    assert 20 <= await passed() <= 25
    await asyncio.sleep(0.2)
    assert 4 <= await passed() <= 15
    assert await limiter.spend(limit, "bob") == 19


async def test_processes_share_a_limit(redis: Redis) -> None:
    limit, limiters = Limit("test", 1, 30), [RateLimiter(redis) for _ in range(3)]
    passed = 0
    for n in range(60):
        try:
            await limiters[n % 3].spend(limit, "alice")
            passed += 1
        except Problem:
            pass
    assert 30 <= passed <= 32


async def test_a_busy_caller_costs_redis_few_calls(redis: Redis) -> None:
    limit, limiter = Limit("test", 1_000, 2_000), RateLimiter(redis)
    before = (await redis.info("stats"))["total_commands_processed"]
    await asyncio.gather(*(limiter.spend(limit, "alice") for _ in range(500)))
    # Five leases of a hundred tokens; each script runs four commands.
    assert (await redis.info("stats"))["total_commands_processed"] - before < 40


@pytest.mark.timeout(20)
async def test_a_lease_that_is_used_up_in_the_turn_in_which_it_came_is_asked_for_anew(redis: Redis) -> None:
    limit, limiter = Limit("test", 1_000, 2_000), RateLimiter(redis)
    answered = asyncio.create_task(asyncio.sleep(0))
    await answered
    # Its callbacks have not run yet, and others have taken what it brought.
    limiter._asking["test", "alice"] = answered
    assert await limiter.spend(limit, "alice") == 1_999


async def test_without_redis_nobody_is_stopped() -> None:
    async with Redis(port=closed_port()) as away:
        assert await RateLimiter(away).spend(Limit("test", 1, 5), "alice") == 4


async def test_a_user_over_the_limit_is_told_when_to_come_again(running: Running) -> None:
    async with running(rate_limit_user=2.0) as exchange:
        await exchange.add_user()
        headers = bearer((await exchange.login())["accessToken"])
        first = await exchange.client.get("/api/users/me", headers=headers)
        assert first.headers["ratelimit-policy"] == '"user";q=4;w=2'
        assert first.headers["ratelimit"] == '"user";r=3;t=1'
        answers = [await exchange.client.get("/api/users/me", headers=headers) for _ in range(6)]
        refused = answers[-1]
        assert (refused.status_code, refused.json()["code"]) == (429, "RATE_LIMITED")
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.headers["ratelimit"].startswith('"user";r=0;t=')
        await exchange.add_user("bob@example.com")
        bob = bearer((await exchange.login("bob@example.com"))["accessToken"])
        assert (await exchange.client.get("/api/users/me", headers=bob)).status_code == 200


async def test_an_address_over_the_limit_is_refused_before_anything_else_and_probes_are_not(running: Running) -> None:
    async with running(rate_limit_address=1.0) as exchange:
        statuses = [(await exchange.client.get("/api/users/me")).status_code for _ in range(4)]
        assert statuses[:2] == [401, 401]
        assert statuses[-1] == 429
        assert (await exchange.client.get("/health/live")).status_code == 200
        transport = httpx.ASGITransport(exchange.app, client=("192.0.2.9", 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://exchange") as elsewhere:
            assert (await elsewhere.get("/api/users/me")).status_code == 401


async def test_sign_ins_have_a_limit_of_their_own(running: Running) -> None:
    async with running(rate_limit_sign_in=0.2) as exchange:
        body = {"email": "nobody@example.com", "password": PASSWORD}
        statuses = [(await exchange.client.post("/api/auth/login", json=body)).status_code for _ in range(4)]
        assert statuses == [401, 401, 429, 429]


async def test_under_too_much_load_requests_are_refused_and_probes_are_not(exchange: Exchange) -> None:
    exchange.app.state.load.in_flight_max = 0
    refused = await exchange.client.get("/api/market/instruments")
    assert (refused.status_code, refused.json()["code"]) == (503, "OVERLOADED")
    assert refused.headers["retry-after"] in ("1", "2", "3")
    assert (await exchange.client.get("/health/live")).status_code == 200
    exchange.app.state.load.in_flight_max = 1
    assert (await exchange.client.get("/api/market/instruments")).status_code == 200
    assert exchange.app.state.load.in_flight == 0


async def test_a_forwarded_address_is_believed_from_trusted_proxies_only(running: Running, redis: Redis) -> None:
    forged = {"X-Forwarded-For": "198.51.100.1", "X-Forwarded-Proto": "https"}
    body = {"email": "nobody@example.com", "password": PASSWORD}
    async with running() as exchange:
        plain = await exchange.client.post("/api/auth/login", json=body, headers=forged)
        assert "strict-transport-security" not in plain.headers
    async with running(trusted_proxies="127.0.0.0/8, 192.0.2.1") as exchange:
        chain = {**forged, "X-Forwarded-For": "203.0.113.5, 198.51.100.7, 192.0.2.1"}
        answer = await exchange.client.post("/api/auth/login", json=body, headers=chain)
        assert answer.headers["strict-transport-security"].startswith("max-age=31536000")
        rows = await exchange.state.pool.fetch("SELECT host(ip) AS ip FROM auth.login_audits ORDER BY audit_id")
    # What the client itself wrote in front of the chain is not believed.
    assert [row["ip"] for row in rows] == ["127.0.0.1", "198.51.100.7"]


async def test_every_answer_has_security_headers_and_private_ones_are_not_stored(exchange: Exchange) -> None:
    for url in ("/api/users/me", "/api/nothing", "/health/live", "/docs", "/api/market/instruments"):
        headers = (await exchange.client.get(url)).headers
        assert headers["x-content-type-options"] == "nosniff", url
        assert headers["x-frame-options"] == "DENY"
        for closed in ("frame-ancestors 'none'", "base-uri 'none'", "form-action 'none'"):
            assert closed in headers["content-security-policy"]
        assert ("no-store" in headers.get("cache-control", "")) == url.startswith(("/api/users", "/api/nothing"))
    docs = await exchange.client.get("/docs")
    assert "cdn.jsdelivr.net" in docs.text
    assert "cdn.jsdelivr.net" in docs.headers["content-security-policy"]
    assert "base-uri 'none'" in docs.headers["content-security-policy"]


async def test_other_origins_are_let_in_by_setting_only(running: Running) -> None:
    asked = {"Origin": "https://desk.example", "Access-Control-Request-Method": "POST"}
    async with running() as exchange:
        answer = await exchange.client.options("/api/orders", headers=asked)
        assert "access-control-allow-origin" not in answer.headers
    async with running(cors_origins="https://desk.example") as exchange:
        answer = await exchange.client.options("/api/orders", headers=asked)
        assert answer.headers["access-control-allow-origin"] == "https://desk.example"
        other = await exchange.client.get("/health/live", headers={"Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers
        ours = await exchange.client.get("/health/live", headers={"Origin": "https://desk.example"})
        assert "access-control-allow-credentials" not in ours.headers


async def test_the_log_has_every_request_and_no_secret(exchange: Exchange, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    tokens = await exchange.login()
    headers = bearer(tokens["accessToken"])
    answer = await exchange.client.get("/api/users/me", headers={**headers, "X-Request-Id": "find-me"})
    await exchange.client.post("/api/auth/token/refresh", json={"refreshToken": tokens["refreshToken"]})
    await exchange.client.post("/api/auth/login", json={"email": "alice@example.com", "password": "wrong secret"})
    await exchange.client.delete("/api/orders/77?token=in-the-query", headers=headers)
    body = {"label": "bot", "algorithm": "HMAC_SHA256", "permissions": ["READ"]}
    key = (await exchange.client.post("/api/auth/api-keys", json=body, headers=headers)).json()
    lines = [JsonLines().format(record) for record in caplog.records]
    [line] = [json.loads(line) for line in lines if "find-me" in line]
    assert line["userId"] == int(answer.json()["userId"])
    assert (line["route"], line["status"], line["method"]) == ("/api/users/me", 200, "GET")
    assert 0 < line["ms"] < 10_000
    assert any('"route":"/api/orders/{order_id}"' in line for line in lines)
    text = "\n".join([*lines, *(TextLines().format(record) for record in caplog.records)])
    for secret in (PASSWORD, "wrong secret", tokens["accessToken"], tokens["refreshToken"], key["secret"], "in-the-q"):
        assert secret not in text


@pytest.mark.parametrize(
    "message",
    [
        "Authorization: Bearer eyJhbGciOi.eyJzdWIi.c2ln",
        "failed with eyJhbGciOi.eyJzdWIi.c2ln inside",
        '{"password": "c2ln", "email": "a"}',
        "hash $argon2id$v=19$c2ln",
        "token=c2ln",
    ],
)
def test_the_logs_last_net_catches_secrets_that_an_error_quotes(message: str) -> None:
    try:
        raise ValueError(message)
    except ValueError as error:
        record = logging.LogRecord("x", 40, "", 0, "%s", (message,), (ValueError, error, error.__traceback__))
    for formatter in (JsonLines(), TextLines()):
        assert "c2ln" not in formatter.format(record)
        assert "***" in formatter.format(record)


@asynccontextmanager
async def served(settings: Settings) -> AsyncIterator[int]:
    """The api behind a real socket, in this process; the port."""
    port = closed_port()
    api = Server(server_config(create_app(settings), "127.0.0.1", port))
    api.install_signal_handlers = lambda: None  # type: ignore[attr-defined]  # pytest keeps its own
    task = asyncio.create_task(api._serve())
    while not api.started:  # noqa: ASYNC110  # uvicorn tells nobody
        await asyncio.sleep(0.02)
    try:
        yield port
    finally:
        api.should_exit = True
        await task


async def test_slow_and_endless_clients_are_cut_off_and_others_served(
    exchange: Exchange, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_protocol, "HEAD_SECONDS_MAX", 0.5)
    monkeypatch.setattr(gateway, "BODY_SECONDS_MAX", 0.5)

    async def talk(port: int, *parts: bytes, pause: float = 0.1) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        async with asyncio.timeout(10):
            try:
                for part in parts:
                    writer.write(part)
                    await writer.drain()
                    await asyncio.sleep(pause)
                return await reader.read()
            except ConnectionError:
                return b"reset"
            finally:
                writer.close()

    head = b"GET /health/live HTTP/1.1\r\nHost: x\r\n"
    post = b"POST /api/auth/login HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n"
    async with served(exchange.state.settings) as port, httpx.AsyncClient() as client:
        silent = [asyncio.create_task(talk(port)) for _ in range(100)]
        others = [
            asyncio.create_task(talk(port, head, *(b"X-A: b\r\n" for _ in range(30)))),
            asyncio.create_task(talk(port, head + b"X-A: ", *(b"b" * 20_000 for _ in range(8)), pause=0)),
            asyncio.create_task(talk(port, post, *(b"{" for _ in range(30)))),
            asyncio.create_task(talk(port, head + b"\r\n", b"GET /health")),
        ]
        assert (await client.get(f"http://127.0.0.1:{port}/health/live")).status_code == 200
        assert all(answer.startswith(b"HTTP/1.1 400") for answer in await asyncio.gather(*silent))
        slow_head, long_head, slow_body, second = await asyncio.gather(*others)
        assert slow_head[:12] in (b"HTTP/1.1 400", b"reset")
        assert long_head[:12] in (b"HTTP/1.1 400", b"reset")
        assert slow_body[:12] in (b"HTTP/1.1 408", b"reset")
        assert second.count(b"HTTP/1.1 ") == 2
        assert (await client.get(f"http://127.0.0.1:{port}/health/live")).status_code == 200

"""A process answers for itself: in time, truthfully, and without needing its port to work."""

import asyncio
import logging
import os
import socket
import subprocess
import sys

import httpx
import pytest
from prometheus_client import REGISTRY

from stack.ports import free_port
from telemetry import health
from telemetry.alerts import AUDIT_FAILED, alert
from telemetry.endpoint import endpoint
from telemetry.health import NotReadyError, failures
from tests.servers import ROOT


async def well() -> None:
    """Nothing is wrong."""


async def ill() -> None:
    raise NotReadyError("for the test")


async def get(port: int, path: str) -> httpx.Response:
    async with httpx.AsyncClient(trust_env=False) as client:
        return await client.get(f"http://127.0.0.1:{port}{path}")


async def test_those_that_fail_are_named() -> None:
    assert await failures({"one": well, "two": ill}) == ["two"]


async def test_a_check_that_cannot_even_be_cancelled_does_not_hold_up_the_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(health, "CHECK_SECONDS_MAX", 0.05)
    release = asyncio.Event()

    async def stubborn() -> None:
        try:
            await release.wait()
        except asyncio.CancelledError:
            await release.wait()

    async with asyncio.timeout(10):
        assert await failures({"one": well, "two": stubborn}) == ["two"]
    release.set()


async def test_probes_and_figures_are_served_beside_the_work() -> None:
    port = free_port()
    async with endpoint("127.0.0.1", port, {"one": well}):
        assert (await get(port, "/health/live")).json() == {"status": "UP"}
        assert (await get(port, "/health/ready")).json() == {"status": "UP"}
        assert "exchange_alerts_total" in (await get(port, "/metrics")).text
    with pytest.raises(httpx.ConnectError):
        await get(port, "/health/live")


async def test_a_process_that_is_not_ready_says_what_is_not() -> None:
    port = free_port()
    async with endpoint("127.0.0.1", port, {"one": well, "two": ill}):
        answer = await get(port, "/health/ready")
    assert (answer.status_code, answer.json()) == (503, {"status": "DOWN", "failed": ["two"]})


async def test_a_port_that_is_taken_costs_the_figures_and_not_the_process(caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        async with endpoint("127.0.0.1", port, {}):
            pass
    assert f"127.0.0.1:{port} cannot be had" in caplog.text


@pytest.mark.parametrize(("check", "status"), [(well, 0), (ill, 1)])
async def test_the_probe_of_a_container_ends_as_the_process_answers(check: health.Check, status: int) -> None:
    port = free_port()
    environment = os.environ | {"EXCHANGE_METRICS_PORT": str(port)}
    command = [sys.executable, "-m", "telemetry.probe"]
    async with endpoint("127.0.0.1", port, {"one": check}):
        child = await asyncio.create_subprocess_exec(*command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
        assert await child.wait() == status
    child = await asyncio.create_subprocess_exec(*command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    assert await child.wait() == 1


def test_an_alert_is_a_line_and_a_count(caplog: pytest.LogCaptureFixture) -> None:
    def count() -> float:
        value = REGISTRY.get_sample_value("exchange_alerts_total", {"alert": AUDIT_FAILED})
        assert value is not None
        return value

    before = count()
    with caplog.at_level(logging.ERROR, logger="alerts"):
        alert(AUDIT_FAILED, "sums differ: %s", "fees")
    assert caplog.messages == ["ALERT sums differ: fees"]
    assert count() == before + 1

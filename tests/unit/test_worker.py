"""Monitors of the worker: a defect of one is told, and stops neither it nor anything else."""

import asyncio
import logging

import pytest

import worker
from telemetry.alerts import MONITOR_FAILED
from telemetry.metrics import ALERTS


def alerts() -> float:
    [metric] = ALERTS.collect()
    total = {"alert": MONITOR_FAILED}
    [value] = [each.value for each in metric.samples if each.name.endswith("_total") and each.labels == total]
    return value


async def test_a_monitor_that_fails_is_told_of_and_tried_again_until_the_worker_stops(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(worker, "MONITOR_PAUSE_SECONDS", 0.001)
    stop, works, runs, before = asyncio.Event(), asyncio.Event(), 0, alerts()

    async def monitor() -> None:
        nonlocal runs
        runs += 1
        if runs < 3:
            raise ExceptionGroup("in a task group", [ValueError("no such column")])
        works.set()
        await stop.wait()

    with caplog.at_level(logging.ERROR):
        running = asyncio.create_task(worker.keep_running("pruner", monitor, stop))
        async with asyncio.timeout(5):
            await works.wait()
            assert not running.done()
            stop.set()
            await running
    assert alerts() - before == 2
    assert caplog.text.count("ALERT the monitor pruner failed, and is tried again") == 2
    assert "no such column" in caplog.text


async def test_a_monitor_that_fails_does_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    stop = asyncio.Event()

    async def monitor() -> None:
        stop.set()
        raise ValueError

    async with asyncio.timeout(worker.MONITOR_PAUSE_SECONDS / 2):
        await worker.keep_running("pruner", monitor, stop)


async def test_a_cancelled_monitor_ends() -> None:
    begun = asyncio.Event()

    async def monitor() -> None:
        begun.set()
        await asyncio.sleep(60)

    running = asyncio.create_task(worker.keep_running("pruner", monitor, asyncio.Event()))
    await begun.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running

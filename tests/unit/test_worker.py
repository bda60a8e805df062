"""Monitors of the worker: a defect of one is told, and stops neither it nor anything else."""

import asyncio
import logging
import signal

import pytest
from pydantic import SecretStr

import worker
from settings import Settings
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


class Opened:
    """Something that the worker opens: notes when it is closed."""

    def __init__(self) -> None:
        self.closed = False

    async def __aenter__(self) -> "Opened":
        return self

    async def __aexit__(self, *_: object) -> None:
        self.closed = True


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Opened]:
    """What a worker without workers and monitors opens: a pool and a client of Redis."""
    pool, redis = Opened(), Opened()

    async def opening(*_: object, **__: object) -> Opened:
        return pool

    async def nothing(*_: object) -> dict[str, object]:
        return {}

    monkeypatch.setattr(worker, "open_pool", opening)
    monkeypatch.setattr(worker, "open_redis", lambda _: redis)
    monkeypatch.setattr(worker, "connect_temporal", nothing)
    monkeypatch.setattr(worker, "read_instruments", nothing)
    monkeypatch.setattr(worker, "register_schedules", nothing)
    monkeypatch.setattr(worker, "server_checks", lambda *_: {})
    monkeypatch.setattr(worker, "build_workers", lambda *_: [])
    monkeypatch.setattr(worker, "_monitors", lambda *_: {})
    return [pool, redis]


SETTINGS = Settings(database_url=SecretStr("postgresql://nowhere"), redis_url=SecretStr("redis://nowhere"))


async def test_the_worker_closes_what_it_opened(opened: list[Opened]) -> None:
    await worker.run(SETTINGS, asyncio.Event())
    assert [each.closed for each in opened] == [True, True]


@pytest.mark.parametrize("step", ["connect_temporal", "read_instruments", "register_schedules"])
async def test_the_worker_closes_what_it_opened_when_a_step_fails(
    opened: list[Opened], monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    async def failing(*_: object) -> None:
        raise RuntimeError("not there")

    monkeypatch.setattr(worker, step, failing)
    with pytest.raises(RuntimeError, match="not there"):
        await worker.run(SETTINGS, asyncio.Event())
    assert [each.closed for each in opened] == [True, True]


async def test_the_worker_closes_what_it_opened_when_a_worker_of_temporal_fails(
    opened: list[Opened], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def failing(*_: object) -> None:
        raise RuntimeError("fatal")

    monkeypatch.setattr(worker, "build_workers", lambda *_: [object()])
    monkeypatch.setattr(worker, "_run_worker", failing)
    with pytest.raises(ExceptionGroup):
        await worker.run(SETTINGS, asyncio.Event())
    assert [each.closed for each in opened] == [True, True]


async def test_traces_are_ended_when_the_worker_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = asyncio.Event()

    async def failing(*_: object) -> None:
        raise RuntimeError("fatal")

    monkeypatch.setattr(worker, "run", failing)
    monkeypatch.setattr(worker, "set_up_logging", lambda _: None)
    monkeypatch.setattr(worker, "start_tracing", lambda *_: None)
    monkeypatch.setattr(worker, "stop_tracing", ended.set)
    try:
        with pytest.raises(RuntimeError, match="fatal"):
            await worker.main()
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().remove_signal_handler(number)
    assert ended.is_set()

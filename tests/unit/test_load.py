"""When a process refuses requests: too many at once, too long a wait, or a loop that is late again and again."""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest

from api.limits.load import BEGINNINGS_A_TURN, IN_FLIGHT_MIN, SAMPLE_SECONDS, SAMPLES, Beginnings, Load, Refusals

Scope = dict[str, Any]


class Clock:
    """In the place of the module `time`."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("api.limits.load.time", clock)
    return clock


def admitted(load: Load, count: int) -> list[Scope]:
    scopes: list[Scope] = [{} for _ in range(count)]
    return [scope for scope in scopes if load.admit(scope)]


def serve(load: Load, clock: Clock, offered: int, capacity: int, seconds: float, waiting: deque[Scope]) -> None:
    """Requests are offered and worked off at these rates a second, first come, first served."""
    for _ in range(round(seconds / SAMPLE_SECONDS)):
        waiting += admitted(load, round(offered * SAMPLE_SECONDS))
        clock.now += SAMPLE_SECONDS
        for _ in range(min(len(waiting), round(capacity * SAMPLE_SECONDS))):
            load.release(waiting.popleft())
        load.sample(SAMPLE_SECONDS)


def test_more_requests_in_flight_than_allowed_are_too_many_and_each_counts_once() -> None:
    load = Load(in_flight_max=2, lag_seconds_max=1, wait_seconds_max=1)
    first, second = admitted(load, 3)
    assert load.admit(first)
    assert load.in_flight == 2
    assert not load.admit({})
    load.release(second)
    load.release(second)
    assert load.in_flight == 1
    assert load.admit({})


def test_in_overload_so_many_are_in_flight_as_are_worked_off_within_the_bound(clock: Clock) -> None:
    load, waiting = Load(in_flight_max=5_000, lag_seconds_max=9, wait_seconds_max=0.5), deque[Scope]()
    # The machine may become slower meanwhile, or quicker.
    for capacity in (1_000, 400, 2_000):
        serve(load, clock, 5 * capacity, capacity, 8, waiting)
        for _ in range(20):
            serve(load, clock, 5 * capacity, capacity, 0.1, waiting)
            assert 0.35 < load.in_flight / capacity <= 0.55, capacity


def test_what_is_quick_is_let_in_up_to_the_maximum_and_so_is_a_burst(clock: Clock) -> None:
    load = Load(in_flight_max=2_000, lag_seconds_max=9, wait_seconds_max=0.5)
    serve(load, clock, 900, 1_000, 2, deque())
    burst = admitted(load, 3_000)
    # Before the first of them is answered nobody knows that they take long.
    for _ in range(40):
        load.sample(SAMPLE_SECONDS)
    assert len(burst) == load.in_flight == 2_000


@pytest.mark.parametrize("offered", [100, 0])
def test_the_bound_is_lifted_when_the_queue_is_gone(clock: Clock, offered: int) -> None:
    load, waiting = Load(in_flight_max=2_000, lag_seconds_max=9, wait_seconds_max=0.5), deque[Scope]()
    serve(load, clock, 5_000, 500, 5, waiting)
    assert load.in_flight < 300
    serve(load, clock, offered, 500, 3, waiting)
    assert len(admitted(load, 3_000)) >= 1_990


def test_some_are_let_in_however_slow_they_are(clock: Clock) -> None:
    load, waiting = Load(in_flight_max=2_000, lag_seconds_max=9, wait_seconds_max=0.5), deque[Scope]()
    serve(load, clock, 500, 20, 60, waiting)
    assert load.in_flight in range(IN_FLIGHT_MIN - 1, IN_FLIGHT_MIN + 1)


async def test_one_long_turn_of_the_loop_is_no_overload_and_several_are_until_they_end() -> None:
    load = Load(in_flight_max=1, lag_seconds_max=0.05, wait_seconds_max=1)
    watching = asyncio.create_task(load.watch())
    await asyncio.sleep(0)
    try:
        for turn in range(SAMPLES):
            assert not load.is_too_high, turn
            time.sleep(SAMPLE_SECONDS + 0.08)  # noqa: ASYNC251 - the loop is to stand still
            for _ in range(4):  # timer, future, task: each takes a turn
                await asyncio.sleep(0)
        assert load.is_too_high
        await asyncio.sleep(4 * SAMPLE_SECONDS)
        assert not load.is_too_high
    finally:
        watching.cancel()


async def test_refusals_are_told_once_a_second_and_not_one_by_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def told() -> list[str]:
        return [record.getMessage() for record in caplog.records if record.name == "api.limits.load"]

    monkeypatch.setattr("api.limits.load.TELL_SECONDS", 0.2)
    load = Load(in_flight_max=0, lag_seconds_max=9, wait_seconds_max=1)
    watching = asyncio.create_task(load.watch())
    load.refused = 100
    for _ in range(200):
        if told():
            break
        await asyncio.sleep(SAMPLE_SECONDS)
    await asyncio.sleep(4 * SAMPLE_SECONDS)
    watching.cancel()
    assert told() == ["Overloaded: 100 requests refused, 0 in flight"]


async def test_so_many_begin_in_a_turn_and_the_others_in_the_next_ones_in_order() -> None:
    beginnings = Beginnings()
    begun: list[int] = []
    for n in range(3 * BEGINNINGS_A_TURN):
        beginnings.put(_noting(begun, n))
    for turns in (1, 2, 3, 3):
        assert begun == list(range(turns * BEGINNINGS_A_TURN))
        await asyncio.sleep(0)
    for n in range(BEGINNINGS_A_TURN):
        beginnings.put(_noting(begun, n))
    assert len(begun) == 4 * BEGINNINGS_A_TURN


async def test_refusing_many_leaves_most_of_the_time_to_others() -> None:
    refusals, refused, turns = Refusals(), [], 0

    def refuse(n: int) -> Callable[[], None]:
        def answer() -> None:
            time.sleep(0.001)
            refused.append(n)

        return answer

    for n in range(200):
        refusals.put(refuse(n))
    assert not refused
    while len(refused) < 200:
        time.sleep(0.005)  # noqa: ASYNC251 - what was let in has work to do in every turn
        await asyncio.sleep(0)
        turns += 1
    assert refused == list(range(200))
    # Of each turn of 5 ms a fifth, that is one or two; and up to 50 ms of them in the first.
    assert turns > 40


def _noting(begun: list[int], n: int) -> Callable[[], None]:
    return lambda: begun.append(n)

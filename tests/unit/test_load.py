"""When a process refuses requests: too many at once, or a loop that is late again and again."""

import asyncio
import time

from api.load import SAMPLE_SECONDS, SAMPLES, Load


def test_more_requests_in_flight_than_allowed_are_too_many() -> None:
    load = Load(in_flight_max=2, lag_seconds_max=1)
    load.in_flight = 2
    assert not load.is_too_high
    load.in_flight = 3
    assert load.is_too_high


async def test_one_long_turn_of_the_loop_is_no_overload_and_several_are_until_they_end() -> None:
    load = Load(in_flight_max=1, lag_seconds_max=0.05)
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

"""Group commit: batches, answers, room and failures of one lane."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import pytest

from api.desk.batcher import Answer, Lane
from domain.problems import Problem

Batches = list[list[int]]


@asynccontextmanager
async def running(lane: Lane[int, int]) -> AsyncIterator[None]:
    task = asyncio.create_task(lane.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


class Work:
    """Answers every item with its square, once the gate is open; keeps the batches it was given."""

    def __init__(self) -> None:
        self.batches: Batches = []
        self.gate = asyncio.Event()

    async def __call__(self, items: Sequence[int], answer: Answer[int]) -> None:
        self.batches.append(list(items))
        await self.gate.wait()
        answer([item * item for item in items])


def submit_all(lane: Lane[int, int], *submissions: Sequence[int]) -> list["asyncio.Task[Sequence[int | Exception]]"]:
    return [asyncio.create_task(lane.submit(items)) for items in submissions]


async def soon(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110  # there is nothing to be told by
            await asyncio.sleep(0)


async def test_what_arrives_meanwhile_is_the_next_batch_and_everyone_gets_their_own_answers() -> None:
    work = Work()
    lane: Lane[int, int] = Lane(work, batch_max=10, waiting_max=100)
    async with running(lane):
        first = submit_all(lane, [1])
        await soon(lambda: bool(work.batches))
        rest = submit_all(lane, [2, 3], [4], [5, 6])
        await asyncio.sleep(0)
        work.gate.set()
        assert await asyncio.gather(*first, *rest) == [[1], [4, 9], [16], [25, 36]]
    assert work.batches == [[1], [2, 3, 4, 5, 6]]


async def test_a_batch_takes_whole_submissions_up_to_its_maximum_and_always_one() -> None:
    work = Work()
    work.gate.set()
    lane: Lane[int, int] = Lane(work, batch_max=3, waiting_max=100)
    tasks = submit_all(lane, [1, 2], [3, 4], [5], [6, 7, 8, 9])
    await asyncio.sleep(0)
    async with running(lane):
        await asyncio.gather(*tasks)
    assert work.batches == [[1, 2], [3, 4, 5], [6, 7, 8, 9]]


async def test_who_finds_too_many_waiting_is_told_to_come_again() -> None:
    work = Work()
    lane: Lane[int, int] = Lane(work, batch_max=10, waiting_max=3)
    tasks = submit_all(lane, [1, 2, 3])
    await asyncio.sleep(0)
    with pytest.raises(Problem) as refused:
        await lane.submit([4])
    assert refused.value.code == "OVERLOADED"
    work.gate.set()
    async with running(lane):
        await asyncio.gather(*tasks)
        assert await lane.submit([4, 5, 6]) == [16, 25, 36]


async def test_a_failed_batch_fails_its_callers_and_nobody_else(caplog: pytest.LogCaptureFixture) -> None:
    async def work(items: Sequence[int], answer: Answer[int]) -> None:
        if 13 in items:
            raise ConnectionError("away")
        answer(items)

    lane: Lane[int, int] = Lane(work, batch_max=2, waiting_max=10)
    tasks = submit_all(lane, [1], [13], [2, 3])
    await asyncio.sleep(0)
    async with running(lane):
        results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(result) for result in results] == [ConnectionError, ConnectionError, list]
    assert "A batch of 2 failed" in caplog.text


async def test_a_failure_after_the_answer_does_not_take_it_back() -> None:
    async def work(items: Sequence[int], answer: Answer[int]) -> None:
        answer(items)
        raise ConnectionError("away")

    lane: Lane[int, int] = Lane(work, batch_max=2, waiting_max=10)
    async with running(lane):
        assert await lane.submit([1]) == [1]
        assert await lane.submit([2]) == [2]


async def test_a_caller_who_left_does_not_disturb_the_others() -> None:
    work = Work()
    lane: Lane[int, int] = Lane(work, batch_max=10, waiting_max=10)
    gone, staying = submit_all(lane, [1], [2])
    await asyncio.sleep(0)
    gone.cancel()
    work.gate.set()
    async with running(lane):
        assert await staying == [4]


async def test_handing_over_waits_for_room_and_weighs_what_is_handed_over() -> None:
    work = Work()
    lane: Lane[int, int] = Lane(work, batch_max=10, waiting_max=10)
    await lane.hand_over(1, 6)
    await lane.hand_over(2, 6)
    late = asyncio.create_task(lane.hand_over(3, 1))
    await asyncio.sleep(0.01)
    assert not late.done()
    work.gate.set()
    async with running(lane):
        await asyncio.wait_for(late, 10)
        await soon(lambda: len(work.batches) == 3 or work.batches == [[1], [2, 3]])
    assert [item for batch in work.batches for item in batch] == [1, 2, 3]
    assert work.batches[0] == [1]


async def test_who_would_wait_too_long_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.desk.batcher.WAIT_SECONDS_MAX", 0.05)
    work = Work()
    lane: Lane[int, int] = Lane(work, batch_max=1, waiting_max=100)
    async with running(lane):
        tasks = submit_all(lane, [1])
        await soon(lambda: bool(work.batches))
        await asyncio.sleep(0.1)  # The batch under way takes longer than anybody may wait.
        tasks += submit_all(lane, [2])
        await asyncio.sleep(0)
        with pytest.raises(Problem, match="OVERLOADED"):
            await lane.submit([3])
        work.gate.set()
        assert await asyncio.gather(*tasks) == [[1], [4]]
        assert await lane.submit([3]) == [9]
        await soon(lambda: lane.is_idle)

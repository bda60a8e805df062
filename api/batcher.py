"""Group commit: what arrives while a batch is under way becomes the next batch. A batch never waits for company.

Each lane runs one batch at a time and a user always has the same lane, so a user's orders reach the engine in the
order in which they were sent.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from domain.problems import Problem

log = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")
Answer = Callable[[Sequence[Result | Exception]], None]


@dataclass(slots=True)
class _Submission(Generic[Item, Result]):
    items: Sequence[Item]
    answer: asyncio.Future[Sequence[Result | Exception]] = field(default_factory=asyncio.Future)


class Lane(Generic[Item, Result]):
    """Runs `work(items, answer)` over ever new batches; `work` calls `answer` as soon as results are safe."""

    def __init__(
        self,
        work: Callable[[Sequence[Item], Answer[Result]], Awaitable[None]],
        *,
        batch_max: int,
        waiting_max: int,
    ) -> None:
        self._work = work
        self._batch_max = batch_max
        self._waiting_max = waiting_max
        self._waiting: deque[_Submission[Item, Result]] = deque()
        self._waiting_items = 0
        self._arrived = asyncio.Event()

    async def submit(self, items: Sequence[Item]) -> Sequence[Result | Exception]:
        """Results of `items`, in their order, which stay together. Raises Problem OVERLOADED when too many wait."""
        if self._waiting_items + len(items) > self._waiting_max:
            raise Problem("OVERLOADED", "Too many requests are waiting; try again shortly")
        submission: _Submission[Item, Result] = _Submission(items)
        self._waiting.append(submission)
        self._waiting_items += len(items)
        self._arrived.set()
        return await submission.answer

    async def run(self) -> None:
        """Work for ever; cancel to stop."""
        while True:
            await self._arrived.wait()
            submissions = self._take()
            try:
                await self._work([item for s in submissions for item in s.items], _answering(submissions))
            except Exception as error:  # whatever it was, these callers must hear of it and the next batch must run
                log.exception("A batch of %d failed", sum(len(s.items) for s in submissions))
                _fail(submissions, error)

    def _take(self) -> list[_Submission[Item, Result]]:
        taken: list[_Submission[Item, Result]] = []
        count = 0
        while self._waiting and (not taken or count + len(self._waiting[0].items) <= self._batch_max):
            taken.append(self._waiting.popleft())
            count += len(taken[-1].items)
        self._waiting_items -= count
        if not self._waiting:
            self._arrived.clear()
        return taken


def _answering(submissions: Sequence[_Submission[Item, Result]]) -> Answer[Result]:
    def answer(results: Sequence[Result | Exception]) -> None:
        start = 0
        for submission in submissions:
            end = start + len(submission.items)
            if not submission.answer.done():
                submission.answer.set_result(results[start:end])
            start = end

    return answer


def _fail(submissions: Sequence[_Submission[Item, Result]], error: Exception) -> None:
    for submission in submissions:
        if not submission.answer.done():
            submission.answer.set_exception(error)

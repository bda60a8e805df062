"""Group commit: what arrives while a batch is under way becomes the next batch. A batch never waits for company."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from domain.problems import Problem
from storage.waiting import end_if_cancelled
from telemetry.metrics import DESK_BATCH, DESK_SECONDS, DESK_WAITING

log = logging.getLogger(__name__)

WAIT_SECONDS_MAX = 2.5

Item = TypeVar("Item")
Result = TypeVar("Result")
Answer = Callable[[Sequence[Result | Exception]], None]


@dataclass(slots=True)
class _Submission(Generic[Item, Result]):
    items: Sequence[Item]
    weight: int
    answer: asyncio.Future[Sequence[Result | Exception]] = field(default_factory=asyncio.Future)


class Lane(Generic[Item, Result]):
    """Runs `work(items, answer)` over ever new batches; `work` calls `answer` as soon as results are safe.

    Submissions have a weight: a batch takes as many as fit in `batch_max` (always one), `waiting_max` may wait, and
    none that could expect to wait for longer than `WAIT_SECONDS_MAX`. `name` is that of its figures.
    """

    def __init__(
        self,
        work: Callable[[Sequence[Item], Answer[Result]], Awaitable[None]],
        *,
        batch_max: int,
        waiting_max: int,
        name: str = "",
    ) -> None:
        self._work = work
        self._batch_max = batch_max
        self._waiting_max = waiting_max
        self._waiting: deque[_Submission[Item, Result]] = deque()
        self._waiting_weight = 0
        self._arrived = asyncio.Event()
        self._has_room = asyncio.Event()
        self._has_room.set()
        self._waiting_figure = DESK_WAITING.labels(name)
        self._batch_figure = DESK_BATCH.labels(name)
        self._seconds_figure = DESK_SECONDS.labels(name)
        self._started: float | None = None
        self._batch_seconds = 0.0

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits or is worked on."""
        return self._started is None and not self._waiting

    def expected_wait(self, now: float) -> float:
        """Seconds until a submission of now would be worked on, if batches go on to take as long as the last one. The
        first to wait is never told to go: its batch shows how long one takes now."""
        if self._started is None or not self._waiting:
            return 0.0
        running = now - self._started
        each = max(self._batch_seconds, running)
        return each - running + each * (1 + self._waiting_weight // self._batch_max)

    async def submit(self, items: Sequence[Item]) -> Sequence[Result | Exception]:
        """Results of `items`, in their order, which stay together. Raises Problem OVERLOADED when too many wait."""
        too_many = self._waiting_weight + len(items) > self._waiting_max
        if too_many or self.expected_wait(time.monotonic()) > WAIT_SECONDS_MAX:
            raise Problem("OVERLOADED", "Too many requests are waiting; try again shortly")
        return await self._put(_Submission(items, len(items)))

    async def hand_over(self, item: Item, weight: int) -> None:
        """Leave one item of `weight` here, as soon as there is room; nobody waits for its result."""
        await self._has_room.wait()
        self._put(_Submission([item], weight)).add_done_callback(_heard)

    def _put(self, submission: _Submission[Item, Result]) -> "asyncio.Future[Sequence[Result | Exception]]":
        self._waiting.append(submission)
        self._weigh(submission.weight)
        self._arrived.set()
        return submission.answer

    def _weigh(self, change: int) -> None:
        self._waiting_weight += change
        self._waiting_figure.inc(change)
        if self._waiting_weight < self._waiting_max:
            self._has_room.set()
        else:
            self._has_room.clear()

    async def run(self) -> None:
        """Work for ever; cancel to stop."""
        while True:
            end_if_cancelled()
            await self._arrived.wait()
            submissions = self._take()
            self._started = time.monotonic()
            try:
                with self._seconds_figure.time():
                    await self._work([item for s in submissions for item in s.items], _answering(submissions))
            except Exception as error:  # whatever it was, these callers must hear of it and the next batch must run
                log.exception("A batch of %d failed", sum(s.weight for s in submissions))
                _fail(submissions, error)
            finally:
                self._batch_seconds = time.monotonic() - self._started
                self._started = None

    def _take(self) -> list[_Submission[Item, Result]]:
        taken: list[_Submission[Item, Result]] = []
        weight = 0
        while self._waiting and (not taken or weight + self._waiting[0].weight <= self._batch_max):
            taken.append(self._waiting.popleft())
            weight += taken[-1].weight
        self._weigh(-weight)
        self._batch_figure.observe(weight)
        if not self._waiting:
            self._arrived.clear()
        return taken


def _heard(answer: "asyncio.Future[Any]") -> None:
    """Take note of a failure that `run` has logged already."""
    if not answer.cancelled():
        answer.exception()


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

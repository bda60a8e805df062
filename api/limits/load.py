"""Whether this process has more to do than it can: then requests are refused while refusing is still quick.

Requests that were let in wait for each other: for as long as it takes to finish what is in flight (Little's law). So a
bound on the wait, times what is finished in a second, bounds what may be in flight, whatever the machine can do just
now. A burst that is worked off quickly is no overload: this bound holds only while requests do take long.

The event loop does everything in turns, and an order takes dozens of them. So what new requests may cost in a turn is
bounded too, those that are let in as well as those that are refused.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, MutableMapping
from typing import Any

log = logging.getLogger(__name__)

SAMPLE_SECONDS = 0.05
# A single long turn of the loop is over when it is noticed; several in a row are an overload.
SAMPLES = 3
# How far back it is looked for how long requests take.
WINDOW_SECONDS = 1.0
# So many at once are never too many, however slow: a batch needs company.
IN_FLIGHT_MIN = 100
TELL_SECONDS = 1.0
BEGINNINGS_A_TURN = 15
REFUSING_SHARE = 0.2
REFUSING_SECONDS_MIN, REFUSING_SECONDS_MAX = 0.001, 0.05
REFUSING_PAUSE_SECONDS = 0.002
_ADMITTED = "exchange.admitted"


class Beginnings:
    """Begins what may begin, so much in a turn of the loop; the rest in the next ones."""

    def __init__(self) -> None:
        self._waiting: deque[Callable[[], None]] = deque()
        self._room = BEGINNINGS_A_TURN
        self._is_due = False

    def put(self, begin: Callable[[], None]) -> None:
        """Call `begin` now, or soon, in turn."""
        if self._room:
            self._room -= 1
            begin()
        else:
            self._waiting.append(begin)
        if not self._is_due:
            self._is_due = True
            asyncio.get_running_loop().call_soon(self._next_turn)

    def _next_turn(self) -> None:
        self._room = BEGINNINGS_A_TURN
        self._is_due = bool(self._waiting)
        while self._waiting and self._room:
            self._room -= 1
            self._waiting.popleft()()
        if self._is_due:
            asyncio.get_running_loop().call_soon(self._next_turn)


class Refusals:
    """Answers those who are refused, in a bounded share of the loop's time.

    As long as a connection has no answer it asks nothing more. With its answer at once, many connections could ask
    again and again in every turn, and who was let in would wait for all of them.
    """

    def __init__(self) -> None:
        self._waiting: deque[Callable[[], None]] = deque()
        self._is_due = False
        self._ended = 0.0

    def put(self, answer: Callable[[], None]) -> None:
        """Call `answer` soon, in turn."""
        self._waiting.append(answer)
        if not self._is_due:
            self._is_due = True
            asyncio.get_running_loop().call_soon(self._work)

    def _work(self) -> None:
        now = time.perf_counter()
        until = now + min(max(REFUSING_SHARE * (now - self._ended), REFUSING_SECONDS_MIN), REFUSING_SECONDS_MAX)
        while self._waiting and now < until:
            self._waiting.popleft()()
            now = time.perf_counter()
        self._ended = now
        self._is_due = bool(self._waiting)
        if self._is_due:
            asyncio.get_running_loop().call_later(REFUSING_PAUSE_SECONDS, self._work)


class Load:
    """Requests in flight, how long they take, and how late the event loop is."""

    def __init__(self, in_flight_max: int, lag_seconds_max: float, wait_seconds_max: float) -> None:
        self.in_flight = 0
        self.in_flight_max = in_flight_max
        self.beginnings = Beginnings()
        self.refusals = Refusals()
        self._in_flight_bound = in_flight_max
        self._lag_seconds_max = lag_seconds_max
        self._wait_seconds_max = wait_seconds_max
        self._late = deque([0.0] * SAMPLES, SAMPLES)
        self._is_late = False
        # Of the sample under way: how many were finished, and the sum of the seconds they took.
        self._finished = 0
        self._taken = 0.0
        # The same of the samples of the last WINDOW_SECONDS, after the length of each.
        self._samples: deque[tuple[float, int, float]] = deque()
        # Since it was told last.
        self.refused = 0

    @property
    def is_too_high(self) -> bool:
        """Whether the next request should be refused."""
        bound = min(self._in_flight_bound, self.in_flight_max)
        return self._is_late or self.in_flight >= bound

    def admit(self, scope: MutableMapping[str, Any]) -> bool:
        """Count a request in, the first time it asks; whether it may go on. Give it back to `release`."""
        if _ADMITTED in scope:
            return True
        if self.is_too_high:
            return False
        scope[_ADMITTED] = time.monotonic()
        self.in_flight += 1
        return True

    def release(self, scope: MutableMapping[str, Any]) -> None:
        """The request is answered; nothing happens if it was not admitted."""
        admitted: float | None = scope.pop(_ADMITTED, None)
        if admitted is not None:
            self.in_flight -= 1
            self._finished += 1
            self._taken += time.monotonic() - admitted

    async def watch(self) -> None:
        """Measure until cancelled: a turn of the loop that takes long makes every request of it wait so long."""
        told = started = time.monotonic()
        while True:
            await asyncio.sleep(SAMPLE_SECONDS)
            now = time.monotonic()
            self.sample(now - started)
            started = now
            if self.refused and now - told >= TELL_SECONDS:
                # Not a line for each: they are many, and writing them is what there is no time for.
                log.warning("Overloaded: %d requests refused, %d in flight", self.refused, self.in_flight)
                self.refused, told = 0, now

    def sample(self, seconds: float) -> None:
        """Take stock of the last `seconds`."""
        self._late.append(seconds - SAMPLE_SECONDS)
        self._is_late = min(self._late) > self._lag_seconds_max
        self._samples.append((seconds, self._finished, self._taken))
        self._finished, self._taken = 0, 0.0
        known = sum(lasted for lasted, _, _ in self._samples)
        while known - self._samples[0][0] >= WINDOW_SECONDS:
            known -= self._samples.popleft()[0]
        finished = sum(count for _, count, _ in self._samples)
        taken = sum(sum_of_seconds for _, _, sum_of_seconds in self._samples)
        # Half of the bound: those who are let in take about as long as the bound says, which must not lift it.
        if taken > finished * self._wait_seconds_max / 2:
            self._in_flight_bound = max(IN_FLIGHT_MIN, int(finished / known * self._wait_seconds_max))
        elif finished or not self.in_flight:
            self._in_flight_bound = self.in_flight_max

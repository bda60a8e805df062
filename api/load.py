"""Whether this process has more to do than it can: then requests are refused while refusing is still quick."""

import asyncio
import time
from collections import deque

SAMPLE_SECONDS = 0.05
# A single long turn of the loop is over when it is noticed; several in a row are an overload.
SAMPLES = 3


class Load:
    """Requests in flight, and how late the event loop is."""

    def __init__(self, in_flight_max: int, lag_seconds_max: float) -> None:
        self.in_flight = 0
        self._late = deque([0.0] * SAMPLES, SAMPLES)
        self._in_flight_max = in_flight_max
        self._lag_seconds_max = lag_seconds_max

    @property
    def is_too_high(self) -> bool:
        """Whether the next request, counted in `in_flight` already, should be refused."""
        return self.in_flight > self._in_flight_max or min(self._late) > self._lag_seconds_max

    async def watch(self) -> None:
        """Measure until cancelled: a turn of the loop that takes long makes every request of it wait so long."""
        while True:
            started = time.monotonic()
            await asyncio.sleep(SAMPLE_SECONDS)
            self._late.append(time.monotonic() - started - SAMPLE_SECONDS)

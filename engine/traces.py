"""What the engine did with orders that are traced, told after the commit: the log itself knows nothing of traces."""

import asyncio
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from redis.asyncio import Redis
from redis.exceptions import RedisError

from domain.matching import Amend, AnyCommand, Cancel, New
from telemetry import tracing

log = logging.getLogger(__name__)

WAITING_MAX = 1000
REDIS_SECONDS_MAX = 5.0


@dataclass(frozen=True, slots=True)
class Matched:
    """One committed batch; times are Unix nanoseconds."""

    instrument_id: str
    order_ids: Sequence[int]
    commands: int
    start_ns: int
    end_ns: int


class MatchTraces:
    """Makes one span of each batch with traced orders, in the background; batches are dropped while too many wait."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._waiting: asyncio.Queue[Matched] = asyncio.Queue(WAITING_MAX)

    def offer(self, instrument_id: str, commands: Sequence[AnyCommand], seconds: float) -> None:
        """A batch has just been committed, after `seconds`."""
        order_ids = list(_order_ids(commands)) if tracing.is_on() else []
        if order_ids and not self._waiting.full():
            end_ns = time.time_ns()
            start_ns = end_ns - int(seconds * 1e9)
            self._waiting.put_nowait(Matched(instrument_id, order_ids, len(commands), start_ns, end_ns))

    async def run(self) -> None:
        """Tell until cancelled."""
        while True:
            batch = await self._waiting.get()
            try:
                async with asyncio.timeout(REDIS_SECONDS_MAX):
                    contexts = await tracing.noted(self._redis, batch.order_ids)
            except (RedisError, OSError) as error:
                log.warning("The traces of a batch are lost: %r", error)
                continue
            if contexts:
                attributes: dict[str, str | int] = {
                    "exchange.instrument": batch.instrument_id,
                    "exchange.commands": batch.commands,
                }
                tracing.past_span("engine.match", contexts, attributes, batch.start_ns, batch.end_ns)


def _order_ids(commands: Sequence[AnyCommand]) -> Iterator[int]:
    """Under which ids the traces of these commands were left."""
    for command in commands:
        if isinstance(command, New | Cancel):
            yield command.order_id
        elif isinstance(command, Amend) and command.amendment_id:
            yield command.amendment_id

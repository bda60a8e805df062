"""Engine events to Redis subscribers: an at-most-once hint with the data in it. The log in Postgres is the truth."""

import asyncio
import logging

from redis.asyncio import Redis
from redis.exceptions import RedisError

from engine.log import Batch

log = logging.getLogger(__name__)

# Beyond this the newest batches are dropped: subscribers see the gap and read the log.
WAITING_MAX = 1000


def message(instrument_id: str, batch: Batch) -> bytes:
    """The batch as `{"instrumentId", "firstSeq", "lastSeq", "events"}`, its events' bytes as they are."""
    head = f'{{"instrumentId":"{instrument_id}","firstSeq":{batch.first_seq},"lastSeq":{batch.last_seq},"events":['
    return head.encode() + b",".join(batch.payloads) + b"]}"


class Publisher:
    """Publishes in the background and in order, so that Redis, slow or away, never holds up matching."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._waiting: asyncio.Queue[tuple[str, bytes]] = asyncio.Queue(WAITING_MAX)
        self._down = False

    def offer(self, instrument_id: str, batch: Batch) -> None:
        """Queue a committed batch for channel `engine:{instrumentId}`."""
        if not self._waiting.full():
            self._waiting.put_nowait((f"engine:{instrument_id}", message(instrument_id, batch)))

    async def run(self) -> None:
        """Publish until cancelled."""
        while True:
            channel, payload = await self._waiting.get()
            try:
                await self._redis.publish(channel, payload)
            except (RedisError, OSError) as error:
                self._report(error)
            else:
                self._report(None)

    def _report(self, error: Exception | None) -> None:
        """Log the begin and the end of an outage, not every batch of it."""
        if error is not None and not self._down:
            log.warning("Redis is away, market data comes from the log meanwhile: %s", error)
        elif error is None and self._down:
            log.info("Redis is back")
        self._down = error is not None

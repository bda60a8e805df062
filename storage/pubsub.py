"""One Redis subscriber connection with many channels, which comes back after every outage."""

import logging
from collections.abc import Callable, Iterable

from redis.asyncio import Redis
from redis.asyncio.client import PubSub
from redis.exceptions import RedisError

from storage.waiting import end_if_cancelled, pause

log = logging.getLogger(__name__)

RECONNECT_SECONDS = 0.2
POLL_SECONDS = 5.0


class Subscriber:
    """Calls `on_message(channel, payload)` for every message of its channels, in order.

    `on_subscribed(channel)` is called when the server confirmed a channel, also again after each reconnect:
    whatever was published before that may have been missed.
    """

    def __init__(
        self,
        redis: Redis,
        channels: Iterable[str],
        on_message: Callable[[str, bytes], None],
        on_subscribed: Callable[[str], None] = lambda _: None,
        *,
        patterns: Iterable[str] = (),
    ) -> None:
        self._redis = redis
        self._channels = tuple(channels)
        self._patterns = tuple(patterns)
        self._on_message = on_message
        self._on_subscribed = on_subscribed

    async def run(self) -> None:
        """Serve until cancelled."""
        while True:
            pubsub = self._redis.pubsub()
            try:
                await pubsub.subscribe(*self._channels)
                if self._patterns:
                    await pubsub.psubscribe(*self._patterns)
                await self._read(pubsub)
            except (RedisError, OSError) as error:
                log.warning("Redis subscriptions are interrupted: %s", error)
            finally:
                await pubsub.aclose()  # type: ignore[no-untyped-call]  # redis ships no annotation for it
            await pause(RECONNECT_SECONDS)

    async def _read(self, pubsub: PubSub) -> None:
        while True:
            end_if_cancelled()
            message = await pubsub.get_message(timeout=POLL_SECONDS)
            if message is None:
                continue
            if message["type"] in ("message", "pmessage"):
                self._on_message(message["channel"].decode(), message["data"])
            elif message["type"] == "subscribe":
                self._on_subscribed(message["channel"].decode())

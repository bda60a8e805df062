"""Sends what changed to Redis: at once when quiet, conflated to a bounded rate when busy."""

import asyncio
import logging
import time
from collections.abc import Collection

from redis.asyncio import Redis
from redis.exceptions import RedisError

from market.instrument_market import InstrumentMarket, Publication
from storage.waiting import pause
from telemetry.metrics import MARKET_PUBLICATIONS

log = logging.getLogger(__name__)

# At most twenty messages a second per channel and instrument.
FLUSH_SECONDS = 0.05
REDIS_SECONDS_MAX = 5.0


async def publish_changes(redis: Redis, markets: Collection[InstrumentMarket], changed: asyncio.Event) -> None:
    """Publish after every `changed`, until cancelled. An outage breaks the chains and is tried again."""
    while True:
        await changed.wait()
        changed.clear()
        try:
            async with asyncio.timeout(REDIS_SECONDS_MAX):
                await publish(redis, markets)
            MARKET_PUBLICATIONS.labels("ok").inc()
        except (RedisError, OSError) as error:
            MARKET_PUBLICATIONS.labels("failed").inc()
            log.warning("Market data could not be published: %r", error)
            for market in markets:
                market.break_chains()
            changed.set()
        await pause(FLUSH_SECONDS)


async def publish(redis: Redis, markets: Collection[InstrumentMarket]) -> None:
    """Send what changed. A snapshot and the update that leads to it become visible together."""
    now_ms = time.time_ns() // 1_000_000
    publications = [market.take_publication(now_ms) for market in markets]
    async with redis.pipeline(transaction=True) as pipe:
        for publication in publications:
            _queue(pipe, publication)
        await pipe.execute()


def _queue(pipe: Redis, publication: Publication) -> None:
    for key, value in publication.keys.items():
        pipe.set(key, value)
    for channel, message in publication.messages:
        pipe.publish(channel, message)

"""What feeds the sockets of one api process: one Redis subscriber and one stream reader for all of them."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from redis.asyncio import Redis

from activities.identity.sessions import REVOKED_CHANNEL
from activities.matching.instruments import read_instruments
from api.identity.sessions import SessionGuard
from api.identity.signatures import ApiKeys
from api.sockets.market_feed import MarketFeed
from api.sockets.user_feed import UserFeed
from storage.db import Pool
from storage.pubsub import Subscriber


@dataclass(frozen=True)
class Feeds:
    """Public and private messages, and how many sockets of this process each address has open."""

    market: MarketFeed
    user: UserFeed
    sockets: Counter[str]


@asynccontextmanager
async def open_feeds(pool: Pool, redis: Redis, sessions: SessionGuard, keys: ApiKeys) -> AsyncIterator[Feeds]:
    """Feeds that run until the block is left. Instruments are read once: a new one needs a restart."""
    market = MarketFeed(redis, await read_instruments(pool))
    user = UserFeed(redis, sessions, keys)

    def on_message(channel: str, payload: bytes) -> None:
        if channel == REVOKED_CHANNEL:
            keys.forget(payload.decode())
            user.on_revoked(payload.decode())
        else:
            market.on_message(channel, payload)

    def on_subscribed(channel: str) -> None:
        if channel == REVOKED_CHANNEL:
            keys.forget_all()
            user.doubt_all()
        else:
            market.on_subscribed(channel)

    subscriber = Subscriber(redis, [REVOKED_CHANNEL, *market.redis_channels], on_message, on_subscribed)
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(task) for task in (subscriber.run(), user.follow_stream(), user.settle_doubts())]
        try:
            yield Feeds(market, user, Counter())
        finally:
            for task in tasks:
                task.cancel()
            await market.close()

"""A subscription of the market feed never skips and never repeats an update, in whatever order things arrive."""

import asyncio
from collections.abc import AsyncIterator
from typing import cast

import msgspec
import pytest
from redis.asyncio import Redis
from starlette.websockets import WebSocket

from api.sockets.client import SocketClient
from api.sockets.market_feed import MarketFeed
from tests.integration.market_app import BTC, eventually

TOPIC, SNAPSHOT_KEY = f"ws:depth:{BTC}", f"market:depth:{BTC}"


class Recorder(SocketClient):
    """Keeps what it is offered."""

    def __init__(self) -> None:
        super().__init__(cast(WebSocket, None), 100)
        self.received: list[tuple[str, int]] = []

    def offer(self, payload: bytes, source: object = None) -> None:
        decoded = msgspec.json.decode(payload)
        self.received.append((decoded["type"], decoded["seq"]))

    async def has(self, count: int) -> None:
        """Wait for `count` messages."""

        async def enough() -> bool:
            return len(self.received) >= count

        await eventually(enough)


def message(kind: str, previous: int, seq: int) -> bytes:
    return msgspec.json.encode({"type": kind, "prevSeq": previous, "seq": seq})


async def keep_snapshot(redis: Redis, seq: int) -> None:
    await redis.set(SNAPSHOT_KEY, message("snapshot", seq, seq))


@pytest.fixture
async def feed(redis: Redis) -> AsyncIterator[MarketFeed]:
    await keep_snapshot(redis, 5)
    feed = MarketFeed(redis, [BTC])
    feed.on_subscribed(TOPIC)
    yield feed
    await feed.close()


async def subscribed(feed: MarketFeed) -> Recorder:
    client = Recorder()
    feed.subscribe(client, "depth", BTC)
    await client.has(1)
    return client


async def test_a_gap_right_after_the_snapshot_gives_a_new_snapshot(feed: MarketFeed, redis: Redis) -> None:
    client = await subscribed(feed)
    await keep_snapshot(redis, 9)
    feed.on_message(TOPIC, message("update", 9, 9))
    await client.has(3)
    assert client.received == [("snapshot", 5), ("snapshot", 9), ("update", 9)]


async def test_a_gap_between_two_updates_gives_a_new_snapshot(feed: MarketFeed, redis: Redis) -> None:
    client = await subscribed(feed)
    feed.on_message(TOPIC, message("update", 5, 6))
    await keep_snapshot(redis, 9)
    feed.on_message(TOPIC, message("update", 8, 9))
    await client.has(3)
    feed.on_message(TOPIC, message("update", 9, 10))
    assert client.received == [("snapshot", 5), ("update", 6), ("snapshot", 9), ("update", 10)]


async def test_updates_older_than_the_snapshot_are_skipped(feed: MarketFeed) -> None:
    client = await subscribed(feed)
    for previous, seq in ((3, 4), (4, 5), (5, 6)):
        feed.on_message(TOPIC, message("update", previous, seq))
    assert client.received == [("snapshot", 5), ("update", 6)]


async def test_updates_that_arrive_while_the_snapshot_is_read_follow_it(feed: MarketFeed) -> None:
    client = Recorder()
    feed.subscribe(client, "depth", BTC)
    for previous, seq in ((4, 5), (5, 6), (6, 8)):
        feed.on_message(TOPIC, message("update", previous, seq))
    assert client.received == []
    await client.has(3)
    assert client.received == [("snapshot", 5), ("update", 6), ("update", 8)]


async def test_an_update_that_is_sent_twice_is_passed_on_once(feed: MarketFeed) -> None:
    client = await subscribed(feed)
    for _ in range(2):
        feed.on_message(TOPIC, message("update", 5, 6))
    assert client.received == [("snapshot", 5), ("update", 6)]


async def test_many_subscriptions_share_the_reading_of_the_snapshot(feed: MarketFeed, redis: Redis) -> None:
    await redis.config_resetstat()
    clients = [Recorder() for _ in range(50)]
    for client in clients:
        feed.subscribe(client, "depth", BTC)
    for client in clients:
        await client.has(1)
    assert all(client.received == [("snapshot", 5)] for client in clients)
    assert (await redis.info("commandstats"))["cmdstat_get"]["calls"] == 1


async def test_a_snapshot_is_waited_for_until_there_is_one(feed: MarketFeed, redis: Redis) -> None:
    await redis.delete(SNAPSHOT_KEY)
    client = Recorder()
    feed.subscribe(client, "depth", BTC)
    await asyncio.sleep(0.1)
    assert client.received == []
    await keep_snapshot(redis, 7)
    await client.has(1)
    assert client.received == [("snapshot", 7)]

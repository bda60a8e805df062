"""Public market data to the sockets of this process: one Redis subscriber, fan-out in memory.

A subscription gets the snapshot kept in Redis, then the updates that follow on it: `prevSeq` is where it stands.
The last updates are kept, so that those which arrive while the snapshot is fetched are not lost. When the chain of
updates breaks (Redis or the market process was away), every subscription gets a new snapshot.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import cast

import msgspec
from redis.asyncio import Redis
from redis.exceptions import RedisError

from api.sockets.client import SocketClient
from domain.problems import Problem
from storage.market_keys import CHANNELS, KLINE_CHANNELS, snapshot_key, update_channel

log = logging.getLogger(__name__)

RECENT_UPDATES = 256
SUBSCRIPTIONS_MAX = 50
RETRY_SECONDS = 0.2
READ_SECONDS_MAX = 5.0
# A state makes the ones before it obsolete; a trade does not.
_STATE_CHANNELS = frozenset({"depth", "tickers", *KLINE_CHANNELS})


class _Position(msgspec.Struct, rename="camel"):
    seq: int
    prev_seq: int


_decode_position = msgspec.json.Decoder(_Position).decode


@dataclass(frozen=True, slots=True)
class _Update:
    previous: int
    seq: int
    payload: bytes


class _Subscription:
    """One client on one topic; `seq` is where it stands, None while it waits for a snapshot."""

    def __init__(self, client: SocketClient, topic: "_Topic") -> None:
        self.seq: int | None = None
        self.is_skipped = False
        self._client = client
        self._topic = topic

    def send(self, payload: bytes, seq: int) -> None:
        self.seq = seq
        self._client.offer(payload, self if self._topic.channel in _STATE_CHANNELS else None)

    def skipped(self) -> None:
        self.seq = None
        self.is_skipped = True

    def resume(self) -> None:
        self.is_skipped = False
        self._topic.send_snapshots()


class _Topic:
    """One channel of one instrument: its subscriptions and its latest updates."""

    def __init__(self, redis: Redis, channel: str, instrument_id: str) -> None:
        self.channel = channel
        self.subscriptions: dict[SocketClient, _Subscription] = {}
        self._redis = redis
        self._key = snapshot_key(channel, instrument_id)
        self._updates: deque[_Update] = deque(maxlen=RECENT_UPDATES)
        self._is_live = False
        self._sending: asyncio.Task[None] | None = None

    def on_subscribed(self) -> None:
        """Updates come from now on; some may have been missed."""
        self._is_live = True
        self._restart()

    def on_update(self, payload: bytes) -> None:
        position = _decode_position(payload)
        update = _Update(position.prev_seq, position.seq, payload)
        last = self._updates[-1].seq if self._updates else update.previous
        if update.previous != last:
            if update.seq == last:
                return  # Sent twice by a client library that lost the first answer.
            self._restart()
        self._updates.append(update)
        for subscription in self.subscriptions.values():
            self._forward(subscription, update)

    def send_snapshots(self) -> None:
        """Give a snapshot to the subscriptions that wait for one, as soon as Redis has it."""
        if self._is_live and self._sending is None:
            self._sending = asyncio.create_task(self._send_snapshots())

    async def close(self) -> None:
        if self._sending is not None:
            self._sending.cancel()
            await asyncio.gather(self._sending, return_exceptions=True)

    def _restart(self) -> None:
        self._updates.clear()
        for subscription in self.subscriptions.values():
            subscription.seq = None
        self.send_snapshots()

    def _forward(self, subscription: _Subscription, update: _Update) -> None:
        if subscription.seq is None or update.previous < subscription.seq:
            return
        if update.previous == subscription.seq:
            subscription.send(update.payload, update.seq)
        else:
            subscription.seq = None
            self.send_snapshots()

    async def _send_snapshots(self) -> None:
        try:
            while self._waiting():
                snapshot = await self._fetch_snapshot()
                if snapshot is None or not self._leads_to_updates(snapshot.seq):
                    await asyncio.sleep(RETRY_SECONDS)
                    continue
                for subscription in self._waiting():
                    subscription.send(snapshot.payload, snapshot.seq)
                    for update in list(self._updates):
                        self._forward(subscription, update)
        finally:
            self._sending = None

    def _waiting(self) -> list[_Subscription]:
        return [s for s in self.subscriptions.values() if s.seq is None and not s.is_skipped]

    def _leads_to_updates(self, seq: int) -> bool:
        """Whether the kept updates go on from a snapshot at `seq` without a hole."""
        last = self._updates[-1].seq if self._updates else seq
        return seq >= last or any(update.previous == seq for update in self._updates)

    async def _fetch_snapshot(self) -> _Update | None:
        try:
            async with asyncio.timeout(READ_SECONDS_MAX):
                payload = cast(bytes | None, await self._redis.get(self._key))
        except (RedisError, OSError) as error:
            log.warning("%s cannot be read: %r", self._key, error)
            return None
        if payload is None:
            return None
        position = _decode_position(payload)
        return _Update(position.prev_seq, position.seq, payload)


class MarketFeed:
    """All topics of this process. `watch(channel)` asks for the messages of a Redis channel."""

    def __init__(self, redis: Redis, instrument_ids: Iterable[str]) -> None:
        self._topics = {
            update_channel(channel, instrument_id): _Topic(redis, channel, instrument_id)
            for channel in (*CHANNELS, *KLINE_CHANNELS)
            for instrument_id in instrument_ids
        }

    @property
    def redis_channels(self) -> Collection[str]:
        """The Redis channels whose messages are to be given to `on_message`."""
        return self._topics.keys()

    def on_subscribed(self, redis_channel: str) -> None:
        """Redis confirmed a channel, for the first time or again."""
        self._topics[redis_channel].on_subscribed()

    def on_message(self, redis_channel: str, payload: bytes) -> None:
        """Pass an update on."""
        self._topics[redis_channel].on_update(payload)

    def subscribe(self, client: SocketClient, channel: str, instrument_id: str) -> None:
        """Send `client` a snapshot, then updates; also when it was subscribed before. Raises Problem."""
        topic = self._topic(channel, instrument_id)
        if client not in topic.subscriptions and self._subscriptions(client) >= SUBSCRIPTIONS_MAX:
            raise Problem("RATE_LIMITED", f"A connection may have {SUBSCRIPTIONS_MAX} subscriptions")
        topic.subscriptions[client] = _Subscription(client, topic)
        topic.send_snapshots()

    def unsubscribe(self, client: SocketClient, channel: str, instrument_id: str) -> None:
        """Send no more of this topic. Raises Problem for an unknown one."""
        self._topic(channel, instrument_id).subscriptions.pop(client, None)

    def leave(self, client: SocketClient) -> None:
        """Forget a client."""
        for topic in self._topics.values():
            topic.subscriptions.pop(client, None)

    async def close(self) -> None:
        """Stop sending snapshots."""
        for topic in self._topics.values():
            await topic.close()

    def _subscriptions(self, client: SocketClient) -> int:
        return sum(client in topic.subscriptions for topic in self._topics.values())

    def _topic(self, channel: str, instrument_id: str) -> _Topic:
        if channel not in CHANNELS and channel not in KLINE_CHANNELS:
            known = ", ".join((*CHANNELS, "kline"))
            raise Problem("VALIDATION_FAILED", f"Expected a channel out of {known}, was {channel!r}")
        topic = self._topics.get(update_channel(channel, instrument_id))
        if topic is None:
            raise Problem("INSTRUMENT_NOT_FOUND", f"There is no instrument {instrument_id!r}")
        return topic

"""Private messages to the sockets of this process, from the stream that the outbox relay fills."""

import asyncio
import logging
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import chain, islice
from typing import cast

import msgspec
from redis.asyncio import Redis
from redis.exceptions import RedisError

from api.identity.sessions import SessionGuard
from api.identity.signatures import ApiKeys
from api.sockets.client import UNAUTHENTICATED_CLOSE, SocketClient
from domain.events import USER_PUSH_TOPIC
from domain.identity import Identity
from domain.problems import Problem
from storage.db import OUTAGES
from storage.waiting import pause, wait_for_event

log = logging.getLogger(__name__)

READ_ENTRIES_MAX = 1000
READ_BLOCK_MS = 1000
READ_SECONDS_MAX = 10.0
RETRY_SECONDS = 0.5
# The relay repeats entries only right after a crash, so that a short memory of ids tells repeats.
SEEN_IDS_MAX = 10_000
RECHECK_SECONDS = 60.0
CHECKED_AT_ONCE_MAX = 500


# What the client library returns per entry: its id in the stream and its fields.
_Entries = list[tuple[bytes, dict[bytes, bytes]]]


class _Push(msgspec.Struct, rename="camel"):
    user_id: int
    channel: str
    data: msgspec.Raw


_decode_pushes = msgspec.json.Decoder(list[_Push]).decode


class UserFeed:
    """Reads the stream once for all sockets, and only while there are any; closes those whose session or key ended."""

    def __init__(self, redis: Redis, sessions: SessionGuard, keys: ApiKeys) -> None:
        self._redis = redis
        self._sessions = sessions
        self._keys = keys
        self._clients: dict[int, dict[SocketClient, Identity]] = {}
        self._seen: dict[bytes, None] = {}
        self._position: bytes | None = None
        self._occupied = asyncio.Event()
        self._positioned = asyncio.Event()
        # Sockets whose session or key may have ended.
        self._doubtful: dict[SocketClient, Identity] = {}
        self._doubt = asyncio.Event()

    async def join(self, client: SocketClient, identity: Identity) -> None:
        """Send `client` what is pushed to its user after this returns. Raises Problem UNAUTHENTICATED."""
        self._clients.setdefault(identity.user_id, {})[client] = identity
        self._occupied.set()
        await self._positioned.wait()
        # Asked again: a revocation between the first answer and joining went unheard.
        await self._require_good(identity, datetime.now(UTC))

    def leave(self, client: SocketClient, identity: Identity) -> None:
        """Forget a client."""
        clients = self._clients.get(identity.user_id, {})
        clients.pop(client, None)
        if not clients:
            self._clients.pop(identity.user_id, None)
        if not self._clients:
            self._occupied.clear()

    def on_revoked(self, name: str) -> None:
        """Close the sockets of a session that has ended; look at those of an API key, which has changed in some way."""
        for client, identity in self._open_sockets():
            if identity.session_id == name:
                client.close(UNAUTHENTICATED_CLOSE, "The session was revoked")
            elif identity.key_id == name:
                self._doubtful[client] = identity
                self._doubt.set()

    def doubt_all(self) -> None:
        """Revocations may have been missed: look at every socket soon."""
        self._doubtful.update(self._open_sockets())
        self._doubt.set()

    async def follow_stream(self) -> None:
        """Dispatch until cancelled; a Redis outage delays."""
        while True:
            await self._occupied.wait()
            try:
                await self._read_while_occupied()
            except (RedisError, OSError) as error:
                log.warning("User messages are delayed: %s", error)
                await pause(RETRY_SECONDS)

    async def settle_doubts(self) -> None:
        """Close the sockets of sessions and keys that ended, until cancelled: after every doubt and once a minute."""
        while True:
            if not await wait_for_event(self._doubt, RECHECK_SECONDS):
                self.doubt_all()
            self._doubt.clear()
            try:
                while self._doubtful:
                    await self._settle_some(datetime.now(UTC))
            except (RedisError, *OUTAGES) as error:
                log.warning("Sessions and keys of open sockets cannot be checked: %s", error)
                await pause(RETRY_SECONDS)
                self._doubt.set()

    async def _read_while_occupied(self) -> None:
        if self._position is None:
            newest = cast(_Entries, await self._redis.xrevrange(USER_PUSH_TOPIC, count=1))
            self._position = newest[0][0] if newest else b"0-0"
        self._positioned.set()
        while self._occupied.is_set():
            for stream_id, fields in await self._read_after(self._position):
                self._dispatch(fields)
                self._position = stream_id
        self._positioned.clear()
        self._position = None

    async def _read_after(self, position: bytes) -> _Entries:
        async with asyncio.timeout(READ_SECONDS_MAX):
            reply = await self._redis.xread({USER_PUSH_TOPIC: position}, READ_ENTRIES_MAX, READ_BLOCK_MS)
        return [entry for _, entries in cast(list[tuple[bytes, _Entries]], reply) for entry in entries]

    def _dispatch(self, fields: dict[bytes, bytes]) -> None:
        if self._is_repeat(fields[b"id"]):
            return
        for push in _decode_pushes(fields[b"data"]):
            clients = self._clients.get(push.user_id)
            if clients:
                message = user_message(push.channel, bytes(push.data))
                for client in clients:
                    client.offer(message)

    def _is_repeat(self, message_id: bytes) -> bool:
        if message_id in self._seen:
            return True
        self._seen[message_id] = None
        if len(self._seen) > SEEN_IDS_MAX:
            del self._seen[next(iter(self._seen))]
        return False

    def _open_sockets(self) -> Iterator[tuple[SocketClient, Identity]]:
        return chain.from_iterable(clients.items() for clients in self._clients.values())

    async def _settle_some(self, now: datetime) -> None:
        # Sessions that are asked for together cost one look into Redis.
        some = list(islice(self._doubtful.items(), CHECKED_AT_ONCE_MAX))
        for client, _ in some:
            del self._doubtful[client]
        answers = await asyncio.gather(
            *(self._require_good(identity, now) for _, identity in some), return_exceptions=True
        )
        for (client, identity), answer in zip(some, answers, strict=True):
            if isinstance(answer, Problem):
                client.close(UNAUTHENTICATED_CLOSE, answer.detail)
            elif answer is not None:
                self._doubtful[client] = identity
        failures = [answer for answer in answers if answer is not None and not isinstance(answer, Problem)]
        if failures:
            raise failures[0]

    async def _require_good(self, identity: Identity, now: datetime) -> None:
        if identity.key_id:
            await self._keys.require(identity.key_id)
        else:
            await self._sessions.require(identity.session_id, now)


def user_message(channel: str, data: bytes) -> bytes:
    """A message of `/ws/user`; `data` is JSON."""
    return b'{"channel":"%b","data":%b}' % (channel.encode(), data)

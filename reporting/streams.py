"""The event streams as the read model sees them: how far each goes, what it has lost, and the entries of our group."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from redis.asyncio import Redis

from reporting.counting import TOPICS, Entry
from storage.streams import read_info

GROUP = "reporting"
# One process reads at a time, so that all may have one name: who takes over takes over everything.
CONSUMER = "worker"
READ_ENTRIES_MAX = 1_000
READ_BLOCK_MS = 1_000
REDIS_TIMEOUT_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Position:
    """An entry of a stream and how many there have been up to it, since the stream began."""

    entry_id: str = "0-0"
    entries: int = 0


@dataclass(frozen=True, slots=True)
class Stream:
    """Where a stream ends, and how many of its first entries are gone."""

    end: Position
    trimmed: int


def gap(position: Position, stream: Stream) -> str | None:
    """Why what follows `position` cannot all be read any more; None when it can."""
    if order(stream.end.entry_id) < order(position.entry_id) or stream.end.entries < position.entries:
        return f"it ends at {stream.end}, before our {position}: entries were lost"
    if stream.trimmed > position.entries:
        return f"{stream.trimmed - position.entries} entries after our {position} were trimmed"
    return None


def order(entry_id: str) -> tuple[int, int]:
    """What ids of entries are compared by."""
    milliseconds, _, number = entry_id.partition("-")
    return int(milliseconds), int(number)


async def read_streams(redis: Redis) -> dict[str, Stream]:
    """Every topic's stream as it is; one that does not exist yet is empty."""
    async with asyncio.timeout(REDIS_TIMEOUT_SECONDS):
        return {topic: await _read_stream(redis, topic) for topic in TOPICS}


async def _read_stream(redis: Redis, topic: str) -> Stream:
    info = await read_info(redis, topic)
    if info is None:
        return Stream(Position(), 0)
    added = int(info["entries-added"])
    return Stream(Position(info["last-generated-id"].decode(), added), added - int(info["length"]))


async def place_group(redis: Redis, positions: Mapping[str, Position]) -> None:
    """Make the group anew, so that it goes on after `positions`, whatever was read or acknowledged before."""
    async with asyncio.timeout(REDIS_TIMEOUT_SECONDS):
        for topic, position in positions.items():
            # The stream has to be there to have a group.
            if await redis.exists(topic):
                await redis.xgroup_destroy(topic, GROUP)
            await redis.xgroup_create(topic, GROUP, id=position.entry_id, mkstream=True, entries_read=position.entries)


async def read_entries(redis: Redis) -> list[Entry]:
    """The next entries of all topics, each topic's in its order; none after READ_BLOCK_MS without any."""
    async with asyncio.timeout(REDIS_TIMEOUT_SECONDS):
        reply = await redis.xreadgroup(GROUP, CONSUMER, dict.fromkeys(TOPICS, ">"), READ_ENTRIES_MAX, READ_BLOCK_MS)
    found = cast(list[tuple[bytes, list[tuple[bytes, dict[bytes, bytes]]]]], reply)
    return [
        _entry(topic.decode(), entry_id.decode(), fields) for topic, entries in found for entry_id, fields in entries
    ]


def _entry(topic: str, entry_id: str, fields: Mapping[bytes, bytes]) -> Entry:
    message_id, _, line = fields[b"id"].decode().partition("-")
    return Entry(
        topic,
        entry_id,
        int(message_id),
        int(line),
        fields[b"time"].decode(),
        fields[b"version"].decode(),
        fields[b"data"],
    )


async def acknowledge(redis: Redis, entries: list[Entry]) -> None:
    """Tell the group that `entries` are counted."""
    async with asyncio.timeout(REDIS_TIMEOUT_SECONDS):
        for topic in TOPICS:
            if ids := [entry.entry_id for entry in entries if entry.topic == topic]:
                await redis.xack(topic, GROUP, *ids)

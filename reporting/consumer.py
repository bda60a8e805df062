"""Follows the event streams and adds what they bring to the read model, each event once.

The position in each stream is stored in the transaction of what it counts, so that a crash between reading and
acknowledging, or between committing and acknowledging, repeats nothing and loses nothing. An event that the relay sends
a second time is known by its id. When entries are gone that were not counted, or cannot be read, the tables are read.
"""

import asyncio
import logging
from collections.abc import Sequence

from redis.asyncio import Redis
from redis.exceptions import RedisError

from reporting.build import WRITER_LOCK, Build, read_build, read_positions, rebuild
from reporting.counting import Entry, UnreadableEventError, count
from reporting.streams import acknowledge, gap, order, place_group, read_entries, read_streams
from storage.db import Connection, Pool, columns
from storage.leadership import REPORTING_LOCK, run_as_leader
from storage.outbox import oldest_message
from storage.waiting import pause
from telemetry.alerts import STREAM_GAP, alert

log = logging.getLogger(__name__)

# Entries gather meanwhile: one transaction for many.
PAUSE_SECONDS = 0.25
RETRY_SECONDS = 1.0
# Before the tables are read because of an event that cannot be: others like it may follow.
UNREADABLE_PAUSE_SECONDS = 10.0
FORGET_SECONDS = 600.0

# First whatever is not from before the build, then what was not counted before.
_CLAIM = """
    INSERT INTO reporting.applied_events (message_id, line)
    SELECT * FROM unnest($1::bigint[], $2::int[]) AS n (message_id, line) WHERE message_id > $3
    ON CONFLICT DO NOTHING RETURNING message_id, line
"""
_MOVE_ON = """
    UPDATE reporting.stream_positions p SET entry_id = n.entry_id, entries = p.entries + n.entries
    FROM unnest($1::text[], $2::text[], $3::bigint[]) AS n (topic, entry_id, entries) WHERE p.topic = n.topic
"""
# The relay repeats what it has not deleted from the outbox yet, and nothing else.
_FORGET = """
    DELETE FROM reporting.applied_events
    WHERE applied_at < now() - interval '1 day' AND ($1::bigint IS NULL OR message_id < $1)
"""


class OvertakenError(Exception):
    """The read model is being made anew, or has been: where to go on has to be read again."""


async def run_reporting(pool: Pool, redis: Redis, stop: asyncio.Event) -> None:
    """Keep the read model up to date until `stop`, while this process leads. Takes one connection of `pool`."""

    async def work(conn: Connection) -> None:
        while True:
            await _follow_safely(conn, redis)

    await run_as_leader(pool, REPORTING_LOCK, stop, work)


async def _follow_safely(conn: Connection, redis: Redis) -> None:
    """Follow the streams until something has to begin again; an outage of Redis is waited out."""
    try:
        await _follow(conn, redis)
    except OvertakenError:
        await pause(RETRY_SECONDS)
    except UnreadableEventError as error:
        log.error("An event cannot be counted, the reports will be made from the tables: %s", error)
        await pause(UNREADABLE_PAUSE_SECONDS)
        await rebuild(conn, redis)
    except (RedisError, OSError) as error:
        log.warning("Event streams cannot be read: %r", error)
        await pause(RETRY_SECONDS)


async def _follow(conn: Connection, redis: Redis) -> None:
    build = await read_build(conn)
    if build is None:
        build = await rebuild(conn, redis)
    if await _has_gap(conn, redis):
        return
    await place_group(redis, await read_positions(conn))
    forget_at = 0.0
    while not await _has_gap(conn, redis):
        if entries := await read_entries(redis):
            await apply(conn, build, entries)
            await acknowledge(redis, entries)
        now = asyncio.get_running_loop().time()
        if now >= forget_at:
            await conn.execute(_FORGET, await oldest_message(conn))
            forget_at = now + FORGET_SECONDS
        await pause(PAUSE_SECONDS)


async def _has_gap(conn: Connection, redis: Redis) -> bool:
    """Whether entries were missing, and the read model has been made from the tables instead."""
    positions, streams = await read_positions(conn), await read_streams(redis)
    gaps = {topic: why for topic, at in positions.items() if (why := gap(at, streams[topic])) is not None}
    if gaps:
        alert(STREAM_GAP, "the event streams have gaps, the reports are made from the tables: %s", gaps)
        await rebuild(conn, redis)
    return bool(gaps)


async def apply(conn: Connection, build: Build, entries: Sequence[Entry]) -> None:
    """Count those of `entries` that are new and store the positions after all of them, in one transaction.

    Raises OvertakenError when `build` is no longer in force, UnreadableEventError.
    """
    async with conn.transaction():
        # Not waited for: making everything anew takes longer than a statement may.
        if not await conn.fetchval("SELECT pg_try_advisory_xact_lock($1)", WRITER_LOCK):
            raise OvertakenError
        if await read_build(conn) != build:
            raise OvertakenError
        positions = await read_positions(conn)
        ahead = [e for e in entries if order(e.entry_id) > order(positions[e.topic].entry_id)]
        await count(conn, await _claim(conn, build, ahead))
        last = {entry.topic: entry.entry_id for entry in ahead}
        moved = [(topic, last[topic], sum(entry.topic == topic for entry in ahead)) for topic in last]
        await conn.execute(_MOVE_ON, *columns(moved, 3))


async def _claim(conn: Connection, build: Build, entries: Sequence[Entry]) -> list[Entry]:
    """Those of `entries` that have never been counted, each once."""
    by_event = {(entry.message_id, entry.line): entry for entry in entries}
    rows = await conn.fetch(_CLAIM, *columns(list(by_event), 2), build.watermark)
    return [by_event[row["message_id"], row["line"]] for row in rows]

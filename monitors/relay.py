"""The outbox relay: committed messages to Redis Streams, in order, at least once.

A row is deleted after its entries are in the stream; a crash in between sends them again under the same ids
(`{message_id}-{line}`), by which consumers know them.
"""

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from datetime import UTC, datetime

import asyncpg
from redis.asyncio import Redis
from redis.commands.core import AsyncScript
from redis.exceptions import RedisError

from domain.clock import iso
from domain.events import SCHEMA_VERSION, USER_PUSH_TOPIC
from storage.db import Connection, Pool
from storage.leadership import RELAY_LOCK, run_as_leader
from storage.outbox import CHANNEL
from storage.waiting import pause, wait_for_event
from telemetry.metrics import RELAY_SECONDS, RELAYED_ROWS

log = logging.getLogger(__name__)

BATCH_ROWS_MAX = 200
# A script call blocks the server: at most about this much payload in one, unless a single row is larger.
CALL_BYTES_MAX = 128 * 1024
STREAM_LENGTH = 100_000
# Entries with up to 50 pushes each, which only sockets that are open now want.
PUSH_STREAM_LENGTH = 2_000
POLL_SECONDS = 0.5
REDIS_TIMEOUT_SECONDS = 10.0
REDIS_RETRY_SECONDS = 0.5

_NEXT_ROWS = "SELECT message_id, topic, name, payload, created_at FROM outbox.messages ORDER BY message_id LIMIT $1"
_DELETE = "DELETE FROM outbox.messages WHERE message_id = ANY($1::bigint[])"

# KEYS[1] the topic; ARGV[1] stream length, ARGV[2] schema version, then per row its id, name, time and payload.
# Splitting the rows here costs a third of sending one XADD per line.
_ADD_ROWS = """
for i = 3, #ARGV, 4 do
  local line_number = 0
  for line in string.gmatch(ARGV[i + 3], '[^\\n]+') do
    redis.call('XADD', KEYS[1], 'MAXLEN', '~', ARGV[1], '*', 'id', ARGV[i] .. '-' .. line_number,
               'event', ARGV[i + 1], 'time', ARGV[i + 2], 'version', ARGV[2], 'data', line)
    line_number = line_number + 1
  end
end
"""


async def run_relay(pool: Pool, redis: Redis, stop: asyncio.Event) -> None:
    """Relay until `stop`, while this process leads. Takes one connection of `pool` for itself."""
    script = redis.register_script(_ADD_ROWS)

    async def relay(conn: Connection) -> None:
        await _relay(conn, script)

    await run_as_leader(pool, RELAY_LOCK, stop, relay)


async def _relay(conn: Connection, script: AsyncScript) -> None:
    """Move rows as they come. All on the connection that holds the lock: without it, nothing can be read or deleted."""
    written = asyncio.Event()

    def on_notify(*_: object) -> None:
        written.set()

    await conn.add_listener(CHANNEL, on_notify)
    try:
        while True:
            written.clear()
            if not await move_batch(conn, script):
                await wait_for_event(written, POLL_SECONDS)
    finally:
        # A lost connection was taken from us by the pool, and its listeners with it.
        with contextlib.suppress(asyncpg.InterfaceError):
            await conn.remove_listener(CHANNEL, on_notify)


async def move_batch(conn: Connection, script: AsyncScript) -> bool:
    """Send the oldest rows and delete them; False when there was none. A Redis outage is waited out."""
    rows = await conn.fetch(_NEXT_ROWS, BATCH_ROWS_MAX)
    if not rows:
        return False
    for topic, call in _calls(rows):
        await _add(script, topic, call)
    await conn.execute(_DELETE, [row["message_id"] for row in rows])
    RELAYED_ROWS.inc(len(rows))
    RELAY_SECONDS.observe((datetime.now(UTC) - rows[0]["created_at"]).total_seconds())
    return True


def _calls(rows: Sequence[asyncpg.Record]) -> list[tuple[str, list[str]]]:
    """The arguments of the script, per call: one topic each, the rows of a topic in their order."""
    calls: list[tuple[str, list[str]]] = []
    open_call: dict[str, tuple[list[str], int]] = {}
    for row in rows:
        topic, payload = row["topic"], row["payload"]
        arguments, size = open_call.get(topic, ([], CALL_BYTES_MAX))
        if size + len(payload) > CALL_BYTES_MAX:
            length = PUSH_STREAM_LENGTH if topic == USER_PUSH_TOPIC else STREAM_LENGTH
            arguments, size = [str(length), str(SCHEMA_VERSION)], 0
            calls.append((topic, arguments))
        arguments += (str(row["message_id"]), row["name"], iso(row["created_at"]), payload)
        open_call[topic] = arguments, size + len(payload)
    return calls


async def _add(script: AsyncScript, topic: str, arguments: Sequence[str]) -> None:
    while True:
        try:
            async with asyncio.timeout(REDIS_TIMEOUT_SECONDS):
                await script(keys=[topic], args=arguments)
            return
        except (RedisError, OSError) as error:
            log.warning("Redis does not take outbox messages: %r", error)
            await pause(REDIS_RETRY_SECONDS)

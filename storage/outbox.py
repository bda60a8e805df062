"""The outbox: events written in the transaction that makes them true, relayed to Redis Streams afterwards."""

from collections.abc import Sequence

import asyncpg
import msgspec

from domain.events import USER_PUSH_TOPIC, BusinessEvent
from storage.db import Connection

_encode = msgspec.json.Encoder().encode
CHANNEL = "outbox"
# Pushes are many and only passed on: a stream entry carries a list of them.
PUSHES_A_LINE = 50
# Writers of events wait behind whoever waits for the table: not for long.
WATERMARK_LOCK = "SET LOCAL lock_timeout = '2s'; LOCK TABLE outbox.messages IN SHARE MODE"
WATERMARK_ATTEMPTS = 15
# The notification is delivered at commit; the relay also polls, so a lost one costs time, never an event.
_INSERT = (
    "WITH written AS (INSERT INTO outbox.messages (topic, name, payload)"
    " SELECT * FROM unnest($1::text[], $2::text[], $3::text[])) SELECT pg_notify($4, '')"
)


class UserPush(msgspec.Struct, frozen=True, rename="camel"):
    """One message for the sockets of one user on `/ws/user`; `channel` is order, fill, balance, position, …"""

    user_id: int
    channel: str
    data: object


async def emit(conn: Connection, events: Sequence[BusinessEvent] = (), pushes: Sequence[UserPush] = ()) -> None:
    """Write `events` and `pushes` in the caller's transaction, one row per kind, each kind in its given order."""
    lines: dict[tuple[str, str], list[bytes]] = {}
    for event in events:
        lines.setdefault((event.topic, event.name), []).append(_encode(event))
    if pushes:
        lines[USER_PUSH_TOPIC, "UserPush"] = [
            _encode(pushes[start : start + PUSHES_A_LINE]) for start in range(0, len(pushes), PUSHES_A_LINE)
        ]
    if not lines:
        return
    topics, names = zip(*lines, strict=True)
    payloads = [b"\n".join(batch).decode() for batch in lines.values()]
    await conn.execute(_INSERT, list(topics), list(names), payloads, CHANNEL)


async def read_watermark(conn: Connection) -> int:
    """Begin a snapshot of all services, and answer which events are in it: exactly those of messages up to this id.

    `conn` must be in a REPEATABLE READ transaction that has read nothing yet. Whoever is writing events is waited for,
    a moment; the lock is given back at once, and the snapshot stays. Raises asyncpg.LockNotAvailableError when some
    transaction goes on writing for too long.
    """
    for attempt in range(1, WATERMARK_ATTEMPTS + 1):
        savepoint = conn.transaction()
        await savepoint.start()
        try:
            await conn.execute(WATERMARK_LOCK)
            # An id of our own: those who come later get higher ones.
            watermark: int = await conn.fetchval(
                "SELECT nextval(pg_get_serial_sequence('outbox.messages', 'message_id'))"
            )
            return watermark
        except asyncpg.LockNotAvailableError:
            if attempt == WATERMARK_ATTEMPTS:
                raise
        finally:
            await savepoint.rollback()
    raise AssertionError("Expected at least one attempt")


async def oldest_message(conn: Connection) -> int | None:
    """The oldest message that the relay may still send; None when there is none."""
    oldest: int | None = await conn.fetchval("SELECT min(message_id) FROM outbox.messages")
    return oldest

"""Doing a thing once: cursors over the engine's log, and the first result of a batch step.

Both are written in the transaction that has the effect, so that a repeat after any crash changes nothing.
"""

from datetime import datetime
from typing import TypeVar

import msgspec
from temporalio.exceptions import ApplicationError

from domain.contracts.settlement import CURSOR_GAP, EventRange
from storage.db import Connection

T = TypeVar("T")

# Kinds of steps that only their own saga, settlement, liquidation or funding run repeats.
PASSING_STEPS = ["adjust", "check", "freeze", "release", "unfreeze", "settle", "liquidate", "funding"]


class CursorGapError(ApplicationError):
    """A range of engine events does not fit where the service stands; the workflow has to look where that is."""

    def __init__(self, message: str) -> None:
        super().__init__(message, type=CURSOR_GAP, non_retryable=True)


class NotYetError(ApplicationError):
    """Somebody else has to get further first: the step is tried again until they have, visible to operators."""

    def __init__(self, message: str) -> None:
        super().__init__(message, type="NotYet")


async def advance_cursor(conn: Connection, schema: str, events: EventRange, column: str = "applied_seq") -> bool:
    """Claim `events` for the service of `schema` in the caller's transaction; False when they were applied before.

    The row lock lets one transaction at a time work on an instrument. Raises CursorGapError when the service stands
    anywhere else than before or after the whole range, or the range is empty.
    """
    if events.after_seq >= events.to_seq:
        raise CursorGapError(f"Expected at least one event, was {events}")
    claimed = await conn.fetchval(
        f"UPDATE {schema}.cursors SET {column} = $3 WHERE instrument_id = $1 AND {column} = $2 RETURNING TRUE",
        events.instrument_id,
        events.after_seq,
        events.to_seq,
    )
    if claimed:
        return True
    stands_at = await conn.fetchval(
        f"SELECT {column} FROM {schema}.cursors WHERE instrument_id = $1", events.instrument_id
    )
    if stands_at is None or stands_at < events.to_seq:
        raise CursorGapError(
            f"Expected {schema}.{column} of {events.instrument_id} at {events.after_seq}, was {stands_at}"
        )
    return False


async def first_result(conn: Connection, schema: str, step_id: str, kind: type[T]) -> T | None:
    """The stored result of a step done before; None the first time.

    Two attempts of a step may overlap (a time-out that was not a failure): the one that comes second to
    `store_result` is rolled back there, and finds the result when it is tried again.
    """
    stored = await conn.fetchval(f"SELECT result FROM {schema}.steps WHERE step_id = $1", step_id)
    return None if stored is None else msgspec.json.decode(stored, type=kind)


async def store_result(conn: Connection, schema: str, step_id: str, result: object) -> None:
    """Keep the result of a step in the caller's transaction. Raises UniqueViolationError when it has one already."""
    await conn.execute(
        f"INSERT INTO {schema}.steps (step_id, result) VALUES ($1, $2)", step_id, msgspec.json.encode(result).decode()
    )


async def forget_steps(conn: Connection, schema: str, before: datetime, limit: int) -> int:
    """Delete up to `limit` results of steps of sagas and settlement stored before then; how many it was.

    Two are asked for however old they are: the freeze of a user's last check (by the next check), and the margin moves
    of the range at which risk stands (by the ledger, if it has not settled that yet).
    """
    status = await conn.execute(
        f"DELETE FROM {schema}.steps WHERE step_id IN (SELECT s.step_id FROM {schema}.steps s"
        " WHERE s.created_at < $1 AND split_part(s.step_id, ':', 1) = ANY($2)"
        " AND NOT EXISTS (SELECT FROM risk.v_exposures e WHERE s.step_id = 'freeze:' || e.pending_step)"
        " AND NOT EXISTS ("
        "  SELECT FROM risk.v_cursors c WHERE s.step_id = 'settle:' || c.instrument_id || ':' || c.applied_seq)"
        " ORDER BY s.created_at LIMIT $3)",
        before,
        PASSING_STEPS,
        limit,
    )
    return int(status.split()[-1])

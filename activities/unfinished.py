"""What the engine has done and the books do not know yet, by user: clients read their own writes.

The engine's verdict reaches a client as soon as it is in the log, some hundredths of a second before risk and the
ledger have applied it. What passes on older knowledge is safe, since exposures cover both outcomes. A refusal is not:
it would contradict what the client was told. So whoever is to refuse something asks here first, and waits while its
user has events that are not applied everywhere. Commands that the engine has not carried out yet do not count: nobody
was told of those.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TypeVar

from domain.problems import Problem
from domain.sagas import EventRange
from storage.db import Connection, Pool, columns

T = TypeVar("T")

# With more than that behind settlement nobody looks through it: what a user was told is not known, so they wait.
EVENTS_SEARCHED_MAX = 100_000
PATIENCE_SECONDS = 5.0
FIRST_PAUSE_SECONDS = 0.01
PAUSE_SECONDS_MAX = 0.5


@dataclass(slots=True)
class Unfinished:
    """Events that were in the engine's log at one moment, and not applied by both risk and ledger then."""

    ranges: list[EventRange]
    _asked_for: frozenset[int]
    _found: set[int] | None = None

    async def has(self, conn: Connection, user_id: int) -> bool:
        """Whether some of them are of this user's orders or position. The log is searched once, for all users."""
        if not self.ranges:
            return False
        if self._found is None:
            self._found = await _users_of(conn, self.ranges, self._asked_for)
        return user_id in self._found


async def read_unfinished(
    conn: Connection, user_ids: Collection[int], earlier: Sequence[EventRange] | None = None
) -> Unfinished:
    """The unfinished events of now, for questions about `user_ids`.

    To be read before the rows that a decision rests on: whatever those lack is in it then. `earlier` is what an earlier
    look for the same decision found: nothing that came later counts, so that nobody waits for ever.
    """
    rows = await conn.fetch(
        "SELECT instrument_id, least(r.applied_seq, l.applied_seq) AS after_seq, m.event_seq AS to_seq"
        " FROM matching.v_cursors m JOIN risk.v_cursors r USING (instrument_id)"
        " JOIN ledger.v_cursors l USING (instrument_id)"
        " WHERE least(r.applied_seq, l.applied_seq) < m.event_seq ORDER BY instrument_id"
    )
    ranges = [EventRange(*row) for row in rows]
    if earlier is not None:
        ends = {events.instrument_id: events.to_seq for events in earlier}
        cut = [EventRange(r.instrument_id, r.after_seq, min(r.to_seq, ends.get(r.instrument_id, 0))) for r in ranges]
        ranges = [events for events in cut if events.after_seq < events.to_seq]
    return Unfinished(ranges, frozenset(user_ids))


async def _users_of(conn: Connection, ranges: Sequence[EventRange], user_ids: Collection[int]) -> set[int]:
    """Those of `user_ids` whom events in `ranges` touch (as `activities.risk.users_of` has it)."""
    if sum(events.to_seq - events.after_seq for events in ranges) > EVENTS_SEARCHED_MAX:
        return set(user_ids)
    # Postgres looks through the payloads: the process that asks has other things to do.
    rows = await conn.fetch(
        "SELECT DISTINCT u.user_id FROM unnest($1::text[], $2::bigint[], $3::bigint[])"
        "  AS r (instrument_id, after_seq, to_seq)"
        " JOIN matching.v_events e ON e.instrument_id = r.instrument_id AND e.seq > r.after_seq AND e.seq <= r.to_seq"
        " CROSS JOIN LATERAL json_to_record(e.payload)"
        "  AS p (user_id bigint, maker_user_id bigint, taker_user_id bigint, counterparty_user_id bigint)"
        " CROSS JOIN LATERAL (VALUES (p.user_id), (p.maker_user_id), (p.taker_user_id), (p.counterparty_user_id))"
        "  AS u (user_id) WHERE u.user_id = ANY($4::bigint[])",
        *columns([(r.instrument_id, r.after_seq, r.to_seq) for r in ranges], 3),
        list(user_ids),
    )
    return {row["user_id"] for row in rows}


def refused_with(*codes: str) -> Callable[[object], bool]:
    """Whether an attempt ended with one of these problems."""
    return lambda outcome: isinstance(outcome, Problem) and outcome.code in codes


async def patiently(
    pool: Pool,
    user_id: int,
    attempt: Callable[[Connection], Awaitable[T]],
    is_refusal: Callable[[T | Problem], bool],
    seconds: float = PATIENCE_SECONDS,
) -> T:
    """The outcome of `attempt`, in a transaction of its own: what it answers, or the Problem that it raises.

    A refusal is tried again while events of the user that were in the log at the beginning are unfinished, for
    `seconds` at most; then it stands.
    """
    deadline, pause = time.monotonic() + seconds, FIRST_PAUSE_SECONDS
    earlier: list[EventRange] | None = None
    while True:
        async with pool.acquire() as conn:
            unfinished = await read_unfinished(conn, [user_id], earlier)
            outcome: T | Problem
            try:
                async with conn.transaction():
                    outcome = await attempt(conn)
            except Problem as problem:
                outcome = problem
            is_last = not is_refusal(outcome) or time.monotonic() > deadline or not await unfinished.has(conn, user_id)
        if is_last:
            if isinstance(outcome, Problem):
                raise outcome
            return outcome
        earlier = unfinished.ranges
        await asyncio.sleep(pause)
        pause = min(2 * pause, PAUSE_SECONDS_MAX)

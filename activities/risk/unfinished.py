"""What the engine has done and the books do not know yet, by user: clients read their own writes.

The engine's verdict reaches a client as soon as it is in the log, some hundredths of a second before risk and the
ledger have applied it. What passes on older knowledge is safe, since exposures cover both outcomes. A refusal is not:
it would contradict what the client was told. So whoever is to refuse something asks here first, and waits while its
user has events that are not applied everywhere. Commands that the engine has not carried out yet do not count: nobody
was told of those.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from domain.problems import Problem
from domain.sagas import EventRange
from storage.db import Connection, Pool, columns

T = TypeVar("T")

# With more than that behind settlement nobody looks through it: what a user was told is not known, so they wait.
EVENTS_SEARCHED_MAX = 100_000
PATIENCE_SECONDS = 5.0
FIRST_PAUSE_SECONDS = 0.004
PAUSE_SECONDS_MAX = 0.1


@dataclass(slots=True)
class Unfinished:
    """Events that were in the engine's log at one moment, and not applied by both risk and ledger then.

    Questions are about `user_ids`. `ends` is what those wait for about whom the answer was yes: the last events of
    theirs by instrument.
    """

    ranges: list[EventRange]
    user_ids: frozenset[int] = frozenset()
    ends: dict[str, int] = field(default_factory=dict)
    _found: dict[int, dict[str, int]] | None = None

    async def has(self, conn: Connection, user_id: int) -> bool:
        """Whether some of them are of this user's orders or position. The log is searched once, for all users."""
        if not self.ranges:
            return False
        if self._found is None:
            self._found = await _last_events(conn, self.ranges, self.user_ids)
        for name, seq in self._found.get(user_id, {}).items():
            self.ends[name] = max(seq, self.ends.get(name, 0))
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


async def _last_events(
    conn: Connection, ranges: Sequence[EventRange], user_ids: Collection[int]
) -> dict[int, dict[str, int]]:
    """The last event in `ranges` of each of `user_ids` whom some touch (as `events.users_of` has it)."""
    if sum(events.to_seq - events.after_seq for events in ranges) > EVENTS_SEARCHED_MAX:
        return {user_id: {events.instrument_id: events.to_seq for events in ranges} for user_id in user_ids}
    # Postgres looks through the payloads: the process that asks has other things to do.
    rows = await conn.fetch(
        "SELECT u.user_id, r.instrument_id, max(e.seq) FROM unnest($1::text[], $2::bigint[], $3::bigint[])"
        "  AS r (instrument_id, after_seq, to_seq)"
        " JOIN matching.v_events e ON e.instrument_id = r.instrument_id AND e.seq > r.after_seq AND e.seq <= r.to_seq"
        " CROSS JOIN LATERAL json_to_record(e.payload)"
        "  AS p (user_id bigint, maker_user_id bigint, taker_user_id bigint, counterparty_user_id bigint)"
        " CROSS JOIN LATERAL (VALUES (p.user_id), (p.maker_user_id), (p.taker_user_id), (p.counterparty_user_id))"
        "  AS u (user_id) WHERE u.user_id = ANY($4::bigint[]) GROUP BY 1, 2",
        *columns([(r.instrument_id, r.after_seq, r.to_seq) for r in ranges], 3),
        list(user_ids),
    )
    found: dict[int, dict[str, int]] = {}
    for user_id, instrument_id, seq in rows:
        found.setdefault(user_id, {})[instrument_id] = seq
    return found


async def once_applied(
    pool: Pool,
    attempt: Callable[[Connection, list[EventRange] | None], Awaitable[tuple[T, Unfinished]]],
    seconds: float,
) -> T:
    """What `attempt` answers, in a transaction of its own, together with the unfinished events that it looked at.

    While some of those are waited for (`Unfinished.ends`) it is undone, and done again once they are applied, or
    after `seconds`, when it stands as it is. Given to it is what its first look found, None the first time.
    """
    deadline = time.monotonic() + seconds
    earlier: list[EventRange] | None = None
    while True:
        async with pool.acquire() as conn:
            transaction = conn.transaction()
            await transaction.start()
            try:
                result, unfinished = await attempt(conn, earlier)
            except BaseException:
                await transaction.rollback()
                raise
            if not unfinished.ends or time.monotonic() >= deadline:
                await transaction.commit()
                return result
            await transaction.rollback()
        earlier = unfinished.ranges
        await _until_applied(pool, unfinished.ends, deadline)


async def _until_applied(pool: Pool, ends: Mapping[str, int], deadline: float) -> None:
    """Returns when risk and ledger have got to these events, or at the deadline (of `time.monotonic`)."""
    pause = FIRST_PAUSE_SECONDS
    while time.monotonic() < deadline:
        await asyncio.sleep(pause)
        rows = await pool.fetch(
            "SELECT instrument_id, least(r.applied_seq, l.applied_seq)"
            " FROM risk.v_cursors r JOIN ledger.v_cursors l USING (instrument_id) WHERE instrument_id = ANY($1)",
            list(ends),
        )
        if all(applied >= ends[name] for name, applied in rows):
            return
        pause = min(1.2 * pause, PAUSE_SECONDS_MAX)


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

    async def once(conn: Connection, earlier: list[EventRange] | None) -> tuple[T | Problem, Unfinished]:
        unfinished = await read_unfinished(conn, [user_id], earlier)
        outcome: T | Problem
        try:
            async with conn.transaction():
                outcome = await attempt(conn)
        except Problem as problem:
            outcome = problem
        if is_refusal(outcome):
            await unfinished.has(conn, user_id)
        return outcome, unfinished

    outcome = await once_applied(pool, once, seconds)
    if isinstance(outcome, Problem):
        raise outcome
    return outcome

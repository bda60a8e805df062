"""Looks at the whole exchange every few seconds: how far its parts are behind one another, and what waits for how long.

One worker observes, and shows the figures in its /metrics; what must not stay so is alerted when it begins.
"""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import cast

import asyncpg
import msgspec
from prometheus_client.core import Metric
from redis.asyncio import Redis
from redis.exceptions import RedisError

from domain.clock import from_ms
from domain.mark_price import MARK_AGE_MAX
from storage.db import Connection, Pool
from storage.leadership import OBSERVER_LOCK, run_as_leader
from storage.market_keys import mark_key
from storage.streams import read_info
from telemetry.alerts import INDEX_FROZEN, SETTLEMENT_LAG, alert
from telemetry.metrics import OBSERVATION, figure

LOOK_SECONDS = 5.0
# Settlement that has work and does not move for so long is stuck.
SETTLEMENT_SECONDS_MAX = 30.0

_LAGS = (
    "SELECT instrument_id, commands_behind, events_behind, acked_seq, owned FROM matching.v_lags ORDER BY instrument_id"
)
_OUTBOX = "SELECT messages, extract(epoch FROM now() - oldest)::float8 AS seconds FROM outbox.v_backlog"
_SAGAS = """
    SELECT kind, CASE WHEN age < 5 THEN '0-5s' WHEN age < 60 THEN '5-60s' WHEN age < 600 THEN '1-10m' ELSE '10m-' END,
           count(*), max(age)
    FROM (SELECT kind, extract(epoch FROM now() - created_at)::float8 AS age FROM orders.v_open_sagas) AS sagas
    GROUP BY 1, 2
"""
_LIQUIDATIONS = """
    SELECT status, count(*), max(extract(epoch FROM now() - created_at))::float8
    FROM risk.v_open_liquidations GROUP BY status
"""
_REPORTED = "SELECT topic, entry_id, entries FROM reporting.v_stream_positions"
_REGISTRATIONS = "SELECT status, count(*) FROM users.v_open_registrations GROUP BY status"
SAGA_KINDS, SAGA_AGES = ("PLACE", "CANCEL"), ("0-5s", "5-60s", "1-10m", "10m-")


class Mark(msgspec.Struct, rename="camel"):
    """What matters here of the mark price document in Redis."""

    calculated_at: datetime
    is_frozen: bool = False


@dataclass(frozen=True, slots=True)
class Uncounted:
    """How many events of a stream are not in the reports, and when the oldest of them came."""

    events: int
    since: datetime | None


_decode_mark = msgspec.json.Decoder(Mark).decode


@dataclass
class Watch:
    """What the looks before this one saw: since when settlement has stood where it stands, and what is alerted."""

    stands: dict[str, tuple[int, datetime]] = field(default_factory=dict)
    alerted: set[tuple[str, str]] = field(default_factory=set)

    def stalled_seconds(self, instrument_id: str, acked_seq: int, events_behind: int, now: datetime) -> float:
        """For how long settlement has had something to do and has not moved."""
        seq, since = self.stands.get(instrument_id, (-1, now))
        if seq != acked_seq or not events_behind:
            self.stands[instrument_id] = acked_seq, now
            return 0.0
        return (now - since).total_seconds()

    def tell(self, name: str, about: str, message: str, *, holds: bool) -> None:
        """Alert once when `holds` begins."""
        if holds and (name, about) not in self.alerted:
            self.alerted.add((name, about))
            alert(name, "%s: %s", about, message)
        elif not holds:
            self.alerted.discard((name, about))


async def run_observer(pool: Pool, redis: Redis, stop: asyncio.Event) -> None:
    """Observe until `stop`, while this process leads."""

    async def observe_for_ever(conn: Connection) -> None:
        watch = Watch()
        try:
            while True:
                OBSERVATION.show(await observe(conn, redis, watch, datetime.now(UTC)))
                await asyncio.sleep(LOOK_SECONDS)
        finally:
            # Another process shows them from now on.
            OBSERVATION.show(())

    await run_as_leader(pool, OBSERVER_LOCK, stop, observe_for_ever)


async def observe(conn: Connection, redis: Redis, watch: Watch, now: datetime) -> list[Metric]:
    """One look. What only Redis knows is left out while it is away."""
    lags = await conn.fetch(_LAGS)
    figures = [
        *_lag_figures(lags, watch, now),
        *_outbox_figures(await conn.fetchrow(_OUTBOX)),
        *_saga_figures(await conn.fetch(_SAGAS)),
        *_queue_figures(await conn.fetch(_LIQUIDATIONS), await conn.fetch(_REGISTRATIONS)),
    ]
    reported = await conn.fetch(_REPORTED)
    try:
        async with asyncio.timeout(LOOK_SECONDS):
            marks = await read_marks(redis, [row["instrument_id"] for row in lags])
            uncounted = await read_uncounted(redis, reported)
    except (RedisError, OSError):
        marks, uncounted = {}, {}
    return [*figures, *_mark_figures(marks, watch, now), *_reporting_figures(uncounted, now)]


def _lag_figures(rows: Sequence[asyncpg.Record], watch: Watch, now: datetime) -> Iterable[Metric]:
    of = ["instrument"]
    stalled = {}
    for name, _, behind, acked, _ in rows:
        stalled[name] = watch.stalled_seconds(name, acked, behind, now)
        stuck = stalled[name] > SETTLEMENT_SECONDS_MAX
        watch.tell(SETTLEMENT_LAG, name, f"settlement is {behind} events behind and does not move", holds=stuck)
    yield figure(
        "exchange_engine_lag_commands",
        "Commands in the log that the engine has not matched.",
        (([row["instrument_id"]], row["commands_behind"]) for row in rows),
        of,
    )
    yield figure(
        "exchange_engine_owned",
        "Whether an engine holds the instrument's lease now.",
        (([row["instrument_id"]], row["owned"]) for row in rows),
        of,
    )
    yield figure(
        "exchange_settlement_lag_events",
        "Engine events that are not settled.",
        (([row["instrument_id"]], row["events_behind"]) for row in rows),
        of,
    )
    yield figure(
        "exchange_settlement_stalled_seconds",
        "For how long settlement has had events to settle and has not moved.",
        (([name], seconds) for name, seconds in stalled.items()),
        of,
    )


def _outbox_figures(row: asyncpg.Record | None) -> Iterable[Metric]:
    assert row is not None, "Expected one row of an aggregate"
    yield figure("exchange_outbox_messages", "Rows that wait for the relay.", [((), row["messages"])])
    yield figure("exchange_outbox_oldest_seconds", "Age of the oldest of them.", [((), row["seconds"] or 0.0)])


def _saga_figures(rows: Sequence[asyncpg.Record]) -> Iterable[Metric]:
    counts = {(kind, age): 0 for kind in SAGA_KINDS for age in SAGA_AGES}
    oldest = dict.fromkeys(SAGA_KINDS, 0.0)
    for kind, age, count, seconds in rows:
        counts[kind, age] = count
        oldest[kind] = max(oldest.get(kind, 0.0), seconds)
    yield figure("exchange_open_sagas", "Order sagas that have not ended, by age.", counts.items(), ["kind", "age"])
    yield figure(
        "exchange_open_sagas_oldest_seconds",
        "Age of the oldest of them.",
        (([kind], seconds) for kind, seconds in oldest.items()),
        ["kind"],
    )


def _queue_figures(liquidations: Sequence[asyncpg.Record], registrations: Sequence[asyncpg.Record]) -> Iterable[Metric]:
    waiting = {"PENDING": 0, "PROCESSING": 0} | {row["status"]: row["count"] for row in liquidations}
    yield figure(
        "exchange_liquidations_open",
        "Liquidations that have not ended.",
        (([status], count) for status, count in waiting.items()),
        ["status"],
    )
    yield figure(
        "exchange_liquidations_oldest_seconds",
        "Age of the oldest of them.",
        [((), max((row[2] for row in liquidations), default=0.0))],
    )
    open_registrations = {"PREPARE": 0, "FAILED": 0} | {row["status"]: row["count"] for row in registrations}
    yield figure(
        "exchange_registrations_open",
        "Registrations that have not led to an account; FAILED ones wait for an operator.",
        (([status], count) for status, count in open_registrations.items()),
        ["status"],
    )


async def read_marks(redis: Redis, instrument_ids: Sequence[str]) -> dict[str, Mark]:
    """The latest mark price document of each instrument that has one."""
    keys = [mark_key(name) for name in instrument_ids]
    documents = cast(list[bytes | None], await redis.mget(keys)) if keys else []
    return {
        name: _decode_mark(document)
        for name, document in zip(instrument_ids, documents, strict=True)
        if document is not None
    }


def is_stale(mark: Mark, now: datetime) -> bool:
    """Whether the mark price should have been made anew by now."""
    return now - mark.calculated_at > MARK_AGE_MAX


def _mark_figures(marks: Mapping[str, Mark], watch: Watch, now: datetime) -> list[Metric]:
    ages = {name: (now - mark.calculated_at).total_seconds() for name, mark in marks.items()}
    frozen = {name: mark.is_frozen or is_stale(mark, now) for name, mark in marks.items()}
    for name, mark in marks.items():
        # A frozen index has been alerted by the market process; this is about one that says nothing any more.
        silent = is_stale(mark, now) and not mark.is_frozen
        watch.tell(INDEX_FROZEN, name, f"no fresh mark price for {ages[name]:.0f} s", holds=silent)
    return [
        figure(
            "exchange_mark_price_age_seconds",
            "Since when the mark price stands.",
            (([name], age) for name, age in ages.items()),
            ["instrument"],
        ),
        figure(
            "exchange_index_frozen",
            "Whether the instrument has no fresh index or mark price.",
            (([name], holds) for name, holds in frozen.items()),
            ["instrument"],
        ),
    ]


async def read_uncounted(redis: Redis, reported: Sequence[asyncpg.Record]) -> dict[str, Uncounted]:
    """What each stream holds after the position up to which it is in the reports."""
    return {row["topic"]: await _uncounted(redis, *row) for row in reported}


async def _uncounted(redis: Redis, topic: str, entry_id: str, counted: int) -> Uncounted:
    info = await read_info(redis, topic)
    first = cast(list[tuple[bytes, object]], await redis.xrange(topic, min=f"({entry_id}", count=1))
    # An entry's id begins with the milliseconds at which it was added.
    since = from_ms(int(first[0][0].partition(b"-")[0])) if first else None
    return Uncounted(0 if info is None else max(0, int(info["entries-added"]) - counted), since)


def _reporting_figures(uncounted: Mapping[str, Uncounted], now: datetime) -> Iterable[Metric]:
    yield figure(
        "exchange_reporting_lag_events",
        "Events in the streams that are not in the reports.",
        (([topic], each.events) for topic, each in uncounted.items()),
        ["topic"],
    )
    yield figure(
        "exchange_reporting_lag_seconds",
        "Since when the oldest of them waits.",
        (
            ([topic], 0.0 if each.since is None else max(0.0, (now - each.since).total_seconds()))
            for topic, each in uncounted.items()
        ),
        ["topic"],
    )

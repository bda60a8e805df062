"""The matching service as the sagas see it: appending commands, acknowledging events."""

from collections.abc import Mapping, Sequence

from temporalio import activity

from domain.funding import EVENTS_OF, LAST_COMMAND, LogPosition
from domain.matching import AnyCommand, SetState, TradingState, encode
from domain.sagas import ACKNOWLEDGE, EventRange, Progress
from storage.db import Connection, Pool
from storage.once import NotYetError
from telemetry.metrics import SETTLED_EVENTS

COMMANDS_CHANNEL = "matching_commands"
SETTLEMENT_CONSUMER = "settlement"


async def append_commands(conn: Connection, commands: Mapping[str, Sequence[AnyCommand]]) -> dict[str, int]:
    """Append commands to each instrument's log, gapless and in the given order, in the caller's transaction.

    Answers the seq of the last command of each. Instruments are locked in order of their ids, so that two callers
    cannot wait for each other.
    """
    last_seqs: dict[str, int] = {}
    for instrument_id in sorted(commands):
        batch = commands[instrument_id]
        last_seq = await conn.fetchval(
            "UPDATE matching.sequencers SET last_seq = last_seq + $2 WHERE instrument_id = $1"
            " RETURNING last_seq, pg_notify($3, $1)",
            instrument_id,
            len(batch),
            COMMANDS_CHANNEL,
        )
        last_seqs[instrument_id] = last_seq
        first_seq = last_seq - len(batch) + 1
        await conn.copy_records_to_table(
            "commands",
            schema_name="matching",
            columns=["instrument_id", "seq", "payload"],
            records=[(instrument_id, first_seq + i, encode(command).decode()) for i, command in enumerate(batch)],
        )
    return last_seqs


async def change_state(conn: Connection, instrument_id: str, state: TradingState, at_ms: int) -> bool:
    """Put an instrument into `state` in the caller's transaction: for the api, and through the log for the engine.

    False when there is no such instrument; one that is in the state already stays in it.
    """
    # Not FOR UPDATE: who appends twice in a transaction has the sequencer, and then Postgres has it look whether the
    # instrument is still there (a foreign key's share lock), while we would be waiting for that sequencer.
    before = await conn.fetchval(
        "SELECT state FROM matching.instruments WHERE instrument_id = $1 FOR NO KEY UPDATE", instrument_id
    )
    if before is None:
        return False
    if before != state:
        await conn.execute(
            "UPDATE matching.instruments SET state = $2, updated_at = now() WHERE instrument_id = $1",
            instrument_id,
            state,
        )
        await append_commands(conn, {instrument_id: [SetState(at=at_ms, state=state)]})
    return True


class MatchingActivities:
    """Activities on the matching service's own tables."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    @activity.defn(name=ACKNOWLEDGE)
    async def acknowledge(self, events: EventRange) -> Progress:
        """Record that settlement has applied everything up to `to_seq`; answers how far the engine is.

        The engine's position is read after the acknowledgement is committed: whatever the engine commits later,
        it then sees this acknowledgement and signals (see `engine/signaller.py`).
        """
        settled = await self._pool.fetchval(
            "INSERT INTO matching.consumers AS c (instrument_id, consumer, acked_seq) VALUES ($1, $2, $3)"
            " ON CONFLICT (instrument_id, consumer)"
            " DO UPDATE SET acked_seq = greatest(c.acked_seq, excluded.acked_seq), updated_at = now()"
            " RETURNING acked_seq",
            events.instrument_id,
            SETTLEMENT_CONSUMER,
            events.to_seq,
        )
        row = await self._pool.fetchrow(
            "SELECT m.event_seq, p.applied_seq FROM matching.cursors m JOIN positions.v_cursors p USING (instrument_id)"
            " WHERE instrument_id = $1",
            events.instrument_id,
        )
        assert row is not None, f"Expected cursors of {events.instrument_id}"
        SETTLED_EVENTS.labels(events.instrument_id).inc(max(0, events.to_seq - events.after_seq))
        return Progress(settled, row["applied_seq"], row["event_seq"])

    @activity.defn(name=LAST_COMMAND)
    async def last_command(self, instrument_id: str) -> int:
        """The last command of an instrument, after whoever is appending at this moment."""
        seq: int = await self._pool.fetchval(
            "SELECT last_seq FROM matching.sequencers WHERE instrument_id = $1 FOR UPDATE", instrument_id
        )
        return seq

    @activity.defn(name=EVENTS_OF)
    async def events_of(self, commands: LogPosition) -> int:
        """An event up to which lies all that the commands up to `seq` led to. Raises NotYetError before the engine has
        carried them out.
        """
        row = await self._pool.fetchrow(
            "SELECT command_seq, event_seq FROM matching.cursors WHERE instrument_id = $1", commands.instrument_id
        )
        assert row is not None, f"Expected a cursor of {commands.instrument_id}"
        if row["command_seq"] < commands.seq:
            raise NotYetError(f"The engine is at command {row['command_seq']} of {commands.seq}")
        event_seq: int = row["event_seq"]
        return event_seq

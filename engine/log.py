"""The engine's two logs in Postgres: commands in, events out."""

from dataclasses import dataclass
from functools import cached_property

from domain.instruments import Instrument
from domain.matching import AnyCommand, AnyEvent, Deleveraged, Trade, decode_command, encode
from engine import lease as leases
from engine.lease import Lease
from engine.outgoing import DeleveragingRow, TradeRow, business_events, deleveraging_row, trade_row
from storage.db import Connection
from storage.outbox import emit

_READ_EVENTS = """
    SELECT seq, payload FROM matching.events WHERE instrument_id = $1 AND seq BETWEEN $2 AND $3 ORDER BY seq
"""
_READ = "SELECT seq, payload FROM matching.commands WHERE instrument_id = $1 AND seq > $2 ORDER BY seq LIMIT $3"


class ReplayMismatchError(Exception):
    """The log does not lead to where the cursor and the stored events say it did."""


@dataclass(frozen=True)
class Batch:
    """What a run of commands up to `command_seq` led to: events from `first_seq` on and the command of each."""

    command_seq: int
    first_seq: int
    events: list[AnyEvent]
    causes: list[int]

    @cached_property
    def payloads(self) -> list[bytes]:
        """Every event encoded, once: the same bytes go to the log and to the subscribers."""
        return [encode(event) for event in self.events]

    @property
    def last_seq(self) -> int:
        """The seq of the last event; one below `first_seq` if there is none."""
        return self.first_seq + len(self.events) - 1


async def read_commands(conn: Connection, instrument_id: str, after_seq: int, limit: int) -> list[AnyCommand]:
    """The commands that follow `after_seq`, up to `limit`. Raises ReplayMismatchError when the next one is missing."""
    rows = await conn.fetch(_READ, instrument_id, after_seq, limit)
    last_seq = after_seq + len(rows)
    if rows and rows[-1][0] != last_seq:
        raise ReplayMismatchError(f"Expected command {last_seq} of {instrument_id}, was {rows[-1][0]}")
    return [decode_command(payload) for _, payload in rows]


async def verify(conn: Connection, instrument_id: str, batch: Batch) -> None:
    """Compare a replayed batch with the events written the first time. Raises ReplayMismatchError."""
    rows = await conn.fetch(_READ_EVENTS, instrument_id, batch.first_seq, batch.last_seq)
    if len(rows) != len(batch.events):
        raise ReplayMismatchError(f"Expected {len(rows)} events from {batch.first_seq} on, was {len(batch.events)}")
    for (seq, stored), payload in zip(rows, batch.payloads, strict=True):
        if stored.encode() != payload:
            raise ReplayMismatchError(f"Expected event {seq} to be {stored}, was {payload.decode()}")


async def write_batch(conn: Connection, lease: Lease, instrument: Instrument, batch: Batch) -> None:
    """Make a batch true, all of it or nothing. Raises LeaseLostError or a database error; then nothing is written
    (or, if the connection broke at the commit, possibly everything: the cursor tells).
    """
    async with conn.transaction():
        await leases.advance(conn, lease, batch.command_seq, batch.last_seq)
        if batch.events:
            await _copy_events(conn, instrument.instrument_id, batch)
            await _copy_trades(conn, instrument, batch)
            await _copy_deleveragings(conn, instrument, batch)
            await emit(conn, business_events(instrument, batch.events))


async def _copy_events(conn: Connection, instrument_id: str, batch: Batch) -> None:
    rows = zip(batch.causes, batch.payloads, strict=True)
    await conn.copy_records_to_table(
        "events",
        schema_name="matching",
        columns=["instrument_id", "seq", "command_seq", "payload"],
        records=[
            (instrument_id, seq, cause, payload.decode()) for seq, (cause, payload) in enumerate(rows, batch.first_seq)
        ],
    )


async def _copy_trades(conn: Connection, instrument: Instrument, batch: Batch) -> None:
    sequenced = enumerate(batch.events, batch.first_seq)
    rows = [trade_row(instrument, seq, event) for seq, event in sequenced if isinstance(event, Trade)]
    if rows:
        await conn.copy_records_to_table(
            "trade_tickers", schema_name="matching", columns=TradeRow._fields, records=rows
        )


async def _copy_deleveragings(conn: Connection, instrument: Instrument, batch: Batch) -> None:
    sequenced = enumerate(batch.events, batch.first_seq)
    rows = [deleveraging_row(instrument, seq, event) for seq, event in sequenced if isinstance(event, Deleveraged)]
    if rows:
        await conn.copy_records_to_table(
            "deleveragings", schema_name="matching", columns=DeleveragingRow._fields, records=rows
        )

"""One owner per instrument: a lease in `matching.cursors`, on the database's clock, fenced by an epoch.

Whoever takes the lease raises the epoch, and every write of an owner names its own: a former owner that does not
know it yet can write nothing.
"""

from dataclasses import dataclass

from storage.db import Connection

LEASE_SECONDS = 5.0

_TAKE = """
    UPDATE matching.cursors
    SET owner = $2, epoch = epoch + 1, lease_until = clock_timestamp() + make_interval(secs => $3)
    WHERE instrument_id = $1 AND (owner IS NULL OR owner = $2 OR lease_until < clock_timestamp())
    RETURNING epoch, command_seq, event_seq
"""
_ADVANCE = """
    UPDATE matching.cursors
    SET command_seq = $3, event_seq = $4, lease_until = clock_timestamp() + make_interval(secs => $5)
    WHERE instrument_id = $1 AND epoch = $2
"""
_RENEW = """
    UPDATE matching.cursors SET lease_until = clock_timestamp() + make_interval(secs => $3)
    WHERE instrument_id = $1 AND epoch = $2
"""
_RELEASE = "UPDATE matching.cursors SET owner = NULL, lease_until = NULL WHERE instrument_id = $1 AND epoch = $2"


class LeaseLostError(Exception):
    """Another engine has taken the instrument over."""


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to write for an instrument while `epoch` is the newest, and where its log stood when taken."""

    instrument_id: str
    epoch: int
    command_seq: int
    event_seq: int


async def take(conn: Connection, instrument_id: str, owner: str) -> Lease | None:
    """The lease, if nobody else holds it. Waits for a transaction of a former owner that is still in flight."""
    row = await conn.fetchrow(_TAKE, instrument_id, owner, LEASE_SECONDS)
    if row is None:
        return None
    return Lease(instrument_id, row["epoch"], row["command_seq"], row["event_seq"])


async def advance(conn: Connection, lease: Lease, command_seq: int, event_seq: int) -> None:
    """Move the cursor, in the caller's transaction and before its other writes. Raises LeaseLostError."""
    _expect_one(await conn.execute(_ADVANCE, lease.instrument_id, lease.epoch, command_seq, event_seq, LEASE_SECONDS))


async def renew(conn: Connection, lease: Lease) -> None:
    """Keep the lease for another while. Raises LeaseLostError."""
    _expect_one(await conn.execute(_RENEW, lease.instrument_id, lease.epoch, LEASE_SECONDS))


async def release(conn: Connection, lease: Lease) -> None:
    """Let the next engine take over at once; nothing happens when another one has already."""
    await conn.execute(_RELEASE, lease.instrument_id, lease.epoch)


def _expect_one(status: str) -> None:
    if status != "UPDATE 1":
        raise LeaseLostError(f"Expected UPDATE 1, was {status}: another engine holds a newer epoch")

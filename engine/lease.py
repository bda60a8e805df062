"""One owner per instrument: a lease in `matching.cursors`, on the database's clock, fenced by an epoch.

Whoever takes the lease raises the epoch, and every write of an owner names its own: a former owner that does not
know it yet can write nothing.
"""

from dataclasses import dataclass

from storage.db import Connection

LEASE_SECONDS = 5.0
# A former owner that stopped in the middle of a transaction keeps the cursor locked: after so long it is cut off.
EVICT_SECONDS = 3.0

# By which the session of an owner is found.
_SESSION = "left('engine ' || c.epoch || ' ' || c.instrument_id, 63)"
_TAKE = f"""
    UPDATE matching.cursors AS c
    SET owner = $2, epoch = epoch + 1, lease_until = clock_timestamp() + make_interval(secs => $3)
    WHERE instrument_id = (
        SELECT instrument_id FROM matching.cursors WHERE instrument_id = $1 AND (
            owner = $2 OR coalesce(lease_until, '-infinity') + make_interval(secs => $4) < clock_timestamp())
        FOR UPDATE SKIP LOCKED)
    RETURNING epoch, command_seq, event_seq, set_config('application_name', {_SESSION}, FALSE)
"""
_EVICT = f"""
    SELECT pg_terminate_backend(s.pid) FROM matching.cursors c JOIN pg_stat_activity s
        ON s.datname = current_database() AND s.application_name = {_SESSION}
    WHERE c.instrument_id = $1 AND c.owner <> $2
        AND c.lease_until + make_interval(secs => $3) < clock_timestamp()
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
_RELEASE = """
    UPDATE matching.cursors SET owner = NULL, lease_until = clock_timestamp() WHERE instrument_id = $1 AND epoch = $2
"""


class LeaseLostError(Exception):
    """Another engine has taken the instrument over."""


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to write for an instrument while `epoch` is the newest, and where its log stood when taken.

    Others may take it over `seconds` after the last sign of life.
    """

    instrument_id: str
    epoch: int
    command_seq: int
    event_seq: int
    seconds: float = LEASE_SECONDS


async def take(
    conn: Connection, instrument_id: str, owner: str, seconds: float = LEASE_SECONDS, free_for: float = 0.0
) -> Lease | None:
    """The lease for `seconds`, if nobody else has held it for `free_for` seconds.

    Not while a transaction of a former owner is in flight; but once its lease has been over for EVICT_SECONDS, its
    session is terminated.
    """
    await conn.execute(_EVICT, instrument_id, owner, EVICT_SECONDS)
    row = await conn.fetchrow(_TAKE, instrument_id, owner, seconds, free_for)
    if row is None:
        return None
    return Lease(instrument_id, row["epoch"], row["command_seq"], row["event_seq"], seconds)


async def advance(conn: Connection, lease: Lease, command_seq: int, event_seq: int) -> None:
    """Move the cursor, in the caller's transaction and before its other writes. Raises LeaseLostError."""
    _expect_one(await conn.execute(_ADVANCE, lease.instrument_id, lease.epoch, command_seq, event_seq, lease.seconds))


async def renew(conn: Connection, lease: Lease) -> None:
    """Keep the lease for another while. Raises LeaseLostError."""
    _expect_one(await conn.execute(_RENEW, lease.instrument_id, lease.epoch, lease.seconds))


async def release(conn: Connection, lease: Lease) -> None:
    """Let the next engine take over at once; nothing happens when another one has already."""
    await conn.execute(_RELEASE, lease.instrument_id, lease.epoch)


def _expect_one(status: str) -> None:
    if status != "UPDATE 1":
        raise LeaseLostError(f"Expected UPDATE 1, was {status}: another engine holds a newer epoch")

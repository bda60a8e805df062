"""What the engine may forget: snapshots but the newest few, and the commands that no kept snapshot needs.

Events and trades are kept for now: the market process rebuilds itself from the whole event log, and the audit compares
the whole tape with the fills. They can be pruned below every consumer's position once the market has snapshots too.
"""

import logging

from engine.lease import Lease
from storage.db import Connection

log = logging.getLogger(__name__)

SNAPSHOTS_KEPT = 3
# Short transactions: neither locks nor vacuum wait for a long one.
DELETED_MAX = 5_000

_OLD_SNAPSHOTS = """
    DELETE FROM matching.snapshots WHERE instrument_id = $1 AND command_seq < (
        SELECT command_seq FROM matching.snapshots WHERE instrument_id = $1
        ORDER BY command_seq DESC OFFSET $2 LIMIT 1)
"""
# Only when all that we keep are there and none is damaged: until then, the full log is the way back.
_FLOOR = """
    SELECT min(command_seq) FROM matching.snapshots WHERE instrument_id = $1
    HAVING count(*) >= $2 AND bool_and(sha256(payload) = checksum)
"""
_OLD_COMMANDS = """
    DELETE FROM matching.commands WHERE instrument_id = $1 AND seq IN (
        SELECT seq FROM matching.commands WHERE instrument_id = $1 AND seq <= $2 ORDER BY seq LIMIT $3)
"""


async def prune(conn: Connection, lease: Lease) -> None:
    """Delete what no restart needs any more, in small transactions."""
    await conn.execute(_OLD_SNAPSHOTS, lease.instrument_id, SNAPSHOTS_KEPT - 1)
    floor = await conn.fetchval(_FLOOR, lease.instrument_id, SNAPSHOTS_KEPT)
    if floor is None:
        return
    while await conn.execute(_OLD_COMMANDS, lease.instrument_id, floor, DELETED_MAX) == f"DELETE {DELETED_MAX}":
        pass

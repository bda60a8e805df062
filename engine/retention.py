"""What the engine may forget: old snapshots, the commands before those it keeps, and the events that nobody needs.

An event is needed by whoever has not applied it yet, by the market process if it restarts from its oldest checkpoint,
by an engine that compares what it replays after its oldest snapshot; and the newest are kept in any case. A trade is
needed until the klines have counted it. It goes with its event: `matching.pruned` keeps the totals, by which
the audit still compares the tape with the fills.
"""

import logging

from engine.lease import Lease
from storage.db import Connection

log = logging.getLogger(__name__)

SNAPSHOTS_KEPT = 3
# The market's checkpoints: with fewer than two good ones, one that turns out bad would be the last.
CHECKPOINTS_MIN = 2
# Short transactions: neither locks nor vacuum wait for a long one.
DELETED_MAX = 5_000
# What is left over waits for the next time, so that the next snapshot does not.
EVENTS_MAX = 500_000

_OLD_SNAPSHOTS = """
    DELETE FROM matching.snapshots WHERE instrument_id = $1 AND command_seq < (
        SELECT command_seq FROM matching.snapshots WHERE instrument_id = $1
        ORDER BY command_seq DESC OFFSET $2 LIMIT 1)
"""
# Only when all that we keep are there and none is damaged: until then, the full log is the way back.
_OLDEST_SNAPSHOT = """
    SELECT min(command_seq) AS command_seq, min(event_seq) AS event_seq FROM matching.snapshots WHERE instrument_id = $1
    HAVING count(*) >= $2 AND bool_and(sha256(payload) = checksum)
"""
_OLD_COMMANDS = """
    DELETE FROM matching.commands WHERE instrument_id = $1 AND seq IN (
        SELECT seq FROM matching.commands WHERE instrument_id = $1 AND seq <= $2 ORDER BY seq LIMIT $3)
"""
# No row, and nothing to delete, as long as somebody's position is not known.
_EVENTS = """
    SELECT coalesce(d.event_seq, 0) AS pruned_seq,
           least($2, c.event_seq - $3, r.applied_seq, l.applied_seq, p.applied_seq, p.confirmed_seq, o.applied_seq,
                 k.acked_seq, m.seq, t.seq - 1) AS needless_seq
    FROM matching.cursors c
    JOIN risk.v_cursors r USING (instrument_id)
    JOIN ledger.v_cursors l USING (instrument_id)
    JOIN positions.v_cursors p USING (instrument_id)
    JOIN orders.v_cursors o USING (instrument_id)
    JOIN (SELECT instrument_id, min(acked_seq) AS acked_seq FROM matching.consumers GROUP BY instrument_id) k
        USING (instrument_id)
    JOIN (SELECT instrument_id, min(seq) AS seq FROM market.v_checkpoints GROUP BY instrument_id
          HAVING count(*) >= $4 AND bool_and(undamaged)) m USING (instrument_id)
    LEFT JOIN matching.pruned d USING (instrument_id)
    LEFT JOIN market.v_kline_positions n USING (instrument_id)
    LEFT JOIN LATERAL (SELECT seq FROM matching.trade_tickers WHERE instrument_id = c.instrument_id
                       AND seq > coalesce(n.seq, 0) ORDER BY seq LIMIT 1) t ON TRUE
    WHERE c.instrument_id = $1
"""
_DELETE_EVENTS = """
    WITH trades AS (
        DELETE FROM matching.trade_tickers WHERE instrument_id = $1 AND seq > $2 AND seq <= $3
        RETURNING quantity, maker_fee + taker_fee AS fee),
    events AS (DELETE FROM matching.events WHERE instrument_id = $1 AND seq > $2 AND seq <= $3)
    INSERT INTO matching.pruned AS p (instrument_id, event_seq, trades, quantity, fees)
    SELECT $1, $3, count(*), coalesce(sum(quantity), 0), coalesce(sum(fee), 0) FROM trades
    ON CONFLICT (instrument_id) DO UPDATE
    SET event_seq = greatest(p.event_seq, excluded.event_seq), trades = p.trades + excluded.trades,
        quantity = p.quantity + excluded.quantity, fees = p.fees + excluded.fees, updated_at = now()
"""
_BEGINNING = """
    SELECT (SELECT min(seq) FROM matching.commands WHERE instrument_id = $1) AS command_seq,
           (SELECT event_seq FROM matching.pruned WHERE instrument_id = $1) AS pruned_seq
"""


class LogPrunedError(Exception):
    """The log no longer begins at the first command: without a good snapshot there is no way to the book."""


async def prune(conn: Connection, lease: Lease, events_kept: int) -> None:
    """Delete what no restart and no consumer needs any more, in small transactions; the newest `events_kept` stay."""
    await conn.execute(_OLD_SNAPSHOTS, lease.instrument_id, SNAPSHOTS_KEPT - 1)
    oldest = await conn.fetchrow(_OLDEST_SNAPSHOT, lease.instrument_id, SNAPSHOTS_KEPT)
    if oldest is None:
        return
    command_seq = oldest["command_seq"]
    while await conn.execute(_OLD_COMMANDS, lease.instrument_id, command_seq, DELETED_MAX) == f"DELETE {DELETED_MAX}":
        pass
    await _prune_events(conn, lease.instrument_id, oldest["event_seq"], events_kept)


async def _prune_events(conn: Connection, instrument_id: str, snapshot_event_seq: int, events_kept: int) -> None:
    row = await conn.fetchrow(_EVENTS, instrument_id, snapshot_event_seq, events_kept, CHECKPOINTS_MIN)
    if row is None:
        return
    pruned_seq = row["pruned_seq"]
    last_seq = min(row["needless_seq"], pruned_seq + EVENTS_MAX)
    while pruned_seq < last_seq:
        upto = min(pruned_seq + DELETED_MAX, last_seq)
        await conn.execute(_DELETE_EVENTS, instrument_id, pruned_seq, upto)
        pruned_seq = upto
        log.debug("%s: deleted events up to %d", instrument_id, upto)


async def require_whole_log(conn: Connection, lease: Lease) -> None:
    """Raises LogPrunedError when commands or events of `lease` were deleted."""
    row = await conn.fetchrow(_BEGINNING, lease.instrument_id)
    assert row is not None, "Expected a row of two values"
    if lease.command_seq and (row["command_seq"] != 1 or row["pruned_seq"]):
        raise LogPrunedError(
            f"no snapshot of {lease.instrument_id} is of use, and its log cannot give the book: expected commands from"
            f" 1 on and no event deleted, was commands from {row['command_seq']} on and events deleted up to"
            f" {row['pruned_seq'] or 0}; bring matching.snapshots back from a backup"
        )

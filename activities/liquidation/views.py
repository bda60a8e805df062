"""What others read of liquidations: the list for operators, and users' places in the deleveraging queue."""

from collections.abc import Sequence

from activities.liquidation.accounts import Marks
from activities.liquidation.rows import QueueRow
from activities.liquidation.sql import QUEUE_POSITION
from domain.clock import iso
from domain.liquidation_saga import liquidation_workflow_id
from storage.db import Connection, Pool
from storage.rows import column_list, read


async def read_liquidations(
    conn: Connection | Pool, status: str | None, cursor: int | None, limit: int
) -> list[QueueRow]:
    """Liquidations (of one status, if told) before `cursor`, newest first."""
    rows = await conn.fetch(
        f"SELECT {column_list(QueueRow)} FROM risk.liquidation_queue WHERE ($1::text IS NULL OR status = $1)"
        " AND ($2::bigint IS NULL OR liquidation_id < $2) ORDER BY liquidation_id DESC LIMIT $3",
        status,
        cursor,
        limit,
    )
    return read(QueueRow, rows)


async def deleverage_ranks(
    conn: Connection | Pool, user_id: int, instrument_ids: Sequence[str], marks: Marks
) -> dict[str, int]:
    """Where a user's open positions stand in the queue of those who would be deleveraged, by instrument: from 5, the
    first fifth, to 1, the last. None is given for instruments without a mark price."""
    ranks = {}
    for name in instrument_ids:
        if name in marks:
            row = await conn.fetchrow(QUEUE_POSITION, user_id, name, marks[name])
            assert row is not None, "Expected a row of two counts"
            ranks[name] = 5 - min(4, 5 * row["ahead"] // max(row["total"], 1))
    return ranks


def liquidation_view(row: QueueRow) -> dict[str, object]:
    """A liquidation as operators see it."""
    return {
        "liquidationId": row.liquidation_id,
        "positionId": str(row.position_id),
        "userId": str(row.user_id),
        "instrumentId": row.instrument_id,
        "marginMode": row.margin_mode,
        "reason": row.reason,
        "status": row.status,
        "workflowId": liquidation_workflow_id(row.position_id, row.liquidation_id),
        "createdAt": iso(row.created_at),
        "updatedAt": iso(row.updated_at),
    }

"""Telling users what their positions are worth, whenever a mark has moved it enough."""

from collections.abc import Sequence
from datetime import timedelta
from decimal import Decimal

from activities.positions.rows import PositionRow
from activities.positions.status import lock_confirmed
from activities.positions.views import events_of, position_view
from domain.margin import Tier
from storage import outbox
from storage.db import Connection
from storage.outbox import UserPush
from storage.rows import column_list, read

# A position is told of again when its unrealised profit has moved by this fraction of its margin.
TOLD_PNL_SHARE = Decimal("0.1")


async def tell_moved(
    conn: Connection, instrument_id: str, mark: Decimal, tiers: Sequence[Tier], after_user_id: int, limit: int
) -> int | None:
    """Publish PositionUpdated and RiskUpdate for positions of the next `limit` users whose profit has moved enough
    since last told, and write down that they were.

    Answers after whom to go on, None at the end. A move counts from TOLD_PNL_SHARE of the position's margin. What
    settlement has not confirmed yet is left to it: position and margin do not fit together before.
    """
    async with conn.transaction():
        records = await conn.fetch(
            f"SELECT {column_list(PositionRow)}, told_price FROM positions.positions"
            " WHERE instrument_id = $1 AND user_id > $2 ORDER BY user_id LIMIT $3",
            instrument_id,
            after_user_id,
            limit,
        )
        rows = read(PositionRow, records)
        told = [record["told_price"] for record in records]
        moved = [row.position_id for row, price in zip(rows, told, strict=True) if _has_moved(row, price, mark)]
        if moved:
            confirmed = [found.position for found in await lock_confirmed(conn, moved) if found.is_adopted]
            await _tell(conn, confirmed, mark, tiers)
    return rows[-1].user_id if len(rows) == limit else None


async def _tell(conn: Connection, positions: Sequence[PositionRow], mark: Decimal, tiers: Sequence[Tier]) -> None:
    """Tell users what their positions are worth at this mark, and write down that they were told."""
    position_ids = [row.position_id for row in positions]
    await conn.execute("UPDATE positions.positions SET told_price = $2 WHERE position_id = ANY($1)", position_ids, mark)
    await conn.execute(
        "INSERT INTO positions.position_events (user_id, instrument_id, type, status, side, price, quantity,"
        "  signed_quantity_after, entry_notional_after, leverage, cause)"
        " SELECT user_id, instrument_id, 'MARK', 'TOLD', CASE WHEN signed_quantity > 0 THEN 'LONG' ELSE 'SHORT' END,"
        "  $2, abs(signed_quantity), signed_quantity, entry_notional, leverage, 'MARK'"
        " FROM positions.positions WHERE position_id = ANY($1) ORDER BY user_id",
        position_ids,
        mark,
    )
    views = [(row, position_view(row, mark, tiers)) for row in positions]
    await outbox.emit(
        conn,
        [event for row, view in views for event in events_of(row.user_id, row.instrument_id, view)],
        [UserPush(row.user_id, "position", view) for row, view in views],
    )


async def forget_told_marks(conn: Connection, kept: timedelta, limit: int) -> int:
    """Delete up to `limit` events of positions that only told of a mark, longer than `kept` ago; how many it was."""
    status = await conn.execute(
        "DELETE FROM positions.position_events WHERE event_id IN (SELECT event_id FROM positions.position_events"
        " WHERE cause = 'MARK' AND created_at < now() - $1::interval ORDER BY created_at LIMIT $2)",
        kept,
        limit,
    )
    return int(status.split()[-1])


def _has_moved(row: PositionRow, told: Decimal | None, mark: Decimal) -> bool:
    if not row.signed_quantity:
        return False
    return told is None or abs(row.signed_quantity * (mark - told)) >= row.margin * TOLD_PNL_SHARE

"""What is kept and told of the risk of positions that are liquidated or warned."""

from collections.abc import Sequence
from datetime import timedelta
from decimal import Decimal

from activities.liquidation.accounts import Marks
from activities.liquidation.rows import SnapshotRow
from activities.matching.instruments import Rules
from activities.positions.rows import PositionRow
from activities.positions.views import position_view
from domain.events import RiskUpdate
from domain.margin import Tier, maintenance_margin, margin_ratio, unrealized_pnl
from storage.db import Connection
from storage.rows import batch, column_list, unnest

SNAPSHOTS_KEPT = timedelta(days=30)
# What fits into the column.
RATIO_MAX = Decimal(10**11)
_RECORD = f"INSERT INTO risk.risk_snapshots ({column_list(SnapshotRow)}) SELECT * FROM {unnest(SnapshotRow)}"


async def forget_snapshots(conn: Connection, limit: int) -> int:
    """Delete up to `limit` risk snapshots older than SNAPSHOTS_KEPT; how many it was."""
    status = await conn.execute(
        "DELETE FROM risk.risk_snapshots WHERE snapshot_id IN (SELECT snapshot_id FROM risk.risk_snapshots"
        " WHERE created_at < now() - $1::interval ORDER BY created_at LIMIT $2)",
        SNAPSHOTS_KEPT,
        limit,
    )
    return int(status.split()[-1])


async def record_risk(
    conn: Connection,
    positions: Sequence[PositionRow],
    marks: Marks,
    rules: Rules,
    status: str | None = None,
) -> None:
    """Keep what the risk of these positions was when their status changed; nothing is known without a mark price."""
    rows = [
        _snapshot(p, marks[p.instrument_id], rules.tiers[p.instrument_id], status or p.status)
        for p in positions
        if p.instrument_id in marks
    ]
    await conn.execute(_RECORD, *batch(SnapshotRow, rows))


def _snapshot(position: PositionRow, mark: Decimal, tiers: Sequence[Tier], status: str) -> SnapshotRow:
    quantity, entry, margin = position.signed_quantity, position.entry_notional, position.margin
    # What a cross position is up against depends on the whole account: no figures of its own (as `position_view`).
    is_cross = position.margin_mode == "CROSS"
    ratio = None if is_cross else margin_ratio(quantity, entry, margin, mark)
    return SnapshotRow(
        user_id=position.user_id,
        instrument_id=position.instrument_id,
        mark_price=mark,
        margin=margin,
        unrealized_pnl=unrealized_pnl(quantity, entry, mark),
        maintenance_margin=maintenance_margin(abs(quantity) * mark, tiers),
        margin_ratio=None if ratio is None else max(min(ratio, RATIO_MAX), -RATIO_MAX),
        liquidation_price=None if is_cross else position.liquidation_price,
        status=status,
    )


def names_of(position: PositionRow) -> dict[str, str]:
    """Which position a notice is about."""
    return {"positionId": str(position.position_id), "instrumentId": position.instrument_id}


def figures_of(position: PositionRow, marks: Marks, rules: Rules) -> dict[str, str | None]:
    """How near a position is to its liquidation, for its user."""
    name = position.instrument_id
    view = position_view(position, marks.get(name), rules.tiers[name])
    return {key: view[key] for key in ("markPrice", "marginRatio", "liquidationPrice", "quantity")}


def risk_update(position: PositionRow, marks: Marks, rules: Rules, status: str | None = None) -> RiskUpdate:
    """The same for other services."""
    figures = figures_of(position, marks, rules)
    return RiskUpdate(
        user_id=str(position.user_id),
        instrument_id=position.instrument_id,
        margin_ratio=figures["marginRatio"],
        liquidation_price=figures["liquidationPrice"],
        status=status or position.status,
    )

"""A liquidation's row in `risk.liquidation_queue`, from its begin to its end."""

from activities.liquidation.accounts import Marks
from activities.liquidation.rows import RunningRow
from activities.liquidation.telling import names_of, record_risk, risk_update
from activities.matching.instruments import Rules
from activities.positions.status import change_status
from domain.liquidation_saga import Ending, Takeover
from storage import outbox
from storage.db import Connection, Pool
from storage.outbox import UserPush
from storage.rows import column_list

_BEGIN = f"""
    UPDATE risk.liquidation_queue SET status = 'PROCESSING', updated_at = now()
    WHERE liquidation_id = $1 AND status IN ('PENDING', 'PROCESSING') RETURNING {column_list(RunningRow)}
"""


async def take_over(conn: Connection, liquidation_id: int) -> Takeover:
    """Make the row PROCESSING; whose orders have to go, and where. Not open: it has been done before."""
    record = await conn.fetchrow(_BEGIN, liquidation_id)
    if record is None:
        return Takeover(liquidation_id, is_open=False)
    row = RunningRow(*record)
    names = [row.instrument_id]
    if row.margin_mode == "CROSS":
        names = await conn.fetchval(
            "SELECT array_agg(instrument_id ORDER BY instrument_id) FROM risk.exposures"
            " WHERE user_id = $1 AND margin_mode = 'CROSS'",
            row.user_id,
        )
    return Takeover(liquidation_id, is_open=True, user_id=row.user_id, instrument_ids=tuple(names))


async def stop_submitting(conn: Connection | Pool, liquidation_id: int) -> None:
    """Let nothing be submitted from here on."""
    await conn.execute(
        "UPDATE risk.liquidation_queue SET stopping = TRUE, updated_at = now() WHERE liquidation_id = $1"
        " AND status IN ('PENDING', 'PROCESSING')",
        liquidation_id,
    )


async def give_back(conn: Connection, ending: Ending, marks: Marks, rules: Rules) -> None:
    """End the row; the position is its user's again (or closed), and they are told."""
    row = await conn.fetchrow(
        "UPDATE risk.liquidation_queue SET status = $2, updated_at = now() WHERE liquidation_id = $1"
        " AND status IN ('PENDING', 'PROCESSING') RETURNING liquidation_id, position_id, user_id",
        ending.liquidation_id,
        ending.status,
    )
    if row is None:
        return
    back = await change_status(conn, [row["position_id"]], "LIQUIDATION_PENDING", "OPEN")
    await record_risk(conn, back, marks, rules)
    view = {"liquidationId": row["liquidation_id"], "status": ending.status}
    pushes = [UserPush(row["user_id"], "liquidation", {**view, **names_of(p)}) for p in back] or [
        UserPush(row["user_id"], "liquidation", {**view, "positionId": str(row["position_id"])})
    ]
    await outbox.emit(conn, [risk_update(p, marks, rules) for p in back], pushes)

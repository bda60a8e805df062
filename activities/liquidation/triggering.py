"""Who has to be liquidated.

From the row in `risk.liquidation_queue` on the position is the liquidation's: its user's orders are refused. The row,
the position's status and the events about it are written in one transaction; every later step is a stored step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from decimal import Decimal

from activities.liquidation.accounts import Marks, read_accounts
from activities.liquidation.rows import CrossedRow, DueRow
from activities.liquidation.sql import CROSSED, NOT_NOW
from activities.liquidation.telling import figures_of, names_of, record_risk, risk_update
from activities.matching.instruments import Rules
from activities.positions.status import change_status, lock_confirmed
from activities.positions.views import position_view
from activities.risk.exposures import lock_exposures
from domain.events import BusinessEvent, LiquidationTriggered
from domain.liquidation import must_liquidate
from domain.liquidation_saga import liquidation_workflow_id
from storage import outbox
from storage.db import Connection
from storage.outbox import UserPush
from storage.rows import batch, column_list, unnest

# How many positions one look at a mark price takes up at most, per instrument and side; the next look goes on.
TRIGGERED_MAX = 500
# What an operator aborted is left alone for so long.
ABORT_PAUSE = timedelta(minutes=15)

_QUEUE = f"""
    INSERT INTO risk.liquidation_queue ({column_list(DueRow)}) SELECT * FROM {unnest(DueRow)}
    RETURNING position_id, liquidation_id
"""


@dataclass(frozen=True, slots=True)
class Opened:
    """A liquidation that has to run as a workflow."""

    position_id: int
    liquidation_id: int
    user_id: int
    instrument_id: str

    @property
    def workflow_id(self) -> str:
        """The id of its workflow."""
        return liquidation_workflow_id(self.position_id, self.liquidation_id)


@dataclass(frozen=True, slots=True)
class Endangered:
    """A position to be liquidated now, at which mark, and why."""

    position_id: int
    user_id: int
    instrument_id: str
    mark: Decimal
    margin_mode: str
    reason: str


async def trigger(conn: Connection, marks: Marks, rules: Rules) -> list[Opened]:
    """Queue every position that `marks` (live, of instruments in trading) make due, one transaction.

    Isolated positions are due by their own margin; of a cross account under water, one position at a time
    (`Account.next_to_close`). What `marks` leave out is valued at its last mark, and not closed.
    """
    async with conn.transaction():
        due = await _due_isolated(conn, marks, rules) + await _due_cross(conn, marks)
        return await _open(conn, due, rules) if due else []


async def stalled(conn: Connection, older_than: timedelta, limit: int) -> list[Opened]:
    """Liquidations that have not been begun for so long, or not moved for ten times that: perhaps without workflow."""
    rows = await conn.fetch(
        "SELECT position_id, liquidation_id, user_id, instrument_id FROM risk.liquidation_queue"
        " WHERE status IN ('PENDING', 'PROCESSING')"
        " AND updated_at < now() - CASE status WHEN 'PENDING' THEN $1::interval ELSE 10 * $1::interval END"
        " ORDER BY random() LIMIT $2",
        older_than,
        limit,
    )
    return [Opened(*row) for row in rows]


async def _due_isolated(conn: Connection, marks: Marks, rules: Rules) -> list[Endangered]:
    records = await conn.fetch(CROSSED, list(marks), list(marks.values()), TRIGGERED_MAX, ABORT_PAUSE)
    return [
        Endangered(row.position_id, row.user_id, row.instrument_id, row.mark, "ISOLATED", "MARGIN_RATIO")
        for row in (CrossedRow(**record) for record in records)
        if must_liquidate(row.holding, row.mark, rules.tiers[row.instrument_id])
    ]


async def _due_cross(conn: Connection, marks: Marks) -> list[Endangered]:
    accounts = await read_accounts(conn, marks)
    under_water = {key: account for key, account in accounts.items() if account.is_due}
    if not under_water:
        return []
    not_now = await conn.fetch(NOT_NOW, sorted({user_id for user_id, _ in under_water}), ABORT_PAUSE)
    left_alone = {row["user_id"] for row in not_now}
    chosen = [a.next_to_close() for (user_id, _), a in under_water.items() if user_id not in left_alone]
    return [
        Endangered(row.position_id, row.user_id, row.instrument_id, marks[row.instrument_id], "CROSS", "ACCOUNT_EQUITY")
        for row in chosen
        if row is not None
    ]


async def _open(conn: Connection, due: Sequence[Endangered], rules: Rules) -> list[Opened]:
    by_id = {endangered.position_id: endangered for endangered in due}
    # A check that holds these locks counts its orders before we do; one that comes later sees the row.
    await lock_exposures(conn, sorted((e.user_id, e.instrument_id) for e in due))
    # What was filled since it was found due waits for the next look, with the margin that belongs to it.
    confirmed = [found.position.position_id for found in await lock_confirmed(conn, list(by_id))]
    taken = await change_status(conn, confirmed, "OPEN", "LIQUIDATION_PENDING")
    if not taken:
        return []
    chosen = [by_id[position.position_id] for position in taken]
    queued = [DueRow(e.position_id, e.user_id, e.instrument_id, e.reason, e.margin_mode) for e in chosen]
    rows = await conn.fetch(_QUEUE, *batch(DueRow, queued))
    ids = {row["position_id"]: row["liquidation_id"] for row in rows}
    marks = {endangered.instrument_id: endangered.mark for endangered in chosen}
    events: list[BusinessEvent] = []
    pushes: list[UserPush] = []
    for position, endangered in zip(taken, chosen, strict=True):
        user_id, name = position.user_id, position.instrument_id
        liquidation_id = ids[position.position_id]
        events.append(
            LiquidationTriggered(
                position_id=str(position.position_id),
                user_id=str(user_id),
                instrument_id=name,
                reason=endangered.reason,
                liquidation_id=liquidation_id,
            )
        )
        events.append(risk_update(position, marks, rules))
        pushes.append(UserPush(user_id, "position", position_view(position, marks[name], rules.tiers[name])))
        view = {"liquidationId": liquidation_id, "status": "TRIGGERED", "reason": endangered.reason}
        pushes.append(
            UserPush(user_id, "liquidation", {**view, **names_of(position), **figures_of(position, marks, rules)})
        )
    await record_risk(conn, taken, marks, rules)
    await outbox.emit(conn, events, pushes)
    return [Opened(p.position_id, ids[p.position_id], p.user_id, p.instrument_id) for p in taken]

"""Warnings to users whose margin comes near the maintenance margin."""

from decimal import Decimal

from activities.liquidation.accounts import Marks, read_accounts
from activities.liquidation.sql import NEAR, RECOVERED
from activities.liquidation.telling import figures_of, names_of, record_risk, risk_update
from activities.matching.instruments import Rules
from activities.positions.status import lock_confirmed, mark_warned
from domain.liquidation import WARNING_FACTOR
from storage import outbox
from storage.db import Connection
from storage.outbox import UserPush

WARNED_MAX = 500
# A warning may be given again once mark is so much better than the warning price.
WARNING_RESET = Decimal("0.01")


async def warn(conn: Connection, marks: Marks, rules: Rules) -> int:
    """Tell users whose margin comes near the maintenance margin, once per crossing; how many positions it was.

    What settlement has not confirmed yet waits for the next look: position and margin do not fit together before.
    """
    names, prices = list(marks), list(marks.values())
    async with conn.transaction():
        near = await conn.fetch(NEAR, names, prices, WARNED_MAX)
        recovered = await conn.fetch(RECOVERED, names, prices, WARNED_MAX, WARNING_RESET)
        cross_near, cross_recovered = await _cross_warnings(conn, marks)
        await mark_warned(conn, [row["position_id"] for row in recovered] + cross_recovered, warned=False)
        confirmed = await lock_confirmed(conn, [row["position_id"] for row in near] + cross_near)
        adopted = [found.position.position_id for found in confirmed if found.is_adopted]
        warned = await mark_warned(conn, adopted, warned=True)
        if not warned:
            return 0
        await record_risk(conn, warned, marks, rules, "WARNING")
        pushes = [
            UserPush(p.user_id, "liquidation", {**names_of(p), "status": "WARNING", **figures_of(p, marks, rules)})
            for p in warned
        ]
        await outbox.emit(conn, [risk_update(p, marks, rules, "WARNING") for p in warned], pushes)
    return len(warned)


async def _cross_warnings(conn: Connection, marks: Marks) -> tuple[list[int], list[int]]:
    """Ids of cross positions whose users have to be warned, and of those whose warning is over."""
    near: list[int] = []
    recovered: list[int] = []
    for account in (await read_accounts(conn, marks)).values():
        if account.is_unsettled:
            continue
        is_near = account.equity <= account.maintenance * WARNING_FACTOR
        for row in account.rows:
            if row.warned and not is_near:
                recovered.append(row.position_id)
            elif is_near and not row.warned and row.status == "OPEN":
                near.append(row.position_id)
    return near, recovered

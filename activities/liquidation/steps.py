"""Liquidations as the risk service runs them: who has to be liquidated, and what is next in each liquidation.

From the row in `risk.liquidation_queue` on the position is the liquidation's: its user's orders are refused. The row,
the position's status and the events about it are written in one transaction; every later step is a stored step.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import asyncpg
from redis.asyncio import Redis
from temporalio import activity

from activities.ledger.book import lock_money
from activities.market.prices import latest_marks
from activities.matching.instruments import RuleBook, Rules, read_instruments
from activities.matching.steps import append_commands
from activities.orders.acceptance import submit_liquidation_order
from activities.positions.rows import PositionRow
from activities.positions.status import change_status, lock_confirmed, mark_warned
from activities.positions.views import position_view
from activities.risk.collateral import read_collateral
from activities.risk.exposures import lock_exposures, take_in_liquidation_order
from domain.clock import iso, to_ms
from domain.events import BusinessEvent, LiquidationTriggered, RiskUpdate
from domain.instruments import Instrument
from domain.liquidation import (
    WARNING_FACTOR,
    Holding,
    deleverage_price,
    deleverage_score,
    insurance_needed,
    justifying_price,
    must_liquidate,
    quantity_to_close,
    worst_price,
)
from domain.liquidation_saga import (
    BEGIN,
    DELEVERAGE,
    FINISH,
    PLAN,
    STOP,
    SUBMIT,
    Ending,
    Plan,
    PlanRequest,
    Submission,
    Takeover,
    liquidation_workflow_id,
)
from domain.margin import maintenance_margin, margin_ratio, unrealized_pnl
from domain.matching import Deleverage
from domain.money import AMOUNT_STEP, ZERO, plain
from storage import outbox
from storage.db import Connection, Pool, columns
from storage.once import first_result, store_result
from storage.outbox import UserPush
from storage.reference_prices import marks_are_live, read_reference_prices

# How many positions one look at a mark price takes up at most, per instrument and side; the next look goes on.
TRIGGERED_MAX = 500
WARNED_MAX = 500
# A warning may be given again once mark is so much better than the warning price.
WARNING_RESET = Decimal("0.01")
# What an operator aborted is left alone for so long.
ABORT_PAUSE = timedelta(minutes=15)
# Counterparties are chosen for so many times the quantity, should some of them be gone when the engine comes to it.
COUNTERPARTIES_FACTOR = 2
COUNTERPARTIES_MAX = 500
# Positions of one side that a user's place in the queue is told by.
SAMPLED_MAX = 2_000
SNAPSHOTS_KEPT = timedelta(days=30)

Marks = Mapping[str, Decimal]

# A position is looked at when its price is crossed. Prices are kept to 8 decimals: what that hides is decided exactly.
# Left alone are positions with fills that are not booked yet, and those that an operator took back.
_CROSSED = f"""
    SELECT p.*, m.mark, coalesce(h.position_margin, 0) AS margin
    FROM unnest($1::text[], $2::numeric[]) AS m (instrument_id, mark) CROSS JOIN LATERAL (
        (SELECT position_id, user_id, instrument_id, signed_quantity, entry_notional FROM positions.v_positions
         WHERE instrument_id = m.instrument_id AND signed_quantity > 0 AND status = 'OPEN'
           AND margin_mode = 'ISOLATED' AND liquidation_price >= m.mark - {AMOUNT_STEP:f}
         ORDER BY liquidation_price DESC LIMIT $3)
        UNION ALL
        (SELECT position_id, user_id, instrument_id, signed_quantity, entry_notional FROM positions.v_positions
         WHERE instrument_id = m.instrument_id AND signed_quantity < 0 AND status = 'OPEN'
           AND margin_mode = 'ISOLATED' AND liquidation_price <= m.mark + {AMOUNT_STEP:f}
         ORDER BY liquidation_price LIMIT $3)) p
    LEFT JOIN ledger.v_margin_holds h ON h.user_id = p.user_id AND h.instrument_id = p.instrument_id
    WHERE NOT EXISTS (SELECT FROM risk.liquidation_queue q
                      WHERE q.position_id = p.position_id AND q.status = 'ABORTED'
                        AND q.updated_at > now() - $4::interval)
      AND NOT EXISTS (SELECT FROM positions.v_fills f JOIN orders.v_cursors c ON c.instrument_id = f.instrument_id
                      WHERE f.instrument_id = p.instrument_id AND f.user_id = p.user_id AND f.seq > c.applied_seq)
    ORDER BY p.user_id
"""
# Equity of everybody with cross positions at $1, $2: what is available or held for them, and unrealised profit. A
# position in an instrument that never had a mark price is valued at what was paid for it. `unsettled`: fills of the
# user are in the positions, and perhaps not in the ledger yet.
_CROSS_POSITIONS = """
    WITH fresh AS MATERIALIZED (
        SELECT DISTINCT f.user_id FROM positions.v_cursors c CROSS JOIN LATERAL (
            SELECT user_id FROM positions.v_fills
            WHERE instrument_id = c.instrument_id AND seq > c.confirmed_seq ORDER BY seq OFFSET 0) f),
    valued AS MATERIALIZED (
        SELECT i.instrument_id, i.quote_asset, i.state, coalesce(live.mark, last.mark_price) AS mark
        FROM matching.v_instruments i
        LEFT JOIN unnest($1::text[], $2::numeric[]) AS live (instrument_id, mark) USING (instrument_id)
        LEFT JOIN LATERAL (SELECT mark_price FROM market.v_mark_prices p
            WHERE p.instrument_id = i.instrument_id AND live.mark IS NULL
            ORDER BY calculated_at DESC LIMIT 1) last ON TRUE)
    SELECT p.position_id, p.user_id, p.instrument_id, p.signed_quantity, p.entry_notional, p.status, p.warned, i.mark,
           i.quote_asset, i.state, b.available,
           coalesce(h.order_margin, 0) + coalesce(h.position_margin, 0) AS held,
           coalesce(p.signed_quantity * i.mark - sign(p.signed_quantity) * p.entry_notional, 0) AS pnl,
           n.notional * t.maintenance_margin_rate - t.cumulative AS maintenance,
           coalesce(idle.held, 0) AS idle_held, fresh.user_id IS NOT NULL AS unsettled
    FROM positions.v_positions p
    JOIN valued i USING (instrument_id)
    JOIN ledger.v_balances b ON b.user_id = p.user_id AND b.asset = i.quote_asset
    LEFT JOIN ledger.v_margin_holds h ON h.user_id = p.user_id AND h.instrument_id = p.instrument_id
    CROSS JOIN LATERAL (SELECT coalesce(abs(p.signed_quantity) * i.mark, p.entry_notional) AS notional) n
    LEFT JOIN LATERAL (
        SELECT maintenance_margin_rate, cumulative FROM risk.leverage_tiers
        WHERE instrument_id = p.instrument_id AND notional_from <= n.notional
        ORDER BY notional_from DESC LIMIT 1) t ON TRUE
    LEFT JOIN LATERAL (
        SELECT sum(o.order_margin) AS held FROM ledger.v_margin_holds o
        JOIN risk.exposures e USING (user_id, instrument_id)
        WHERE o.user_id = p.user_id AND o.asset = i.quote_asset AND e.margin_mode = 'CROSS'
          AND e.signed_quantity = 0) idle ON TRUE
    LEFT JOIN fresh ON fresh.user_id = p.user_id
    WHERE p.margin_mode = 'CROSS' AND p.signed_quantity <> 0 AND ($3::bigint IS NULL OR p.user_id = $3)
    ORDER BY p.user_id, p.instrument_id
"""
# Accounts that cannot be judged now: something of theirs is not booked yet, in liquidation, or taken back.
_NOT_NOW = """
    SELECT u.user_id FROM unnest($1::bigint[]) AS u (user_id)
    WHERE EXISTS (SELECT FROM risk.liquidation_queue q WHERE q.user_id = u.user_id AND q.margin_mode = 'CROSS'
                  AND q.status IN ('PENDING', 'PROCESSING'))
       OR EXISTS (SELECT FROM risk.liquidation_queue q JOIN positions.v_positions p USING (position_id)
                  WHERE p.user_id = u.user_id AND p.margin_mode = 'CROSS' AND q.status = 'ABORTED'
                    AND q.updated_at > now() - $2::interval)
       OR EXISTS (SELECT FROM positions.v_fills f JOIN orders.v_cursors c USING (instrument_id)
                  WHERE f.user_id = u.user_id AND f.seq > c.applied_seq)
"""
# Longs are warned when mark is at their warning price or below, shorts above; $4: who is warned already.
_NEAR = """
    SELECT p.position_id FROM unnest($1::text[], $2::numeric[]) AS m (instrument_id, mark) CROSS JOIN LATERAL (
        (SELECT position_id FROM positions.v_positions
         WHERE instrument_id = m.instrument_id AND signed_quantity > 0 AND status = 'OPEN'
           AND margin_mode = 'ISOLATED' AND NOT warned AND warning_price >= m.mark
         ORDER BY warning_price DESC LIMIT $3)
        UNION ALL
        (SELECT position_id FROM positions.v_positions
         WHERE instrument_id = m.instrument_id AND signed_quantity < 0 AND status = 'OPEN'
           AND margin_mode = 'ISOLATED' AND NOT warned AND warning_price <= m.mark
         ORDER BY warning_price LIMIT $3)) p
"""
_RECOVERED = """
    SELECT p.position_id FROM unnest($1::text[], $2::numeric[]) AS m (instrument_id, mark) CROSS JOIN LATERAL (
        (SELECT position_id FROM positions.v_positions
         WHERE instrument_id = m.instrument_id AND signed_quantity > 0 AND status = 'OPEN'
           AND margin_mode = 'ISOLATED' AND warned AND warning_price < m.mark * (1 - $4::numeric)
         ORDER BY warning_price LIMIT $3)
        UNION ALL
        (SELECT position_id FROM positions.v_positions
         WHERE instrument_id = m.instrument_id AND signed_quantity < 0 AND status = 'OPEN'
           AND margin_mode = 'ISOLATED' AND warned AND warning_price > m.mark * (1 + $4::numeric)
         ORDER BY warning_price DESC LIMIT $3)) p
"""
# `unanswered`: the engine has not carried out the last command, or settlement has not finished with what came of it.
_SITUATION = """
    SELECT q.*, p.signed_quantity, p.entry_notional, i.state, i.quote_asset,
           coalesce(h.position_margin, 0) AS margin,
           EXISTS (SELECT FROM risk.exposures e WHERE e.user_id = q.user_id AND e.open_orders > 0
                   AND (e.instrument_id = q.instrument_id OR q.margin_mode = 'CROSS' AND e.margin_mode = 'CROSS'))
               AS has_orders,
           EXISTS (SELECT FROM positions.v_fills f JOIN orders.v_cursors c USING (instrument_id)
                   WHERE f.user_id = q.user_id AND f.seq > c.applied_seq
                     AND (f.instrument_id = q.instrument_id OR q.margin_mode = 'CROSS')) AS unbooked,
           q.command_seq > m.command_seq
               OR EXISTS (SELECT FROM matching.v_events e WHERE e.instrument_id = q.instrument_id
                          AND e.seq > o.applied_seq AND e.command_seq <= q.command_seq) AS unanswered
    FROM risk.liquidation_queue q
    JOIN positions.v_positions p USING (position_id)
    JOIN matching.v_instruments i ON i.instrument_id = q.instrument_id
    JOIN matching.v_cursors m ON m.instrument_id = q.instrument_id
    JOIN orders.v_cursors o ON o.instrument_id = q.instrument_id
    LEFT JOIN ledger.v_margin_holds h ON h.user_id = q.user_id AND h.instrument_id = q.instrument_id
    WHERE q.liquidation_id = $1
"""
# `domain.liquidation.deleverage_score` at a mark price, of positions with their unrealised `pnl`.
_SCORE = (
    "CASE WHEN pnl > 0 THEN pnl / entry_notional * (abs(signed_quantity) * {mark} / (margin + pnl))"
    " ELSE pnl / entry_notional / (abs(signed_quantity) * {mark} / (margin + pnl)) END"
)
# Ranked by score; who would be bankrupt at mark ($2) or at the price ($3) is left
# out. As many as hold COUNTERPARTIES_FACTOR times the quantity: the last of them begins below it.
_COUNTERPARTIES = f"""
    WITH held AS (
        SELECT user_id, signed_quantity, entry_notional, margin,
               signed_quantity * $2 - sign(signed_quantity) * entry_notional AS pnl,
               signed_quantity * $3 - sign(signed_quantity) * entry_notional AS pnl_there
        FROM positions.v_positions p
        WHERE instrument_id = $1 AND sign(signed_quantity) = $4 AND status = 'OPEN'),
    scored AS (
        SELECT *, {_SCORE.format(mark="$2")} AS score
        FROM held WHERE margin + pnl > 0 AND margin + pnl_there > 0 AND entry_notional > 0),
    ranked AS (
        SELECT *, sum(abs(signed_quantity)) OVER (ORDER BY score DESC, user_id) - abs(signed_quantity) AS before
        FROM scored)
    SELECT user_id, signed_quantity, entry_notional, margin FROM ranked WHERE before < $5
    ORDER BY score DESC, user_id LIMIT $6
"""


# How many positions on the same side rank before a user's, and how many there are: among some, if there are very many,
# since it is a hint to the user and not the order in which anybody is deleveraged.
_QUEUE_POSITION = f"""
    WITH own AS (SELECT * FROM positions.v_positions WHERE user_id = $1 AND instrument_id = $2),
    side AS (
        SELECT *, signed_quantity * $3 - sign(signed_quantity) * entry_notional AS pnl
        FROM (SELECT * FROM own UNION ALL
              (SELECT p.* FROM positions.v_positions p JOIN own ON sign(p.signed_quantity) = sign(own.signed_quantity)
               WHERE p.instrument_id = $2 AND p.user_id <> $1 AND p.status = 'OPEN' LIMIT {SAMPLED_MAX})) found),
    scored AS (
        SELECT user_id, {_SCORE.format(mark="$3")} AS score
        FROM side WHERE margin + pnl > 0 AND entry_notional > 0)
    SELECT count(*) FILTER (WHERE score > (SELECT score FROM scored WHERE user_id = $1)) AS ahead, count(*) AS total
    FROM scored
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
    """A position to be liquidated now, and why."""

    row: asyncpg.Record
    margin_mode: str
    reason: str


class LiquidationActivities:
    """Activities on the risk service's own tables."""

    def __init__(self, pool: Pool, redis: Redis) -> None:
        self._pool = pool
        self._redis = redis
        self._rules = RuleBook()

    @activity.defn(name=BEGIN)
    async def begin(self, liquidation_id: int) -> Takeover:
        """The row becomes PROCESSING; answers whose orders have to go. Not open: it has been done before."""
        async with self._pool.acquire() as conn, conn.transaction():
            row = await conn.fetchrow(
                "UPDATE risk.liquidation_queue SET status = 'PROCESSING', updated_at = now() WHERE liquidation_id = $1"
                " AND status IN ('PENDING', 'PROCESSING') RETURNING user_id, instrument_id, margin_mode",
                liquidation_id,
            )
            if row is None:
                return Takeover(liquidation_id, is_open=False)
            names = [row["instrument_id"]]
            if row["margin_mode"] == "CROSS":
                names = await conn.fetchval(
                    "SELECT array_agg(instrument_id ORDER BY instrument_id) FROM risk.exposures"
                    " WHERE user_id = $1 AND margin_mode = 'CROSS'",
                    row["user_id"],
                )
        return Takeover(liquidation_id, is_open=True, user_id=row["user_id"], instrument_ids=tuple(names))

    @activity.defn(name=PLAN)
    async def plan(self, request: PlanRequest) -> Plan:
        """What is next, from one snapshot of all services and the newest mark price. Changes nothing."""
        prices = await read_reference_prices(self._redis, list((await read_instruments(self._pool)).keys()))
        now = datetime.now(UTC)
        marks = {name: price.mark for name, price in prices.items() if marks_are_live(price, now)}
        async with self._pool.acquire() as conn, conn.transaction(isolation="repeatable_read", readonly=True):
            return await _plan(conn, request, marks, await self._rules.rules(conn))

    @activity.defn(name=SUBMIT)
    async def submit(self, submission: Submission) -> bool:
        """Insert the liquidation order and append it to the engine's log; False once an operator has stopped it."""
        step_id = f"liquidate:{submission.liquidation_id}:{submission.round}"
        async with self._pool.acquire() as conn, conn.transaction():
            done = await first_result(conn, "risk", step_id, bool)
            if done is None:
                done = await _submit(conn, submission, await self._rules.rules(conn))
                await store_result(conn, "risk", step_id, done)
        return done

    @activity.defn(name=DELEVERAGE)
    async def deleverage(self, submission: Submission) -> int:
        """Append a Deleverage against the ranked opposite positions; how many they are (0: none, nothing appended)."""
        step_id = f"liquidate:{submission.liquidation_id}:{submission.round}"
        async with self._pool.acquire() as conn, conn.transaction():
            done = await first_result(conn, "risk", step_id, int)
            if done is None:
                done = await _deleverage(conn, submission, await self._rules.rules(conn))
                await store_result(conn, "risk", step_id, done)
        return done

    @activity.defn(name=STOP)
    async def stop(self, liquidation_id: int) -> None:
        """From here on nothing is submitted; a submission that is under way has been made, or will not be."""
        await self._pool.execute(
            "UPDATE risk.liquidation_queue SET stopping = TRUE, updated_at = now() WHERE liquidation_id = $1"
            " AND status IN ('PENDING', 'PROCESSING')",
            liquidation_id,
        )

    @activity.defn(name=FINISH)
    async def finish(self, ending: Ending) -> None:
        """The row ends, the position is its user's again (or closed), and they are told."""
        latest = await latest_marks(self._pool, list((await read_instruments(self._pool)).keys()))
        marks = {name: mark.price for name, mark in latest.items()}
        async with self._pool.acquire() as conn, conn.transaction():
            row = await conn.fetchrow(
                "UPDATE risk.liquidation_queue SET status = $2, updated_at = now() WHERE liquidation_id = $1"
                " AND status IN ('PENDING', 'PROCESSING') RETURNING liquidation_id, position_id, user_id",
                ending.liquidation_id,
                ending.status,
            )
            if row is None:
                return
            back = await change_status(conn, [row["position_id"]], "LIQUIDATION_PENDING", "OPEN")
            rules = await self._rules.rules(conn)
            await _record(conn, back, marks, rules)
            view = {"liquidationId": row["liquidation_id"], "status": ending.status}
            pushes = [UserPush(row["user_id"], "liquidation", {**view, **_names(p)}) for p in back] or [
                UserPush(row["user_id"], "liquidation", {**view, "positionId": str(row["position_id"])})
            ]
            await outbox.emit(conn, [_risk_update(p, marks, rules) for p in back], pushes)


async def trigger(conn: Connection, marks: Marks, rules: Rules) -> list[Opened]:
    """Queue every position that `marks` (live, of instruments in trading) make due, one transaction.

    Isolated positions are due by their own margin; of a cross account under water, one position at a time
    (`Account.next_to_close`). What `marks` leave out is valued at its last mark, and not closed.
    """
    async with conn.transaction():
        due = await _due_isolated(conn, marks, rules) + await _due_cross(conn, marks)
        return await _open(conn, due, rules) if due else []


async def warn(conn: Connection, marks: Marks, rules: Rules) -> int:
    """Tell users whose margin comes near the maintenance margin, once per crossing; how many positions it was.

    What settlement has not confirmed yet waits for the next look: position and margin do not fit together before.
    """
    names, prices = list(marks), list(marks.values())
    async with conn.transaction():
        near = await conn.fetch(_NEAR, names, prices, WARNED_MAX)
        recovered = await conn.fetch(_RECOVERED, names, prices, WARNED_MAX, WARNING_RESET)
        cross_near, cross_recovered = await _cross_warnings(conn, marks)
        await mark_warned(conn, [row["position_id"] for row in recovered] + cross_recovered, warned=False)
        confirmed = await lock_confirmed(conn, [row["position_id"] for row in near] + cross_near)
        adopted = [found.position.position_id for found in confirmed if found.is_adopted]
        warned = await mark_warned(conn, adopted, warned=True)
        if not warned:
            return 0
        await _record(conn, warned, marks, rules, "WARNING")
        pushes = [
            UserPush(p.user_id, "liquidation", {**_names(p), "status": "WARNING", **_figures(p, marks, rules)})
            for p in warned
        ]
        await outbox.emit(conn, [_risk_update(p, marks, rules, "WARNING") for p in warned], pushes)
    return len(warned)


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


async def forget_snapshots(conn: Connection, limit: int) -> int:
    """Delete up to `limit` risk snapshots older than SNAPSHOTS_KEPT; how many it was."""
    status = await conn.execute(
        "DELETE FROM risk.risk_snapshots WHERE snapshot_id IN (SELECT snapshot_id FROM risk.risk_snapshots"
        " WHERE created_at < now() - $1::interval ORDER BY created_at LIMIT $2)",
        SNAPSHOTS_KEPT,
        limit,
    )
    return int(status.split()[-1])


async def _due_isolated(conn: Connection, marks: Marks, rules: Rules) -> list[Endangered]:
    rows = await conn.fetch(_CROSSED, list(marks), list(marks.values()), TRIGGERED_MAX, ABORT_PAUSE)
    return [
        Endangered(row, "ISOLATED", "MARGIN_RATIO")
        for row in rows
        if must_liquidate(_holding(row, row["margin"]), row["mark"], rules.tiers[row["instrument_id"]])
    ]


async def _due_cross(conn: Connection, marks: Marks) -> list[Endangered]:
    accounts = await _accounts(conn, marks)
    under_water = {key: account for key, account in accounts.items() if account.is_due}
    if not under_water:
        return []
    not_now = await conn.fetch(_NOT_NOW, sorted({user_id for user_id, _ in under_water}), ABORT_PAUSE)
    left_alone = {row["user_id"] for row in not_now}
    chosen = [a.next_to_close() for (user_id, _), a in under_water.items() if user_id not in left_alone]
    return [Endangered(row, "CROSS", "ACCOUNT_EQUITY") for row in chosen if row is not None]


@dataclass(frozen=True, slots=True)
class Account:
    """A user's cross positions in one asset, valued at the last marks, and what stands behind them all (quote).

    `live`: the instruments whose mark is live; nothing is closed in others, nor where trading stands still.
    """

    rows: list[asyncpg.Record]
    live: Set[str]

    @property
    def equity(self) -> Decimal:
        """Available, held for cross instruments, and unrealised."""
        held = sum((row["held"] + row["pnl"] for row in self.rows), ZERO)
        return Decimal(self.rows[0]["available"] + self.rows[0]["idle_held"] + held)

    @property
    def maintenance(self) -> Decimal:
        """Maintenance margin of all positions."""
        return sum((row["maintenance"] for row in self.rows), ZERO)

    @property
    def is_unsettled(self) -> bool:
        """Whether its equity is in between: fills are in the positions, and perhaps not in the ledger yet."""
        return any(row["unsettled"] for row in self.rows)

    @property
    def is_due(self) -> bool:
        """Whether equity is down to the maintenance margin."""
        return self.equity <= self.maintenance

    def can_close(self, row: asyncpg.Record) -> bool:
        """Whether a position can be closed now."""
        return row["state"] == "TRADING" and row["instrument_id"] in self.live

    def next_to_close(self) -> asyncpg.Record | None:
        """The position with the largest maintenance margin of those that can be closed now; None if none can.

        Those whose loss the account can pay come first: of one that is paid for by the profit of another, the insurance
        fund would have to advance what that brings in later.
        """
        rows = [row for row in self.rows if self.can_close(row)]
        order = [(self.holding(row["instrument_id"]).margin + row["pnl"] >= ZERO, row["maintenance"]) for row in rows]
        return max(zip(order, rows, strict=True), key=lambda pair: pair[0])[1] if rows else None

    def backing(self, row: asyncpg.Record) -> Decimal:
        """What one position may lose until the account is due, and its own maintenance margin."""
        own: Decimal = row["pnl"] - row["maintenance"]
        return self.equity - self.maintenance - own

    def money(self, instrument_id: str) -> Decimal:
        """What the ledger takes from when it books fills of one position: available, and held for the instrument."""
        [mine] = [row for row in self.rows if row["instrument_id"] == instrument_id]
        return Decimal(mine["available"] + mine["held"])

    def holding(self, instrument_id: str) -> Holding:
        """One position with what its user can lose with it: what the ledger takes from when it books its fills
        (available, and held for the instrument), less what the other positions lose beyond their own holds."""
        [mine] = [row for row in self.rows if row["instrument_id"] == instrument_id]
        others = sum((max(ZERO, -row["pnl"] - row["held"]) for row in self.rows if row is not mine), ZERO)
        return _holding(mine, max(ZERO, mine["available"] + mine["held"] - others))


async def cross_backing(conn: Connection | Pool, marks: Marks, user_id: int) -> dict[str, Decimal]:
    """What stands behind each open cross position of a user (quote), by instrument: the account's equity without the
    position's own profit, less the others' maintenance margin. What `marks` leave out is valued at its last mark, or at
    entry if it never had one.

    Source: Binance, liquidation price of USD-M futures in cross margin.
    """
    accounts = (await _accounts(conn, marks, user_id)).values()
    return {row["instrument_id"]: account.backing(row) for account in accounts for row in account.rows}


async def _accounts(
    conn: Connection | Pool, marks: Marks, user_id: int | None = None
) -> dict[tuple[int, str], Account]:
    """Cross accounts by user and asset; `marks` are live, what they leave out is valued at its last mark."""
    rows = await conn.fetch(_CROSS_POSITIONS, list(marks), list(marks.values()), user_id)
    found: defaultdict[tuple[int, str], list[asyncpg.Record]] = defaultdict(list)
    for row in rows:
        found[row["user_id"], row["quote_asset"]].append(row)
    return {key: Account(of_user, marks.keys()) for key, of_user in found.items()}


async def _cross_warnings(conn: Connection, marks: Marks) -> tuple[list[int], list[int]]:
    """Ids of cross positions whose users have to be warned, and of those whose warning is over."""
    near: list[int] = []
    recovered: list[int] = []
    for account in (await _accounts(conn, marks)).values():
        if account.is_unsettled:
            continue
        is_near = account.equity <= account.maintenance * WARNING_FACTOR
        for row in account.rows:
            if row["warned"] and not is_near:
                recovered.append(row["position_id"])
            elif is_near and not row["warned"] and row["status"] == "OPEN":
                near.append(row["position_id"])
    return near, recovered


async def _open(conn: Connection, due: Sequence[Endangered], rules: Rules) -> list[Opened]:
    by_id = {endangered.row["position_id"]: endangered for endangered in due}
    # A check that holds these locks counts its orders before we do; one that comes later sees the row.
    await lock_exposures(conn, sorted((e.row["user_id"], e.row["instrument_id"]) for e in due))
    # What was filled since it was found due waits for the next look, with the margin that belongs to it.
    confirmed = [found.position.position_id for found in await lock_confirmed(conn, list(by_id))]
    taken = await change_status(conn, confirmed, "OPEN", "LIQUIDATION_PENDING")
    if not taken:
        return []
    chosen = [by_id[position.position_id] for position in taken]
    rows = await conn.fetch(
        "INSERT INTO risk.liquidation_queue (position_id, user_id, instrument_id, reason, margin_mode)"
        " SELECT * FROM unnest($1::bigint[], $2::bigint[], $3::text[], $4::text[], $5::text[])"
        " RETURNING position_id, liquidation_id",
        *columns(
            [(e.row["position_id"], e.row["user_id"], e.row["instrument_id"], e.reason, e.margin_mode) for e in chosen],
            5,
        ),
    )
    ids = {row["position_id"]: row["liquidation_id"] for row in rows}
    marks = {endangered.row["instrument_id"]: endangered.row["mark"] for endangered in chosen}
    events: list[BusinessEvent] = []
    pushes: list[UserPush] = []
    for position, endangered in zip(taken, chosen, strict=True):
        user_id, name = position.user_id, position.instrument_id
        liquidation_id = ids[position.position_id]
        events.append(
            LiquidationTriggered(str(position.position_id), str(user_id), name, endangered.reason, liquidation_id)
        )
        events.append(_risk_update(position, marks, rules))
        pushes.append(UserPush(user_id, "position", position_view(position, marks[name], rules.tiers[name])))
        view = {"liquidationId": liquidation_id, "status": "TRIGGERED", "reason": endangered.reason}
        pushes.append(
            UserPush(user_id, "liquidation", {**view, **_names(position), **_figures(position, marks, rules)})
        )
    await _record(conn, taken, marks, rules)
    await outbox.emit(conn, events, pushes)
    return [Opened(p.position_id, ids[p.position_id], p.user_id, p.instrument_id) for p in taken]


async def _plan(conn: Connection, request: PlanRequest, marks: Marks, rules: Rules) -> Plan:
    row = await conn.fetchrow(_SITUATION, request.liquidation_id)
    assert row is not None, f"Expected a liquidation {request.liquidation_id}, was none"
    unfinished = _why_not_now(row)
    if unfinished is not None:
        return unfinished
    account = None
    if row["margin_mode"] == "CROSS":
        account = (await _accounts(conn, marks, row["user_id"]))[row["user_id"], row["quote_asset"]]
    standing = _why_it_stands(row, marks)
    if standing is not None:
        return _while_it_stands(account, standing)
    name = row["instrument_id"]
    mark, tiers = marks[name], rules.tiers[name]
    holding = _holding(row, row["margin"]) if account is None else account.holding(name)
    held = row["margin"] if account is None else account.money(name)
    money = await _less_funding(conn, row, row["quote_asset"], held)
    is_due = must_liquidate(holding, mark, tiers) if account is None else account.is_due
    if not is_due:
        return Plan("DONE", "the position has recovered")
    instrument = rules.instruments[name]
    closing = quantity_to_close(holding, mark, tiers, instrument.lot_size)
    # Whether it is due goes by what is held; what may be lost goes by what funding leaves of that.
    holding = replace(holding, margin=max(ZERO, holding.margin - held + money))
    needed = insurance_needed(holding, closing, mark)
    if account is not None:
        # No more than the whole account is short of.
        needed = min(needed, max(ZERO, held - money - account.equity))
    fell_short = bool(request.after) and abs(holding.signed_quantity) > Decimal(request.target)
    return Plan(
        "DELEVERAGE" if fell_short and request.after == "ORDER" else "ORDER",
        f"{plain(closing)} of {plain(abs(holding.signed_quantity))} at mark {plain(mark)}{_valued(account)}",
        plain(holding.signed_quantity),
        plain(holding.entry_notional),
        plain(holding.margin),
        plain(mark),
        plain(closing),
        instrument.quote_asset,
        plain(needed),
        plain(abs(holding.signed_quantity) - closing),
        fell_short,
        plain(justifying_price(holding, closing, mark, needed)),
        plain(money),
    )


def _why_not_now(row: asyncpg.Record) -> Plan | None:
    """The plan when there is nothing to weigh: something has to be waited for, or it is over."""
    reasons = [
        (row["unanswered"] or row["unbooked"], "WAIT", "the engine and settlement have not answered yet"),
        (row["has_orders"], "WAIT", "open orders of the user have not ended yet"),
        (row["status"] != "PROCESSING" or row["stopping"], "DONE", "stopped"),
        (not row["signed_quantity"], "DONE", "the position is closed"),
    ]
    return next((Plan(action, why) for applies, action, why in reasons if applies), None)


def _why_it_stands(row: asyncpg.Record, marks: Marks) -> str | None:
    """Why nothing can be closed in the position's instrument now; None if something can."""
    if row["state"] != "TRADING":
        return f"{row['instrument_id']} is {row['state']}"
    return None if row["instrument_id"] in marks else "there is no live mark price"


def _while_it_stands(account: Account | None, why: str) -> Plan:
    """The plan when nothing can be closed in the position's instrument: it is kept only as long as that is of use."""
    if account is not None and not account.is_due:
        return Plan("DONE", f"the account has recovered: {why}")
    if account is not None and account.next_to_close() is not None:
        # The next look at the marks takes up what can be closed.
        return Plan("DONE", f"another position of the account is closed first: {why}")
    return Plan("PAUSE", why)


def _valued(account: Account | None) -> str:
    """What is not valued at a live mark, for people."""
    if account is None:
        return ""
    stale = [row for row in account.rows if row["instrument_id"] not in account.live]
    said = [f"{row['instrument_id']} at {'entry' if row['mark'] is None else 'its last mark'}" for row in stale]
    return f", with {', '.join(said)}" if said else ""


async def _submit(conn: Connection, submission: Submission, rules: Rules) -> bool:
    row = await _lock_running(conn, submission.liquidation_id)
    if row is None:
        return False
    instrument = rules.instruments[row["instrument_id"]]
    holding, mark, closing = await _planned(conn, row, submission.plan)
    price = worst_price(
        holding,
        closing,
        mark,
        Decimal(submission.insurance),
        instrument.taker_fee_rate,
        instrument.tick_size,
        instrument.lot_size,
    )
    side = holding.closing_side
    await take_in_liquidation_order(conn, row["user_id"], instrument.instrument_id, side, closing, price)
    seq = await submit_liquidation_order(conn, row["user_id"], instrument, side, closing, price)
    await _remember_command(conn, submission.liquidation_id, seq)
    return True


async def _deleverage(conn: Connection, submission: Submission, rules: Rules) -> int:
    row = await _lock_running(conn, submission.liquidation_id)
    if row is None:
        return 0
    instrument = rules.instruments[row["instrument_id"]]
    holding, mark, closing = await _planned(conn, row, submission.plan)
    price = deleverage_price(holding, instrument.tick_size)
    counterparties = await _rank(conn, instrument, holding, mark, price, closing)
    if counterparties:
        command = Deleverage(
            at=to_ms(await conn.fetchval("SELECT now()")),
            user_id=row["user_id"],
            side=holding.closing_side,
            price=instrument.price_to_ticks(price),
            quantity=instrument.quantity_to_lots(closing),
            counterparties=counterparties,
        )
        seqs = await append_commands(conn, {instrument.instrument_id: [command]})
        await _remember_command(conn, submission.liquidation_id, seqs[instrument.instrument_id])
    return len(counterparties)


async def _rank(
    conn: Connection, instrument: Instrument, holding: Holding, mark: Decimal, price: Decimal, closing: Decimal
) -> list[int]:
    """Who is deleveraged, first one first."""
    rows = await conn.fetch(
        _COUNTERPARTIES,
        instrument.instrument_id,
        mark,
        price,
        Decimal(-1 if holding.signed_quantity > 0 else 1),
        closing * COUNTERPARTIES_FACTOR,
        COUNTERPARTIES_MAX,
    )
    scores = {row["user_id"]: deleverage_score(_holding(row, row["margin"]), mark) for row in rows}
    return sorted(scores, key=lambda user_id: (-scores[user_id], user_id))


async def _lock_running(conn: Connection, liquidation_id: int) -> asyncpg.Record | None:
    return await conn.fetchrow(
        "SELECT user_id, instrument_id, margin_mode FROM risk.liquidation_queue WHERE liquidation_id = $1"
        " AND status = 'PROCESSING' AND NOT stopping FOR UPDATE",
        liquidation_id,
    )


async def _remember_command(conn: Connection, liquidation_id: int, seq: int) -> None:
    await conn.execute(
        "UPDATE risk.liquidation_queue SET command_seq = $2, updated_at = now() WHERE liquidation_id = $1",
        liquidation_id,
        seq,
    )


async def _record(
    conn: Connection,
    positions: Sequence[PositionRow],
    marks: Marks,
    rules: Rules,
    status: str | None = None,
) -> None:
    """Keep what the risk of these positions was when their status changed; nothing is known without a mark price."""
    rows = []
    for p in positions:
        mark = marks.get(p.instrument_id)
        if mark is None:
            continue
        quantity, entry, margin = p.signed_quantity, p.entry_notional, p.margin
        # What a cross position is up against depends on the whole account: no figures of its own (as `position_view`).
        is_cross = p.margin_mode == "CROSS"
        ratio = None if is_cross else margin_ratio(quantity, entry, margin, mark)
        rows.append(
            (
                p.user_id,
                p.instrument_id,
                mark,
                margin,
                unrealized_pnl(quantity, entry, mark),
                maintenance_margin(abs(quantity) * mark, rules.tiers[p.instrument_id]),
                None if ratio is None else max(min(ratio, Decimal(10**11)), Decimal(-(10**11))),
                None if is_cross else p.liquidation_price,
                status or p.status,
            )
        )
    await conn.execute(
        "INSERT INTO risk.risk_snapshots (user_id, instrument_id, mark_price, margin, unrealized_pnl,"
        " maintenance_margin, margin_ratio, liquidation_price, status)"
        " SELECT * FROM unnest($1::bigint[], $2::text[], $3::numeric[], $4::numeric[], $5::numeric[], $6::numeric[],"
        " $7::numeric[], $8::numeric[], $9::text[])",
        *columns(rows, 9),
    )


def _holding(row: asyncpg.Record, margin: Decimal) -> Holding:
    return Holding(row["signed_quantity"], row["entry_notional"], margin)


async def _planned(conn: Connection, row: asyncpg.Record, plan: Plan) -> tuple[Holding, Decimal, Decimal]:
    """The position, the mark price and how much to close, as planned, but with no more margin than there is now.

    A funding payment may have taken of it since. From here to the end of the transaction none does; then it waits for
    what is submitted here, as far as that counts on the same money (`margin_commands.await_liquidations`).
    """
    # Exposures come before balances wherever both are locked.
    await lock_exposures(conn, [(row["user_id"], row["instrument_id"])])
    available, orders, position = await lock_money(conn, row["user_id"], row["instrument_id"], plan.asset)
    held = available + orders + position if row["margin_mode"] == "CROSS" else position
    margin = Decimal(plan.margin)
    if plan.money:
        gone = Decimal(plan.money) - await _less_funding(conn, row, plan.asset, held)
        margin = max(ZERO, margin - max(ZERO, gone))
    holding = Holding(Decimal(plan.signed_quantity), Decimal(plan.entry_notional), margin)
    return holding, Decimal(plan.mark), Decimal(plan.closing)


async def _less_funding(conn: Connection, row: asyncpg.Record, asset: str, held: Decimal) -> Decimal:
    """What is left of what is `held` behind a position (>= 0) once its user has paid the funding that is due: from the
    margin of an isolated one only what nothing else is available for."""
    collateral = (await read_collateral(conn, [row["user_id"]]))[row["user_id"], asset]
    owed = collateral.funding_owed - (ZERO if row["margin_mode"] == "CROSS" else collateral.available)
    return max(ZERO, held - max(ZERO, owed))


def _names(position: PositionRow) -> dict[str, str]:
    return {"positionId": str(position.position_id), "instrumentId": position.instrument_id}


def _figures(position: PositionRow, marks: Marks, rules: Rules) -> dict[str, str | None]:
    name = position.instrument_id
    view = position_view(position, marks.get(name), rules.tiers[name])
    return {key: view[key] for key in ("markPrice", "marginRatio", "liquidationPrice", "quantity")}


def _risk_update(position: PositionRow, marks: Marks, rules: Rules, status: str | None = None) -> RiskUpdate:
    figures = _figures(position, marks, rules)
    return RiskUpdate(
        str(position.user_id),
        position.instrument_id,
        figures["marginRatio"],
        figures["liquidationPrice"],
        status or position.status,
    )


async def read_liquidations(
    conn: Connection | Pool, status: str | None, cursor: int | None, limit: int
) -> list[asyncpg.Record]:
    """Liquidations (of one status, if told) before `cursor`, newest first."""
    return await conn.fetch(
        "SELECT liquidation_id, position_id, user_id, instrument_id, margin_mode, reason, status, created_at,"
        " updated_at FROM risk.liquidation_queue WHERE ($1::text IS NULL OR status = $1)"
        " AND ($2::bigint IS NULL OR liquidation_id < $2) ORDER BY liquidation_id DESC LIMIT $3",
        status,
        cursor,
        limit,
    )


async def deleverage_ranks(
    conn: Connection | Pool, user_id: int, instrument_ids: Sequence[str], marks: Marks
) -> dict[str, int]:
    """Where a user's open positions stand in the queue of those who would be deleveraged, by instrument: from 5, the
    first fifth, to 1, the last. None is given for instruments without a mark price."""
    ranks = {}
    for name in instrument_ids:
        if name in marks:
            row = await conn.fetchrow(_QUEUE_POSITION, user_id, name, marks[name])
            assert row is not None, "Expected a row of two counts"
            ranks[name] = 5 - min(4, 5 * row["ahead"] // max(row["total"], 1))
    return ranks


def liquidation_view(row: asyncpg.Record) -> dict[str, object]:
    """A liquidation as operators see it."""
    return {
        "liquidationId": row["liquidation_id"],
        "positionId": str(row["position_id"]),
        "userId": str(row["user_id"]),
        "instrumentId": row["instrument_id"],
        "marginMode": row["margin_mode"],
        "reason": row["reason"],
        "status": row["status"],
        "workflowId": liquidation_workflow_id(row["position_id"], row["liquidation_id"]),
        "createdAt": iso(row["created_at"]),
        "updatedAt": iso(row["updated_at"]),
    }

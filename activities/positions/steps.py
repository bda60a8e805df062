"""The positions service: what everybody holds and at which entry price.

The margin of a position is the ledger's; the copy here follows it, for the liquidation price.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any, Literal

import asyncpg
from temporalio import activity

from activities.market.prices import latest_marks
from activities.matching.engine_log import EngineLog, SequencedEvent
from activities.matching.instruments import RuleBook, Rules
from activities.risk.steps import OPPOSITE
from domain.clock import from_ms, iso
from domain.events import AutoDeleveraged, BusinessEvent, PositionClosed, PositionUpdated, RiskUpdate
from domain.funding import (
    CONFIRM_FUNDING,
    FIX_FUNDING_POSITIONS,
    FUNDING_PAGE,
    FundingPage,
    FundingSnapshot,
)
from domain.liquidation import Holding, warning_price
from domain.margin import Tier, liquidation_price, maintenance_margin, margin_ratio, unrealized_pnl
from domain.margin_changes import ADOPT_MARGIN, MarginChange
from domain.matching import Deleveraged, Side, Trade
from domain.money import ZERO, plain
from domain.positions import Position, apply_fill
from domain.sagas import APPLY_TRADES, CONFIRM_POSITIONS, EventRange
from storage import outbox
from storage.db import Connection, Pool, columns
from storage.once import NotYetError, advance_cursor
from storage.outbox import UserPush

Cause = Literal["TRADE", "LIQUIDATION", "DELEVERAGE"]
FEE_STEP = Decimal("1e-8")
# A position is told of again when its unrealised profit has moved by this fraction of its margin.
TOLD_PNL_SHARE = Decimal("0.1")
POSITION_COLUMNS = (
    "position_id, user_id, instrument_id, signed_quantity, entry_notional, margin, realized_pnl, leverage,"
    " margin_mode, liquidation_price, status"
)
EVENT_COLUMNS = [
    "user_id",
    "instrument_id",
    "seq",
    "role",
    "type",
    "status",
    "trade_id",
    "order_id",
    "side",
    "price",
    "quantity",
    "fee",
    "realized_pnl",
    "signed_quantity_after",
    "entry_notional_after",
    "leverage",
    "open_loss",
    "cause",
    "created_at",
]


@dataclass(frozen=True, slots=True)
class TradeSide:
    """One user's half of a trade; `cause` says whether it was of their own will. What it opens is backed at `leverage`
    (0: as risk has it) and, for what it loses at once, by `open_loss` ticks per base more."""

    role: str
    user_id: int
    order_id: int | None
    side: Side
    fee: Decimal
    cause: Cause
    leverage: int = 0
    open_loss: int = 0


@dataclass(frozen=True, slots=True)
class HeldMargin:
    """The margin (quote) that the ledger holds for a position, and which change of it that is."""

    amount: Decimal = ZERO
    version: int = 0


@dataclass(frozen=True, slots=True)
class Terms:
    """At which leverage a user's new parts of a position are backed, and whether by the position's margin alone."""

    leverage: int
    margin_mode: str


def sides_of(trade: Trade | Deleveraged) -> tuple[TradeSide, TradeSide]:
    """Maker and taker of a trade; fees in quote. Who is deleveraged stands in for the maker, and pays no fee."""
    if isinstance(trade, Deleveraged):
        return (
            TradeSide("MAKER", trade.counterparty_user_id, None, OPPOSITE[trade.side], ZERO, "DELEVERAGE"),
            TradeSide("TAKER", trade.user_id, None, trade.side, ZERO, "LIQUIDATION"),
        )
    return (
        TradeSide(
            "MAKER",
            trade.maker_user_id,
            trade.maker_order_id,
            OPPOSITE[trade.taker_side],
            trade.maker_fee * FEE_STEP,
            "TRADE",
            trade.maker_leverage,
            trade.maker_open_loss,
        ),
        TradeSide(
            "TAKER",
            trade.taker_user_id,
            trade.taker_order_id,
            trade.taker_side,
            trade.taker_fee * FEE_STEP,
            "LIQUIDATION" if trade.taker_liquidation else "TRADE",
            trade.taker_leverage,
            trade.taker_open_loss,
        ),
    )


class PositionActivities:
    """Activities on the positions service's own tables."""

    def __init__(self, pool: Pool, log: EngineLog) -> None:
        self._pool = pool
        self._log = log
        self._rules = RuleBook()

    @activity.defn(name=APPLY_TRADES)
    async def apply_trades(self, events: EventRange) -> None:
        """Fold the trades of a range of engine events into positions, one `position_events` row per side."""
        async with self._pool.acquire() as conn, conn.transaction():
            if await advance_cursor(conn, "positions", events):
                await _apply(conn, events, await self._log.read(conn, events), await self._rules.rules(conn))

    @activity.defn(name=CONFIRM_POSITIONS)
    async def confirm(self, events: EventRange) -> None:
        """After the ledger: take over the margin it really holds and the profit it booked, close what is flat."""
        async with self._pool.acquire() as conn:
            tiers = (await self._rules.rules(conn)).tiers
            async with conn.transaction():
                if await advance_cursor(conn, "positions", events, "confirmed_seq"):
                    await _confirm(conn, events, tiers[events.instrument_id])
                drew_elsewhere = await _drew_elsewhere(conn, events)
            if drew_elsewhere:
                # Instrument by instrument, as in `confirm_funding`.
                for other in sorted(tiers.keys() - {events.instrument_id}):
                    async with conn.transaction():
                        await _follow_draws(conn, events, other, tiers[other])

    @activity.defn(name=FIX_FUNDING_POSITIONS)
    async def fix_funding_positions(self, snapshot: FundingSnapshot) -> None:
        """Write down, once, what everybody held at the funding time: what they hold now less the fills after it.

        Raises NotYetError before all fills that the snapshot waits for are applied.
        """
        async with self._pool.acquire() as conn, conn.transaction():
            await _fix_funding_positions(conn, snapshot)

    @activity.defn(name=CONFIRM_FUNDING)
    async def confirm_funding(self, page: FundingPage) -> None:
        """After the ledger: payments of a page become realised profit, once, and margins follow the ledger's.

        Those of other instruments, too: a payment may have taken of them.
        """
        async with self._pool.acquire() as conn:
            tiers = (await self._rules.rules(conn)).tiers
            instrument_id = page.run.instrument_id
            async with conn.transaction():
                await _confirm_funding(conn, page, tiers[instrument_id])
            # Instrument by instrument: the runs of two that lock each other's positions would wait for one another.
            for other in sorted(tiers.keys() - {instrument_id}):
                async with conn.transaction():
                    await _follow_funding(conn, page, other, tiers[other])

    @activity.defn(name=ADOPT_MARGIN)
    async def adopt_margin(self, change: MarginChange) -> None:
        """After the ledger: take over a position's margin and the leverage in force."""
        async with self._pool.acquire() as conn, conn.transaction():
            tiers = (await self._rules.rules(conn)).tiers[change.instrument_id]
            rows = await conn.fetch(
                "SELECT p.position_id, p.user_id, p.signed_quantity, p.entry_notional, e.leverage, p.margin_mode,"
                " p.status, p.realized_pnl FROM positions.positions p"
                " JOIN risk.v_exposures e USING (user_id, instrument_id)"
                " WHERE p.user_id = $1 AND p.instrument_id = $2 FOR UPDATE OF p",
                change.user_id,
                change.instrument_id,
            )
            await _adopt(conn, change.instrument_id, rows, tiers)


async def _apply(conn: Connection, events: EventRange, log: list[SequencedEvent], rules: Rules) -> None:
    instrument_id = events.instrument_id
    trades = [(seq, event, sides_of(event)) for seq, event in log if isinstance(event, Trade | Deleveraged)]
    if not trades:
        return
    instrument = rules.instruments[instrument_id]
    users = sorted({half.user_id for _, _, halves in trades for half in halves})
    terms = await _read_terms(conn, instrument_id, users)
    positions = await _lock(conn, instrument_id, users)
    records: list[tuple[Any, ...]] = []
    pushes: list[UserPush] = []
    deleveraged: list[BusinessEvent] = []
    for seq, trade, halves in trades:
        price = instrument.ticks_to_price(trade.price)
        quantity = instrument.lots_to_quantity(trade.quantity)
        executed_at = from_ms(trade.at)
        if isinstance(trade, Deleveraged):
            event, push = _deleveraging(trade, instrument_id, quantity, price)
            deleveraged.append(event)
            pushes.append(push)
        for half in halves:
            fill = apply_fill(
                positions.get(half.user_id, Position()),
                quantity if half.side == "BUY" else -quantity,
                price,
            )
            positions[half.user_id] = fill.position
            records.append(
                (
                    half.user_id,
                    instrument_id,
                    seq,
                    half.role,
                    fill.kind,
                    "APPLIED",
                    trade.trade_id,
                    half.order_id,
                    half.side,
                    price,
                    quantity,
                    half.fee,
                    fill.realized_pnl,
                    fill.position.signed_quantity,
                    fill.position.entry_notional,
                    half.leverage or terms[half.user_id].leverage,
                    instrument.ticks_to_price(half.open_loss),
                    half.cause,
                    executed_at,
                )
            )
            pushes.append(
                UserPush(
                    half.user_id,
                    "fill",
                    fill_view({**dict(zip(EVENT_COLUMNS, records[-1], strict=True)), "executed_at": executed_at}),
                )
            )
    await conn.copy_records_to_table("position_events", schema_name="positions", columns=EVENT_COLUMNS, records=records)
    await _save(conn, instrument_id, positions, terms)
    await outbox.emit(conn, deleveraged, pushes)


def _deleveraging(
    trade: Deleveraged, instrument_id: str, quantity: Decimal, price: Decimal
) -> tuple[AutoDeleveraged, UserPush]:
    """The event and the notice to somebody whose position was reduced for that of a bankrupt."""
    user_id = trade.counterparty_user_id
    event = AutoDeleveraged(
        str(user_id),
        instrument_id,
        plain(quantity),
        plain(price),
        OPPOSITE[trade.side],
        trade.trade_id,
        str(trade.user_id),
        iso(from_ms(trade.at)),
    )
    notice = {"instrumentId": instrument_id, "status": "DELEVERAGED", "quantity": event.quantity, "price": event.price}
    return event, UserPush(user_id, "liquidation", notice)


def fill_view(row: Mapping[str, Any] | asyncpg.Record) -> dict[str, object]:
    """A fill as its user sees it, from the columns of a `position_events` row."""
    return {
        "tradeId": row["trade_id"],
        "orderId": row["order_id"],
        "instrumentId": row["instrument_id"],
        "price": plain(row["price"]),
        "quantity": plain(row["quantity"]),
        "side": row["side"],
        "role": row["role"],
        "fee": plain(row["fee"]),
        "realizedPnl": plain(row["realized_pnl"]),
        "executedAt": iso(row["executed_at"]),
    }


async def _confirm(conn: Connection, events: EventRange, tiers: Sequence[Tier]) -> None:
    rows = await conn.fetch(
        "SELECT p.position_id, p.user_id, p.signed_quantity, p.entry_notional, p.leverage, p.margin_mode, p.status,"
        " p.realized_pnl + f.realized_pnl AS realized_pnl"
        " FROM positions.positions p JOIN (SELECT user_id, sum(realized_pnl) AS realized_pnl"
        "   FROM positions.position_events WHERE instrument_id = $1 AND seq > $2 AND seq <= $3 GROUP BY user_id) f"
        " USING (user_id) WHERE p.instrument_id = $1 ORDER BY p.user_id FOR UPDATE OF p",
        events.instrument_id,
        events.after_seq,
        events.to_seq,
    )
    await _adopt(conn, events.instrument_id, rows, tiers, await _closings(conn, events))


async def _drew_elsewhere(conn: Connection, events: EventRange) -> bool:
    """Whether the ledger took margin of other instruments for losses of this range."""
    return bool(
        await conn.fetchval(
            "SELECT EXISTS (SELECT FROM ledger.v_journals WHERE reference_type = 'CROSS_MARGIN' AND reference_id = $1)",
            f"{events.instrument_id}:{events.to_seq}",
        )
    )


async def _follow_draws(conn: Connection, events: EventRange, instrument_id: str, tiers: Sequence[Tier]) -> None:
    """Copy the margins that losses of a range have left in another instrument, as `_follow_funding` does."""
    rows = await conn.fetch(
        "SELECT p.position_id, p.user_id, p.signed_quantity, p.entry_notional, p.leverage, p.margin_mode, p.status,"
        " p.realized_pnl FROM positions.positions p JOIN ledger.v_margin_holds h USING (user_id, instrument_id)"
        " WHERE p.instrument_id = $4 AND p.margin_mode = 'CROSS' AND p.margin_version <> h.margin_version"
        " AND p.user_id IN (SELECT user_id FROM positions.position_events"
        "   WHERE instrument_id = $1 AND seq > $2 AND seq <= $3)"
        " AND NOT EXISTS (SELECT FROM positions.position_events e JOIN positions.cursors c USING (instrument_id)"
        "   WHERE e.instrument_id = $4 AND e.user_id = p.user_id AND e.seq > c.confirmed_seq)"
        " ORDER BY p.user_id FOR UPDATE OF p",
        events.instrument_id,
        events.after_seq,
        events.to_seq,
        instrument_id,
    )
    if rows:
        await _adopt(conn, instrument_id, rows, tiers)


async def _closings(conn: Connection, events: EventRange) -> dict[int, list[Decimal]]:
    """Per user, the realised profit (quote) up to each closing of their position in the range, flips among them."""
    rows = await conn.fetch(
        "SELECT f.user_id, p.realized_pnl + f.so_far AS realized_pnl FROM (SELECT user_id, type, seq,"
        "  sum(realized_pnl) OVER (PARTITION BY user_id ORDER BY seq, event_id) AS so_far"
        "  FROM positions.position_events WHERE instrument_id = $1 AND seq > $2 AND seq <= $3) f"
        " JOIN positions.positions p ON p.instrument_id = $1 AND p.user_id = f.user_id"
        " WHERE f.type IN ('CLOSE', 'FLIP') ORDER BY f.seq",
        events.instrument_id,
        events.after_seq,
        events.to_seq,
    )
    found: defaultdict[int, list[Decimal]] = defaultdict(list)
    for row in rows:
        found[row["user_id"]].append(row["realized_pnl"])
    return found


async def _adopt(
    conn: Connection,
    instrument_id: str,
    rows: Sequence[asyncpg.Record],
    tiers: Sequence[Tier],
    closings: Mapping[int, Sequence[Decimal]] | None = None,
) -> None:
    """Write the ledger's margin and all that follows from it into positions that are locked, and tell their users.
    `closings` is the realised profit (quote) at which each of them was closed.

    What they are told is at the last mark in the tables: Redis may be away, and only pushes may be late for that.
    """
    latest = (await latest_marks(conn, [instrument_id])).get(instrument_id)
    mark = None if latest is None else latest.price
    # Read after the rows are locked: whoever copies the ledger's margin last copies the newest.
    margins = await read_margins(conn, instrument_id, [row["user_id"] for row in rows])
    changes = [
        (
            row["position_id"],
            margins[row["user_id"]].amount,
            margins[row["user_id"]].version,
            row["realized_pnl"],
            row["leverage"],
            liquidation_price(row["signed_quantity"], row["entry_notional"], margins[row["user_id"]].amount, tiers),
            _status(row),
            warning_price(
                Holding(row["signed_quantity"], row["entry_notional"], margins[row["user_id"]].amount), tiers
            ),
        )
        for row in rows
    ]
    await conn.execute(
        "UPDATE positions.positions p SET margin = n.margin, margin_version = n.version, realized_pnl = n.realized_pnl,"
        " leverage = n.leverage, liquidation_price = n.liquidation_price, status = n.status,"
        " warning_price = n.warning_price, warned = p.warned AND n.status <> 'CLOSED',"
        " told_price = coalesce($9, p.told_price), updated_at = now()"
        " FROM unnest($1::bigint[], $2::numeric[], $3::bigint[], $4::numeric[], $5::int[], $6::numeric[], $7::text[],"
        " $8::numeric[]) AS n"
        " (position_id, margin, version, realized_pnl, leverage, liquidation_price, status, warning_price)"
        " WHERE p.position_id = n.position_id",
        *columns(changes, 8),
        mark,
    )
    business: list[BusinessEvent] = []
    pushes: list[UserPush] = []
    unconfirmed = await _unconfirmed(conn, [instrument_id])
    for row, change in zip(rows, changes, strict=True):
        if (row["user_id"], instrument_id) in unconfirmed:
            # More is applied already than the margin knows of: settlement tells of both together.
            continue
        view = position_view(
            instrument_id,
            {**row, "margin": change[1], "liquidation_price": change[5], "status": change[6]},
            mark,
            tiers,
        )
        pushes.append(UserPush(row["user_id"], "position", view))
        closed: list[BusinessEvent] = [
            PositionClosed(str(row["user_id"]), instrument_id, plain(pnl))
            for pnl in (closings or {}).get(row["user_id"], ())
        ]
        # What was closed on the way comes before what came of it.
        last = len(closed) - int(view["status"] == "CLOSED")
        business += closed[:last] + _events(row["user_id"], instrument_id, view) + closed[last:]
    await outbox.emit(conn, business, pushes)


async def _unconfirmed(conn: Connection, instrument_ids: Sequence[str]) -> set[tuple[int, str]]:
    """Users, each with an instrument, who have fills whose margin is not taken over from the ledger yet."""
    # In the order of the index: a few rows at its end, where a join could read all fills there ever were.
    rows = await conn.fetch(
        "SELECT DISTINCT e.user_id, c.instrument_id FROM positions.cursors c CROSS JOIN LATERAL ("
        "  SELECT user_id FROM positions.position_events"
        "  WHERE instrument_id = c.instrument_id AND seq > c.confirmed_seq ORDER BY seq OFFSET 0) e"
        " WHERE c.instrument_id = ANY($1)",
        instrument_ids,
    )
    return {(row["user_id"], row["instrument_id"]) for row in rows}


async def _fix_funding_positions(conn: Connection, snapshot: FundingSnapshot) -> None:
    run = snapshot.run
    # The lock keeps settlement from moving on meanwhile, and a second attempt from adding to the first.
    applied_seq = await conn.fetchval(
        "SELECT applied_seq FROM positions.cursors WHERE instrument_id = $1 FOR UPDATE", run.instrument_id
    )
    if applied_seq < snapshot.event_seq:
        raise NotYetError(f"Positions are at event {applied_seq} of {snapshot.event_seq}")
    terms = await conn.fetchrow(
        "SELECT mark_price, rate FROM ledger.v_funding_runs WHERE instrument_id = $1 AND funding_time = $2",
        run.instrument_id,
        run.time,
    )
    assert terms is not None, f"Expected {run} to be open"
    # The payment is domain.funding.funding_payment, in SQL because there are so many (a test compares the two).
    await conn.execute(
        "INSERT INTO positions.funding_positions (instrument_id, funding_time, user_id, signed_quantity, payment)"
        " SELECT $1, $2, user_id, quantity, floor(-quantity * $3::numeric * $4::numeric * 100000000) * 0.00000001"
        " FROM (SELECT p.user_id, p.signed_quantity - coalesce(f.quantity, 0) AS quantity FROM positions.positions p"
        "   LEFT JOIN (SELECT user_id, sum(CASE side WHEN 'BUY' THEN quantity ELSE -quantity END) AS quantity"
        "     FROM positions.position_events WHERE instrument_id = $1 AND created_at > $2 AND trade_id IS NOT NULL"
        "     GROUP BY user_id) f USING (user_id) WHERE p.instrument_id = $1) held"
        " WHERE quantity <> 0 AND NOT EXISTS (SELECT FROM positions.funding_positions"
        "   WHERE instrument_id = $1 AND funding_time = $2)",
        run.instrument_id,
        run.time,
        *terms,
    )


async def _confirm_funding(conn: Connection, page: FundingPage, tiers: Sequence[Tier]) -> None:
    instrument_id, time = page.run.instrument_id, page.run.time
    last_user_id = await conn.fetchval(
        "SELECT max(user_id) FROM (SELECT p.user_id FROM (SELECT user_id FROM positions.funding_positions"
        "   WHERE instrument_id = $1 AND funding_time = $2 AND user_id > $3 ORDER BY user_id LIMIT $4) f"
        "  JOIN positions.positions p ON p.instrument_id = $1 AND p.user_id = f.user_id"
        "  ORDER BY p.user_id FOR UPDATE OF p) locked",
        instrument_id,
        time,
        page.after_user_id,
        FUNDING_PAGE,
    )
    if last_user_id is None or await conn.fetchval(
        "SELECT EXISTS (SELECT FROM positions.position_events"
        " WHERE instrument_id = $1 AND funding_time = $2 AND user_id = $3)",
        instrument_id,
        time,
        last_user_id,
    ):
        return
    those = (instrument_id, time, page.after_user_id, last_user_id)
    await conn.execute(
        "INSERT INTO positions.position_events (user_id, instrument_id, funding_time, type, status, side, price,"
        "  quantity, realized_pnl, signed_quantity_after, entry_notional_after, leverage, cause)"
        " SELECT user_id, instrument_id, funding_time, 'FUNDING', 'SETTLED',"
        "  CASE WHEN f.signed_quantity > 0 THEN 'LONG' ELSE 'SHORT' END, r.mark_price, abs(f.signed_quantity),"
        "  f.payment, p.signed_quantity, p.entry_notional, p.leverage, 'FUNDING'"
        " FROM positions.funding_positions f JOIN positions.positions p USING (user_id, instrument_id)"
        " JOIN ledger.v_funding_runs r USING (instrument_id, funding_time)"
        " WHERE instrument_id = $1 AND funding_time = $2 AND user_id > $3 AND user_id <= $4 ORDER BY user_id",
        *those,
    )
    await conn.execute(
        "UPDATE positions.positions p SET realized_pnl = p.realized_pnl + f.payment, updated_at = now()"
        " FROM positions.funding_positions f WHERE f.instrument_id = $1 AND f.funding_time = $2 AND f.user_id > $3"
        " AND f.user_id <= $4 AND p.instrument_id = $1 AND p.user_id = f.user_id",
        *those,
    )
    # Only those who paid from their margin: to all others a balance has been pushed, and nothing else has changed.
    moved = await conn.fetch(
        "SELECT p.position_id, p.user_id, p.signed_quantity, p.entry_notional, p.leverage, p.margin_mode, p.status,"
        " p.realized_pnl FROM positions.funding_positions f JOIN positions.positions p USING (user_id, instrument_id)"
        " JOIN ledger.v_margin_holds h USING (user_id, instrument_id) WHERE instrument_id = $1 AND funding_time = $2"
        " AND user_id > $3 AND user_id <= $4 AND p.margin_version <> h.margin_version ORDER BY user_id",
        *those,
    )
    await _adopt(conn, instrument_id, moved, tiers)


async def _follow_funding(conn: Connection, page: FundingPage, instrument_id: str, tiers: Sequence[Tier]) -> None:
    """Copy the margins that payers of a page have left in another instrument, where they are not those known here.

    Positions whose last fills are not confirmed are left to `confirm`, which copies the margin as well.
    """
    rows = await conn.fetch(
        "SELECT p.position_id, p.user_id, p.signed_quantity, p.entry_notional, p.leverage, p.margin_mode, p.status,"
        " p.realized_pnl FROM positions.positions p JOIN ledger.v_margin_holds h USING (user_id, instrument_id)"
        " JOIN (SELECT user_id, payment FROM positions.funding_positions WHERE instrument_id = $1 AND funding_time = $2"
        "   AND user_id > $3 ORDER BY user_id LIMIT $4) f USING (user_id)"
        " WHERE p.instrument_id = $5 AND f.payment < 0 AND p.margin_version <> h.margin_version"
        " AND NOT EXISTS (SELECT FROM positions.position_events e JOIN positions.cursors c USING (instrument_id)"
        "   WHERE e.instrument_id = $5 AND e.user_id = p.user_id AND e.seq > c.confirmed_seq)"
        " ORDER BY p.user_id FOR UPDATE OF p",
        page.run.instrument_id,
        page.run.time,
        page.after_user_id,
        FUNDING_PAGE,
        instrument_id,
    )
    if rows:
        await _adopt(conn, instrument_id, rows, tiers)


async def forget_funding_positions(conn: Connection, before: datetime, limit: int) -> int:
    """Delete up to `limit` positions of funding settlements that were done before then; how many it was.

    The payments stay, as events of the positions.
    """
    status = await conn.execute(
        "DELETE FROM positions.funding_positions p USING (SELECT f.instrument_id, f.funding_time, f.user_id"
        "  FROM positions.funding_positions f JOIN ledger.v_funding_runs r USING (instrument_id, funding_time)"
        "  WHERE r.status = 'DONE' AND r.updated_at < $1 LIMIT $2) old"
        " WHERE (p.instrument_id, p.funding_time, p.user_id) = (old.instrument_id, old.funding_time, old.user_id)",
        before,
        limit,
    )
    return int(status.split()[-1])


def _status(row: asyncpg.Record) -> str:
    if not row["signed_quantity"]:
        return "CLOSED"
    return "OPEN" if row["status"] == "CLOSED" else str(row["status"])


def _updated(user_id: int, instrument_id: str, view: Mapping[str, Any]) -> PositionUpdated:
    return PositionUpdated(
        str(user_id),
        instrument_id,
        view["side"],
        view["quantity"] or "0",
        view["entryPrice"],
        view["markPrice"],
        view["unrealizedPnl"],
        view["liquidationPrice"],
    )


def _events(user_id: int, instrument_id: str, view: Mapping[str, Any]) -> list[BusinessEvent]:
    return [
        _updated(user_id, instrument_id, view),
        RiskUpdate(str(user_id), instrument_id, view["marginRatio"], view["liquidationPrice"], str(view["status"])),
    ]


def position_view(
    instrument_id: str,
    row: Mapping[str, Any] | asyncpg.Record,
    mark: Decimal | None,
    tiers: Sequence[Tier],
    backing: Decimal | None = None,
) -> dict[str, Any]:
    """A position as clients see it; what depends on the mark price is null while there is none.

    `backing` is what stands behind a cross position (quote), in place of its own margin. Where it is not known, there
    are no `marginRatio` and no `liquidationPrice` of a cross position: they depend on the whole account.
    """
    position, margin = Position(row["signed_quantity"], row["entry_notional"]), row["margin"]
    behind, liquidation = margin, row["liquidation_price"]
    if row["margin_mode"] == "CROSS":
        behind, liquidation = backing, None
        if backing is not None:
            liquidation = liquidation_price(position.signed_quantity, position.entry_notional, backing, tiers)
    unrealized = ratio = None
    maintenance = None
    if mark is not None:
        unrealized = unrealized_pnl(position.signed_quantity, position.entry_notional, mark)
        if behind is not None:
            ratio = margin_ratio(position.signed_quantity, position.entry_notional, behind, mark)
        maintenance = maintenance_margin(abs(position.signed_quantity) * mark, tiers)
    return {
        "instrumentId": instrument_id,
        "side": position.side,
        "quantity": plain(abs(position.signed_quantity)),
        "entryPrice": _price(position.entry_price),
        "markPrice": _price(mark),
        "unrealizedPnl": _price(unrealized),
        "realizedPnl": plain(row["realized_pnl"]),
        "leverage": row["leverage"],
        "marginMode": row["margin_mode"],
        "margin": plain(margin),
        "maintenanceMargin": _price(maintenance),
        "marginRatio": _price(ratio),
        "liquidationPrice": _price(liquidation),
        "status": row["status"],
    }


def _price(value: Decimal | None) -> str | None:
    return None if value is None else plain(value.quantize(FEE_STEP))


async def change_status(conn: Connection, position_ids: Sequence[int], before: str, after: str) -> list[asyncpg.Record]:
    """Bring positions from one status into another (CLOSED, if flat) in the caller's transaction; those that were in
    `before`, with POSITION_COLUMNS, by user."""
    rows = await conn.fetch(
        "WITH locked AS (SELECT position_id FROM positions.positions WHERE position_id = ANY($1) AND status = $2"
        "  ORDER BY user_id, instrument_id FOR UPDATE)"
        " UPDATE positions.positions p SET status = CASE WHEN p.signed_quantity = 0 THEN 'CLOSED' ELSE $3 END,"
        f" updated_at = now() FROM locked WHERE p.position_id = locked.position_id RETURNING {_of_p(POSITION_COLUMNS)}",
        position_ids,
        before,
        after,
    )
    return sorted(rows, key=lambda row: (row["user_id"], row["instrument_id"]))


async def mark_warned(conn: Connection, position_ids: Sequence[int], *, warned: bool) -> list[asyncpg.Record]:
    """Remember that the users of these positions were warned, or that it is over; those it is news for."""
    if not position_ids:
        return []
    return await conn.fetch(
        "WITH locked AS (SELECT position_id FROM positions.positions WHERE position_id = ANY($1) AND warned <> $2"
        "  ORDER BY user_id, instrument_id FOR UPDATE)"
        " UPDATE positions.positions p SET warned = $2 FROM locked WHERE p.position_id = locked.position_id"
        f" RETURNING {_of_p(POSITION_COLUMNS)}",
        position_ids,
        warned,
    )


def _of_p(names: str) -> str:
    return ", ".join(f"p.{name}" for name in names.split(", "))


async def tell_moved(
    conn: Connection, instrument_id: str, mark: Decimal, tiers: Sequence[Tier], after_user_id: int, limit: int
) -> int | None:
    """Publish PositionUpdated and RiskUpdate for positions of the next `limit` users whose profit has moved enough
    since last told, and write down that they were.

    Answers after whom to go on, None at the end. A move counts from TOLD_PNL_SHARE of the position's margin. What
    settlement has not confirmed yet is left to it: position and margin do not fit together before.
    """
    async with conn.transaction():
        rows = await conn.fetch(
            f"SELECT {POSITION_COLUMNS}, told_price FROM positions.positions WHERE instrument_id = $1 AND user_id > $2"
            " ORDER BY user_id LIMIT $3",
            instrument_id,
            after_user_id,
            limit,
        )
        moved = [row["position_id"] for row in rows if row["signed_quantity"] and _has_moved(row, mark)]
        if moved:
            confirmed = [row for row in await lock_confirmed(conn, moved) if row["is_adopted"]]
            await _tell(conn, instrument_id, confirmed, mark, tiers)
    return rows[-1]["user_id"] if len(rows) == limit else None


async def lock_confirmed(conn: Connection, position_ids: Sequence[int]) -> list[asyncpg.Record]:
    """Lock these positions; those that are open and have no fill that is not confirmed yet, by user.

    With POSITION_COLUMNS, and `is_adopted`: whether the margin is what the ledger holds.
    """
    await conn.execute(
        "SELECT FROM positions.positions WHERE position_id = ANY($1) ORDER BY user_id, instrument_id FOR UPDATE",
        position_ids,
    )
    # Looked at once they are locked: no fill is applied to them from here on, none is confirmed.
    rows = await conn.fetch(
        f"SELECT {_of_p(POSITION_COLUMNS)}, p.margin_version = coalesce(h.margin_version, 0) AS is_adopted"
        " FROM positions.positions p LEFT JOIN ledger.v_margin_holds h USING (user_id, instrument_id)"
        " WHERE p.position_id = ANY($1) AND p.signed_quantity <> 0 ORDER BY p.user_id, p.instrument_id",
        position_ids,
    )
    unconfirmed = await _unconfirmed(conn, sorted({row["instrument_id"] for row in rows}))
    return [row for row in rows if (row["user_id"], row["instrument_id"]) not in unconfirmed]


async def _tell(
    conn: Connection, instrument_id: str, positions: Sequence[asyncpg.Record], mark: Decimal, tiers: Sequence[Tier]
) -> None:
    """Tell users what their positions are worth at this mark, and write down that they were told."""
    position_ids = [row["position_id"] for row in positions]
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
    views = [(row["user_id"], position_view(instrument_id, row, mark, tiers)) for row in positions]
    await outbox.emit(
        conn,
        [event for user_id, view in views for event in _events(user_id, instrument_id, view)],
        [UserPush(user_id, "position", view) for user_id, view in views],
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


def _has_moved(row: asyncpg.Record, mark: Decimal) -> bool:
    told = row["told_price"]
    return told is None or abs(row["signed_quantity"] * (mark - told)) >= row["margin"] * TOLD_PNL_SHARE


async def read_margins(conn: Connection, instrument_id: str, users: Sequence[int]) -> defaultdict[int, HeldMargin]:
    """The margin that the ledger holds for the positions of `users`."""
    rows = await conn.fetch(
        "SELECT user_id, position_margin, margin_version FROM ledger.v_margin_holds"
        " WHERE instrument_id = $1 AND user_id = ANY($2)",
        instrument_id,
        users,
    )
    return defaultdict(HeldMargin, {row["user_id"]: HeldMargin(*row[1:]) for row in rows})


async def _read_terms(conn: Connection, instrument_id: str, users: Sequence[int]) -> dict[int, Terms]:
    rows = await conn.fetch(
        "SELECT user_id, leverage, margin_mode FROM risk.v_exposures WHERE instrument_id = $1 AND user_id = ANY($2)",
        instrument_id,
        users,
    )
    return {row["user_id"]: Terms(row["leverage"], row["margin_mode"]) for row in rows}


async def _lock(conn: Connection, instrument_id: str, users: Sequence[int]) -> dict[int, Position]:
    rows = await conn.fetch(
        "SELECT user_id, signed_quantity, entry_notional FROM positions.positions"
        " WHERE instrument_id = $1 AND user_id = ANY($2) ORDER BY user_id FOR UPDATE",
        instrument_id,
        users,
    )
    return {row[0]: Position(row[1], row[2]) for row in rows}


async def _save(conn: Connection, instrument_id: str, positions: dict[int, Position], terms: dict[int, Terms]) -> None:
    rows = [
        (user_id, p.signed_quantity, p.entry_notional, terms[user_id].leverage, terms[user_id].margin_mode)
        for user_id, p in sorted(positions.items())
    ]
    await conn.execute(
        "INSERT INTO positions.positions"
        " (instrument_id, user_id, signed_quantity, entry_notional, leverage, margin_mode)"
        " SELECT $1, n.* FROM unnest($2::bigint[], $3::numeric[], $4::numeric[], $5::int[], $6::text[]) AS n"
        " ON CONFLICT (user_id, instrument_id) DO UPDATE SET signed_quantity = excluded.signed_quantity,"
        " entry_notional = excluded.entry_notional, leverage = excluded.leverage,"
        " margin_mode = excluded.margin_mode, updated_at = now()",
        instrument_id,
        *columns(rows, 5),
    )

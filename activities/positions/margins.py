"""The margin of a position is the ledger's. The copy here follows it, for the liquidation price."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal

from activities.market.prices import latest_marks
from activities.positions.rows import AdoptedRow, PositionRow
from activities.positions.views import events_of, position_view
from domain.events import BusinessEvent, PositionClosed
from domain.liquidation import Holding, warning_price
from domain.margin import Tier, liquidation_price
from domain.margin_changes import MarginChange
from domain.money import ZERO, plain
from domain.sagas import EventRange
from storage import outbox
from storage.db import Connection
from storage.outbox import UserPush
from storage.rows import assignments, batch, column_list, read, unnest

_ADOPT = (
    f"UPDATE positions.positions p SET {assignments(AdoptedRow, without=['position_id'])},"
    " warned = p.warned AND n.status <> 'CLOSED', told_price = coalesce($9, p.told_price), updated_at = now()"
    f" FROM {unnest(AdoptedRow)} WHERE p.position_id = n.position_id"
)


@dataclass(frozen=True, slots=True)
class HeldMargin:
    """The margin (quote) that the ledger holds for a position, and which change of it that is."""

    amount: Decimal = ZERO
    version: int = 0


async def confirm(conn: Connection, events: EventRange, tiers: Sequence[Tier]) -> None:
    """Take over the margins and the realised profit of everybody with fills in a range."""
    records = await conn.fetch(
        f"SELECT {column_list(PositionRow, 'p')}, f.realized_pnl AS booked"
        " FROM positions.positions p JOIN (SELECT user_id, sum(realized_pnl) AS realized_pnl"
        "   FROM positions.position_events WHERE instrument_id = $1 AND seq > $2 AND seq <= $3 GROUP BY user_id) f"
        " USING (user_id) WHERE p.instrument_id = $1 ORDER BY p.user_id FOR UPDATE OF p",
        events.instrument_id,
        events.after_seq,
        events.to_seq,
    )
    positions = [
        row._replace(realized_pnl=row.realized_pnl + record["booked"])
        for row, record in zip(read(PositionRow, records), records, strict=True)
    ]
    await adopt(conn, events.instrument_id, positions, tiers, await _closings(conn, events))


async def has_drawn_elsewhere(conn: Connection, events: EventRange) -> bool:
    """Whether the ledger took margin of other instruments for losses of this range."""
    return bool(
        await conn.fetchval(
            "SELECT EXISTS (SELECT FROM ledger.v_journals WHERE reference_type = 'CROSS_MARGIN' AND reference_id = $1)",
            f"{events.instrument_id}:{events.to_seq}",
        )
    )


async def follow_draws(conn: Connection, events: EventRange, instrument_id: str, tiers: Sequence[Tier]) -> None:
    """Copy the margins that losses of a range have left in another instrument, as `follow_funding` does."""
    rows = await conn.fetch(
        f"SELECT {column_list(PositionRow, 'p')}"
        " FROM positions.positions p JOIN ledger.v_margin_holds h USING (user_id, instrument_id)"
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
        await adopt(conn, instrument_id, read(PositionRow, rows), tiers)


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


async def adopt_changed_margin(conn: Connection, change: MarginChange, tiers: Sequence[Tier]) -> None:
    """Take over the margin of one position after a change of it, and the leverage in force."""
    records = await conn.fetch(
        f"SELECT {column_list(PositionRow, 'p')}, e.leverage AS in_force FROM positions.positions p"
        " JOIN risk.v_exposures e USING (user_id, instrument_id)"
        " WHERE p.user_id = $1 AND p.instrument_id = $2 FOR UPDATE OF p",
        change.user_id,
        change.instrument_id,
    )
    rows = [row._replace(leverage=r["in_force"]) for row, r in zip(read(PositionRow, records), records, strict=True)]
    await adopt(conn, change.instrument_id, rows, tiers)


async def adopt(
    conn: Connection,
    instrument_id: str,
    rows: Sequence[PositionRow],
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
    margins = await read_margins(conn, instrument_id, [row.user_id for row in rows])
    adopted = [_adopted(row, margins[row.user_id], tiers) for row in rows]
    await conn.execute(_ADOPT, *batch(AdoptedRow, adopted), mark)
    unconfirmed = await read_unconfirmed(conn, [instrument_id])
    # Where more is applied already than the margin knows of, settlement tells of both together.
    told = [
        row._replace(margin=now.margin, liquidation_price=now.liquidation_price, status=now.status)
        for row, now in zip(rows, adopted, strict=True)
        if row.key not in unconfirmed
    ]
    await _tell_adopted(conn, told, mark, tiers, closings or {})


def _adopted(row: PositionRow, held: HeldMargin, tiers: Sequence[Tier]) -> AdoptedRow:
    return AdoptedRow(
        position_id=row.position_id,
        margin=held.amount,
        margin_version=held.version,
        realized_pnl=row.realized_pnl,
        leverage=row.leverage,
        liquidation_price=liquidation_price(row.signed_quantity, row.entry_notional, held.amount, tiers),
        status=_status(row),
        warning_price=warning_price(Holding(row.signed_quantity, row.entry_notional, held.amount), tiers),
    )


async def _tell_adopted(
    conn: Connection,
    rows: Sequence[PositionRow],
    mark: Decimal | None,
    tiers: Sequence[Tier],
    closings: Mapping[int, Sequence[Decimal]],
) -> None:
    business: list[BusinessEvent] = []
    pushes: list[UserPush] = []
    for row in rows:
        view = position_view(row, mark, tiers)
        pushes.append(UserPush(row.user_id, "position", view))
        closed: list[BusinessEvent] = [
            PositionClosed(str(row.user_id), row.instrument_id, plain(pnl)) for pnl in closings.get(row.user_id, ())
        ]
        # What was closed on the way comes before what came of it.
        last = len(closed) - int(row.status == "CLOSED")
        business += closed[:last] + events_of(row.user_id, row.instrument_id, view) + closed[last:]
    await outbox.emit(conn, business, pushes)


async def read_unconfirmed(conn: Connection, instrument_ids: Sequence[str]) -> set[tuple[int, str]]:
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


def _status(row: PositionRow) -> str:
    if not row.signed_quantity:
        return "CLOSED"
    return "OPEN" if row.status == "CLOSED" else row.status


async def read_margins(conn: Connection, instrument_id: str, users: Sequence[int]) -> defaultdict[int, HeldMargin]:
    """The margin that the ledger holds for the positions of `users`."""
    rows = await conn.fetch(
        "SELECT user_id, position_margin, margin_version FROM ledger.v_margin_holds"
        " WHERE instrument_id = $1 AND user_id = ANY($2)",
        instrument_id,
        users,
    )
    return defaultdict(HeldMargin, {row["user_id"]: HeldMargin(*row[1:]) for row in rows})

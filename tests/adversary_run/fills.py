"""Law 3: what opens has its initial margin, and equity at the mark of the engine's log is not below maintenance."""

from collections.abc import Sequence
from decimal import Decimal

import asyncpg

from storage.db import Connection
from tests.adversary_run.findings import ROUNDING, Finding
from tests.adversary_run.standing import ZERO, Held, Tiers, read_tiers

# Of each booking of a range of events, what it did to the margin of each position.
_BOOKINGS = """
    SELECT h.id, h.user_id, h.instrument_id, h.margin_mode, h.margin_before, h.margin_after, h.orders_before,
           h.orders_after, h.short_before, h.short_after, h.at, r.after_seq, r.to_seq
    FROM witness.holds h JOIN witness.ranges r USING (tx, instrument_id) WHERE h.id > $1 ORDER BY h.id
"""
_FILLS = """
    SELECT e.seq, e.order_id, e.role, e.cause, e.side, e.price, e.quantity, e.leverage, e.open_loss,
           e.signed_quantity_after AS quantity_after, e.entry_notional_after AS entry_after,
           concat_ws(' ', o.type, o.time_in_force, 'price ' || o.price, 'bound ' || o.bound_price,
                     'margin at ' || o.margin_price, 'holds a loss of ' || o.open_loss, 'stop ' || o.stop_price,
                     o.working_type, CASE WHEN o.reduce_only THEN 'reduce only' END, o.created_at::text) AS terms
    FROM positions.position_events e LEFT JOIN orders.orders o USING (order_id)
    WHERE e.user_id = $1 AND e.instrument_id = $2 AND e.seq > $3 AND e.seq <= $4 ORDER BY e.seq
"""
_BEFORE = """
    SELECT signed_quantity_after, entry_notional_after FROM positions.position_events
    WHERE user_id = $1 AND instrument_id = $2 AND seq <= $3 ORDER BY seq DESC LIMIT 1
"""
# The mark that the engine had heard when event $2 happened, which may have come of hearing it.
_MARK_OF = """
    SELECT (c.payload ->> 'price')::numeric * i.tick_size FROM matching.events e
    JOIN matching.instruments i USING (instrument_id)
    JOIN matching.commands c ON c.instrument_id = e.instrument_id AND c.seq <= e.command_seq
    WHERE e.instrument_id = $1 AND e.seq = $2 AND c.payload ->> 'kind' = 'MARK_PRICE' ORDER BY c.seq DESC LIMIT 1
"""
# Whether something else than a fill took of the margin shortly before: a funding payment that came between the two.
_TAKEN = """
    SELECT EXISTS (SELECT FROM witness.holds h WHERE h.user_id = $1 AND h.instrument_id = $2 AND h.id < $3
        AND h.margin_after < h.margin_before AND h.at > $4::timestamptz - interval '5 s'
        AND NOT EXISTS (SELECT FROM witness.ranges r WHERE (r.tx, r.instrument_id) = (h.tx, h.instrument_id)))
"""


async def position_at(conn: Connection, user_id: int, instrument_id: str, seq: int) -> tuple[Decimal, Decimal]:
    """Signed quantity and entry notional of a position after event `seq` of its instrument."""
    row = await conn.fetchrow(_BEFORE, user_id, instrument_id, seq)
    return (ZERO, ZERO) if row is None else (row[0], row[1])


async def mark_of(conn: Connection, instrument_id: str, seq: int) -> Decimal:
    """The mark by which the engine judged the fill at event `seq`."""
    mark: Decimal | None = await conn.fetchval(_MARK_OF, instrument_id, seq)
    assert mark is not None, f"Expected a mark before event {seq} of {instrument_id}"
    return mark


async def broken_fills(conn: Connection, after_id: int) -> tuple[list[Finding], int, int]:
    """Fills booked since `after_id` that were not covered; the last id looked at, and how many opened."""
    tiers = await read_tiers(conn)
    found: list[Finding] = []
    opened = 0
    for booking in await conn.fetch(_BOOKINGS, after_id):
        after_id = booking["id"]
        key = booking["user_id"], booking["instrument_id"]
        fills = await conn.fetch(_FILLS, *key, booking["after_seq"], booking["to_seq"])
        # A liquidation's fills divide the margin by rules of their own, and open nothing.
        if not fills or any(fill["cause"] == "LIQUIDATION" for fill in fills):
            continue
        before = await position_at(conn, *key, booking["after_seq"])
        opened += sum(_opens(fill) for fill in fills)
        kind = " (of which funding took some)" if await conn.fetchval(_TAKEN, *key, after_id, booking["at"]) else ""
        # What closing a part of a cross position loses may take of the margin of the rest: the account backs it.
        kept = booking["margin_before"] if booking["margin_mode"] == "ISOLATED" else ZERO
        needed = _margin_needed(kept, before[0], fills)
        name = f"user {key[0]} {key[1]} events {booking['after_seq']} to {booking['to_seq']}"
        if booking["margin_after"] < needed - ROUNDING:
            detail = f"{name}: {booking['margin_after']:f} is held, {needed:f} needed; {_story(booking, before, fills)}"
            found.append(Finding("3", f"initial margin is missing ({booking['margin_mode']}){kind}", detail))
        if booking["margin_mode"] == "ISOLATED" and _opens(fills[-1]):
            mark = await mark_of(conn, key[1], fills[-1]["seq"])
            short = _below_maintenance(booking, before, fills[-1], mark, tiers[key[1]])
            if short:
                found.append(
                    Finding(
                        "3",
                        f"a fill that opened is below maintenance{kind}",
                        f"{name}: {short}; {_story(booking, before, fills)}",
                    )
                )
    return found, after_id, opened


def _story(booking: asyncpg.Record, before: tuple[Decimal, Decimal], fills: Sequence[asyncpg.Record]) -> str:
    held = ", ".join(
        f"{what} {booking[f'{what}_before']:f} -> {booking[f'{what}_after']:f}"
        for what in ("margin", "orders", "short")
    )
    traded = "; ".join(
        f"{fill['seq']}: {fill['side']} {fill['quantity']:f} at {fill['price']:f}, leverage {fill['leverage']},"
        f" open loss {fill['open_loss']:f}, {fill['role']} order {fill['order_id']} ({fill['terms']})"
        for fill in fills
    )
    return f"{booking['margin_mode']} {before[0]:f} at {before[1]:f}, {held}; {traded}"


def _opens(fill: asyncpg.Record) -> bool:
    return (fill["quantity_after"] > 0) == (fill["side"] == "BUY") and bool(fill["quantity_after"])


def _margin_needed(margin: Decimal, quantity: Decimal, fills: Sequence[asyncpg.Record]) -> Decimal:
    """What has to be held after `fills`: notional / leverage of what they opened, and of `margin` the share of what
    was not closed."""
    for fill in fills:
        after = fill["quantity_after"]
        if quantity * after < 0:
            quantity, margin = ZERO, ZERO
        if abs(after) < abs(quantity):
            margin = margin * abs(after) / abs(quantity)
        else:
            margin += (abs(after) - abs(quantity)) * fill["price"] / fill["leverage"]
        quantity = after
    return margin


def _below_maintenance(
    booking: asyncpg.Record, before: tuple[Decimal, Decimal], last: asyncpg.Record, mark: Decimal, tiers: Tiers
) -> str:
    """The figures, when a position that was sound before is not after."""
    name = booking["instrument_id"]
    first = Held(name, *before, booking["margin_before"], mark, tiers)
    if first.quantity and first.margin + first.pnl < first.maintenance:
        return ""
    then = Held(name, last["quantity_after"], last["entry_after"], booking["margin_after"], mark, tiers)
    equity = then.margin + then.pnl
    if equity >= then.maintenance - ROUNDING:
        return ""
    return f"{then.quantity:f} at {last['price']:f}, mark {mark:f}: equity {equity:f}, maintenance {then.maintenance:f}"

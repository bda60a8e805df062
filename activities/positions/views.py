"""What the positions service shows of its tables: positions, fills, and payments of funding."""

from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

import asyncpg

from activities.positions.rows import PositionRow
from domain.clock import iso
from domain.events import BusinessEvent, PositionUpdated, RiskUpdate
from domain.margin import Tier, liquidation_price, maintenance_margin, margin_ratio, unrealized_pnl
from domain.money import AMOUNT_STEP, plain
from domain.positions import Position
from storage.db import Connection, Pool
from storage.rows import column_list, read


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


def events_of(user_id: int, instrument_id: str, view: Mapping[str, Any]) -> list[BusinessEvent]:
    return [
        _updated(user_id, instrument_id, view),
        RiskUpdate(str(user_id), instrument_id, view["marginRatio"], view["liquidationPrice"], str(view["status"])),
    ]


def position_view(
    row: PositionRow,
    mark: Decimal | None,
    tiers: Sequence[Tier],
    backing: Decimal | None = None,
) -> dict[str, Any]:
    """A position as clients see it; what depends on the mark price is null while there is none.

    `backing` is what stands behind a cross position (quote), in place of its own margin. Where it is not known, there
    are no `marginRatio` and no `liquidationPrice` of a cross position: they depend on the whole account.
    """
    position, margin = Position(row.signed_quantity, row.entry_notional), row.margin
    behind: Decimal | None = margin
    liquidation = row.liquidation_price
    if row.margin_mode == "CROSS":
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
        "instrumentId": row.instrument_id,
        "side": position.side,
        "quantity": plain(abs(position.signed_quantity)),
        "entryPrice": _price(position.entry_price),
        "markPrice": _price(mark),
        "unrealizedPnl": _price(unrealized),
        "realizedPnl": plain(row.realized_pnl),
        "leverage": row.leverage,
        "marginMode": row.margin_mode,
        "margin": plain(margin),
        "maintenanceMargin": _price(maintenance),
        "marginRatio": _price(ratio),
        "liquidationPrice": _price(liquidation),
        "status": row.status,
    }


def _price(value: Decimal | None) -> str | None:
    return None if value is None else plain(value.quantize(AMOUNT_STEP))


async def list_positions(conn: Connection | Pool, user_id: int, instrument_id: str | None = None) -> list[PositionRow]:
    """A user's positions, closed ones included, by instrument."""
    rows = await conn.fetch(
        f"SELECT {column_list(PositionRow)} FROM positions.positions"
        " WHERE user_id = $1 AND ($2::text IS NULL OR instrument_id = $2) ORDER BY instrument_id",
        user_id,
        instrument_id,
    )
    return read(PositionRow, rows)


async def list_fills(
    conn: Connection | Pool, user_id: int, *, instrument_id: str | None, before: int | None, limit: int
) -> Sequence[asyncpg.Record]:
    """A user's fills with event ids below `before`, newest first; the columns that `fill_view` needs."""
    return await conn.fetch(
        "SELECT * FROM positions.v_fills WHERE user_id = $1 AND ($2::text IS NULL OR instrument_id = $2)"
        " AND ($3::bigint IS NULL OR event_id < $3) ORDER BY event_id DESC LIMIT $4",
        user_id,
        instrument_id,
        before,
        limit,
    )


async def list_funding_payments(
    conn: Connection | Pool, user_id: int, *, instrument_id: str | None, before: int | None, limit: int
) -> Sequence[asyncpg.Record]:
    """A user's payments of funding (`realized_pnl`, quote) with event ids below `before`, newest first, each with the
    rate and the price that it was calculated from."""
    return await conn.fetch(
        "SELECT e.event_id, e.funding_time, e.instrument_id, e.quantity, e.side, e.price, r.rate, e.realized_pnl,"
        " e.created_at FROM positions.position_events e"
        " JOIN ledger.v_funding_runs r USING (instrument_id, funding_time)"
        " WHERE e.user_id = $1 AND e.funding_time IS NOT NULL AND ($2::text IS NULL OR instrument_id = $2)"
        " AND ($3::bigint IS NULL OR e.event_id < $3) ORDER BY e.event_id DESC LIMIT $4",
        user_id,
        instrument_id,
        before,
        limit,
    )

"""Trades of the engine, folded into positions: one event per side of each."""

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

from activities.matching.engine_log import SequencedEvent
from activities.matching.instruments import Rules
from activities.positions.rows import FillRow, HeldRow
from activities.positions.views import fill_view
from domain.clock import from_ms, iso
from domain.events import AutoDeleveraged, BusinessEvent
from domain.exposure import OPPOSITE
from domain.instruments import Instrument
from domain.matching import Deleveraged, Side, Trade
from domain.money import ZERO, plain
from domain.positions import Fill, Position, apply_fill
from domain.sagas import EventRange
from storage import outbox
from storage.db import Connection
from storage.outbox import UserPush
from storage.rows import assignments, batch, column_list, unnest

_SAVE = (
    f"INSERT INTO positions.positions (instrument_id, {column_list(HeldRow)}) SELECT $1, n.* FROM {unnest(HeldRow, 2)}"
    " ON CONFLICT (user_id, instrument_id)"
    f" DO UPDATE SET {assignments(HeldRow, source='excluded', without=['user_id'])}, updated_at = now()"
)
Cause = Literal["TRADE", "LIQUIDATION", "DELEVERAGE"]
FEE_STEP = Decimal("1e-8")


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


async def apply_trades(conn: Connection, events: EventRange, log: list[SequencedEvent], rules: Rules) -> None:
    """Write an event per side of each trade, what the positions are after them, and what their users are told."""
    instrument_id = events.instrument_id
    trades = [(seq, event, sides_of(event)) for seq, event in log if isinstance(event, Trade | Deleveraged)]
    if not trades:
        return
    instrument = rules.instruments[instrument_id]
    users = sorted({half.user_id for _, _, halves in trades for half in halves})
    terms = await _read_terms(conn, instrument_id, users)
    positions = await _lock(conn, instrument_id, users)
    rows: list[FillRow] = []
    pushes: list[UserPush] = []
    deleveraged: list[BusinessEvent] = []
    for seq, trade, halves in trades:
        if isinstance(trade, Deleveraged):
            event, push = _deleveraging(trade, instrument)
            deleveraged.append(event)
            pushes.append(push)
        for half in halves:
            quantity = instrument.lots_to_quantity(trade.quantity)
            fill = apply_fill(
                positions.get(half.user_id, Position()),
                quantity if half.side == "BUY" else -quantity,
                instrument.ticks_to_price(trade.price),
            )
            positions[half.user_id] = fill.position
            row = _fill_row(instrument, seq, trade, half, fill, half.leverage or terms[half.user_id].leverage)
            rows.append(row)
            pushes.append(UserPush(half.user_id, "fill", fill_view(row._asdict() | {"executed_at": row.created_at})))
    await conn.copy_records_to_table("position_events", schema_name="positions", columns=FillRow._fields, records=rows)
    await _save(conn, instrument_id, positions, terms)
    await outbox.emit(conn, deleveraged, pushes)


def _fill_row(
    instrument: Instrument, seq: int, trade: Trade | Deleveraged, half: TradeSide, fill: Fill, leverage: int
) -> FillRow:
    return FillRow(
        user_id=half.user_id,
        instrument_id=instrument.instrument_id,
        seq=seq,
        role=half.role,
        type=fill.kind,
        status="APPLIED",
        trade_id=trade.trade_id,
        order_id=half.order_id,
        side=half.side,
        price=instrument.ticks_to_price(trade.price),
        quantity=instrument.lots_to_quantity(trade.quantity),
        fee=half.fee,
        realized_pnl=fill.realized_pnl,
        signed_quantity_after=fill.position.signed_quantity,
        entry_notional_after=fill.position.entry_notional,
        leverage=leverage,
        open_loss=instrument.ticks_to_price(half.open_loss),
        cause=half.cause,
        created_at=from_ms(trade.at),
    )


def _deleveraging(trade: Deleveraged, instrument: Instrument) -> tuple[AutoDeleveraged, UserPush]:
    """The event and the notice to somebody whose position was reduced for that of a bankrupt."""
    user_id, instrument_id = trade.counterparty_user_id, instrument.instrument_id
    event = AutoDeleveraged(
        str(user_id),
        instrument_id,
        plain(instrument.lots_to_quantity(trade.quantity)),
        plain(instrument.ticks_to_price(trade.price)),
        OPPOSITE[trade.side],
        trade.trade_id,
        str(trade.user_id),
        iso(from_ms(trade.at)),
    )
    notice = {"instrumentId": instrument_id, "status": "DELEVERAGED", "quantity": event.quantity, "price": event.price}
    return event, UserPush(user_id, "liquidation", notice)


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
        HeldRow(user_id, p.signed_quantity, p.entry_notional, terms[user_id].leverage, terms[user_id].margin_mode)
        for user_id, p in sorted(positions.items())
    ]
    await conn.execute(_SAVE, instrument_id, *batch(HeldRow, rows))

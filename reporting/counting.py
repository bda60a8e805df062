"""What is counted, and how: each row adds to the sum of its user, day and instrument, in any order.

The streams and the tables bring the same rows, so that both ways lead to the same sums. A day is a UTC date: that of a
trade's execution, and for what the ledger books, that of the booking.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from decimal import Decimal

import msgspec

from domain.events import (
    SCHEMA_VERSION,
    AutoDeleveraged,
    BusinessEvent,
    LedgerEntryCreated,
    LiquidationTriggered,
    TradeExecuted,
)
from domain.money import ZERO
from storage.db import Connection, columns

TOPICS = tuple(kind.topic for kind in (TradeExecuted, LedgerEntryCreated, AutoDeleveraged, LiquidationTriggered))

# {sides}: user_id, day, instrument_id, role (MAKER, TAKER; NULL of what was deleveraged), volume, fee, net_quantity.
ADD_TRADES = """
    INSERT INTO reporting.trade_days AS d (user_id, day, instrument_id, maker_volume, taker_volume, maker_fees,
        taker_fees, maker_trades, taker_trades, net_quantity)
    SELECT user_id, day, instrument_id,
        coalesce(sum(volume) FILTER (WHERE role = 'MAKER'), 0), coalesce(sum(volume) FILTER (WHERE role = 'TAKER'), 0),
        coalesce(sum(fee) FILTER (WHERE role = 'MAKER'), 0), coalesce(sum(fee) FILTER (WHERE role = 'TAKER'), 0),
        count(*) FILTER (WHERE role = 'MAKER'), count(*) FILTER (WHERE role = 'TAKER'), sum(net_quantity)
    FROM ({sides}) sides GROUP BY user_id, day, instrument_id
    ON CONFLICT (user_id, day, instrument_id) DO UPDATE SET
        maker_volume = d.maker_volume + excluded.maker_volume, taker_volume = d.taker_volume + excluded.taker_volume,
        maker_fees = d.maker_fees + excluded.maker_fees, taker_fees = d.taker_fees + excluded.taker_fees,
        maker_trades = d.maker_trades + excluded.maker_trades, taker_trades = d.taker_trades + excluded.taker_trades,
        net_quantity = d.net_quantity + excluded.net_quantity
"""
# What the days of {users} (all, or those of some) changed the sum of all long positions by.
OPEN_INTEREST_CHANGES = """
    SELECT instrument_id, day, sum(greatest(after, 0) - greatest(after - net_quantity, 0)) AS change
    FROM (SELECT instrument_id, day, net_quantity,
              sum(net_quantity) OVER (PARTITION BY user_id, instrument_id ORDER BY day) AS after
          FROM reporting.trade_days WHERE {users}) held
    GROUP BY instrument_id, day
"""
# {results}: user_id, day, instrument_id, asset, entry_type, amount.
ADD_RESULTS = """
    INSERT INTO reporting.pnl_days AS d
        (user_id, day, instrument_id, asset, realized_pnl, fees, funding, liquidation, insurance)
    SELECT user_id, day, instrument_id, asset,
        coalesce(sum(amount) FILTER (WHERE entry_type = 'REALIZED_PNL'), 0),
        coalesce(sum(amount) FILTER (WHERE entry_type = 'FEE'), 0),
        coalesce(sum(amount) FILTER (WHERE entry_type = 'FUNDING'), 0),
        coalesce(sum(amount) FILTER (WHERE entry_type IN ('LIQUIDATION_FEE', 'LIQUIDATION_SURPLUS')), 0),
        coalesce(sum(amount) FILTER (WHERE entry_type IN ('INSURANCE_FUND', 'SHORTFALL')), 0)
    FROM ({results}) results
    WHERE entry_type IN
        ('REALIZED_PNL', 'FEE', 'FUNDING', 'LIQUIDATION_FEE', 'LIQUIDATION_SURPLUS', 'INSURANCE_FUND', 'SHORTFALL')
      AND amount <> 0
    GROUP BY user_id, day, instrument_id, asset
    ON CONFLICT (user_id, day, instrument_id, asset) DO UPDATE SET
        realized_pnl = d.realized_pnl + excluded.realized_pnl, fees = d.fees + excluded.fees,
        funding = d.funding + excluded.funding, liquidation = d.liquidation + excluded.liquidation,
        insurance = d.insurance + excluded.insurance
"""
# {liquidations}: liquidation_id, user_id, instrument_id, position_id, reason, triggered_at (to the millisecond).
ADD_LIQUIDATIONS = """
    INSERT INTO reporting.liquidations (liquidation_id, user_id, instrument_id, position_id, reason, triggered_at)
    {liquidations}
"""

_SIDES = """
    SELECT user_id::bigint AS user_id, day::date AS day, instrument_id, role,
        price::numeric * quantity::numeric AS volume, fee::numeric AS fee,
        CASE side WHEN 'BUY' THEN quantity::numeric ELSE -quantity::numeric END AS net_quantity
    FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::text[], $6::text[], $7::text[], $8::text[])
        AS n (user_id, day, instrument_id, role, side, price, quantity, fee)
"""
_RESULTS = """
    SELECT user_id::bigint AS user_id, day::date AS day, instrument_id, asset, entry_type,
        available::numeric + reserved::numeric AS amount
    FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::text[], $6::text[], $7::text[])
        AS n (user_id, day, instrument_id, asset, entry_type, available, reserved)
"""
_LIQUIDATIONS = """
    SELECT liquidation_id::bigint, user_id::bigint, instrument_id, position_id::bigint, reason, at::timestamptz
    FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::text[], $6::text[])
        AS n (liquidation_id, user_id, instrument_id, position_id, reason, at)
"""
_COUNT_TRADES = ADD_TRADES.format(sides=_SIDES)
_CHANGES_OF_USERS = OPEN_INTEREST_CHANGES.format(users="user_id = ANY($1::bigint[])")
_ADD_OPEN_INTEREST = """
    INSERT INTO reporting.open_interest_days AS d (instrument_id, day, change)
    SELECT * FROM unnest($1::text[], $2::date[], $3::numeric[])
    ON CONFLICT (instrument_id, day) DO UPDATE SET change = d.change + excluded.change
"""
_COUNT_RESULTS = ADD_RESULTS.format(results=_RESULTS)
_COUNT_LIQUIDATIONS = ADD_LIQUIDATIONS.format(liquidations=_LIQUIDATIONS)

Row = tuple[str | None, ...]


class UnreadableEventError(Exception):
    """An event lacks what is counted, or its version is not known here."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of a stream. `message_id` and `line` name the event, also when it is sent again; `time` is ISO-8601."""

    topic: str
    entry_id: str
    message_id: int
    line: int
    time: str
    version: str
    data: bytes


def _trade(trade: TradeExecuted, _: str) -> list[Row]:
    day, is_buyer_taker = trade.executed_at[:10], trade.taker_side == "BUY"
    terms = (trade.price, trade.quantity)
    taker, maker = ("TAKER", trade.taker_fee), ("MAKER", trade.maker_fee)
    (bought_as, buyer_fee), (sold_as, seller_fee) = (taker, maker) if is_buyer_taker else (maker, taker)
    return [
        (trade.buyer_user_id, day, trade.instrument_id, bought_as, "BUY", *terms, buyer_fee),
        (trade.seller_user_id, day, trade.instrument_id, sold_as, "SELL", *terms, seller_fee),
    ]


def _deleveraging(event: AutoDeleveraged, _: str) -> list[Row]:
    opposite = "SELL" if event.side == "BUY" else "BUY"
    return [
        (user_id, event.executed_at[:10], event.instrument_id, None, side, event.price, event.quantity, str(ZERO))
        for user_id, side in ((event.user_id, event.side), (event.bankrupt_user_id, opposite))
    ]


def _result(entry: LedgerEntryCreated, time: str) -> list[Row]:
    if entry.instrument_id is None:
        return []
    amounts = (entry.delta_available, entry.delta_reserved)
    return [(entry.user_id, time[:10], entry.instrument_id, entry.asset, entry.entry_type, *amounts)]


def _liquidation(event: LiquidationTriggered, time: str) -> list[Row]:
    names = (event.user_id, event.instrument_id, event.position_id)
    return [(str(event.liquidation_id), *names, event.reason, time)]


def _rows(entries: Iterable[Entry], kind: type[BusinessEvent], rows_of: Callable[..., list[Row]]) -> list[Row]:
    decode = msgspec.json.Decoder(kind).decode
    found: list[Row] = []
    for entry in entries:
        if entry.topic == kind.topic:
            if entry.version != str(SCHEMA_VERSION):
                raise UnreadableEventError(f"{entry}: its version is not {SCHEMA_VERSION}")
            try:
                found += rows_of(decode(entry.data), entry.time)
            except msgspec.MsgspecError as error:
                raise UnreadableEventError(f"{entry}: {error}") from error
    return found


async def count(conn: Connection, entries: Sequence[Entry]) -> None:
    """Add events to the sums, in the caller's transaction; each must be given once. Raises UnreadableEventError."""
    sides = _rows(entries, TradeExecuted, _trade) + _rows(entries, AutoDeleveraged, _deleveraging)
    if sides:
        await _count_trades(conn, sides)
    if results := _rows(entries, LedgerEntryCreated, _result):
        await conn.execute(_COUNT_RESULTS, *columns(results, 7))
    if liquidations := _rows(entries, LiquidationTriggered, _liquidation):
        await conn.execute(_COUNT_LIQUIDATIONS, *columns(liquidations, 6))


async def _count_trades(conn: Connection, sides: Sequence[Row]) -> None:
    users = sorted({int(side[0]) for side in sides if side[0] is not None})
    before = await _changes(conn, users)
    await conn.execute(_COUNT_TRADES, *columns(sides, 8))
    after = await _changes(conn, users)
    rows = [(*key, change - before.get(key, ZERO)) for key, change in after.items() if change != before.get(key, ZERO)]
    await conn.execute(_ADD_OPEN_INTEREST, *columns(rows, 3))


async def _changes(conn: Connection, users: Sequence[int]) -> dict[tuple[str, date], Decimal]:
    rows = await conn.fetch(_CHANGES_OF_USERS, users)
    return {(row["instrument_id"], row["day"]): row["change"] for row in rows}

"""The orders service: from PENDING to the command log, and from engine events to the order's final state."""

import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import asyncpg
import msgspec
from redis.asyncio import Redis
from redis.exceptions import RedisError
from temporalio import activity

from activities.matching.engine_log import EngineLog, SequencedEvent
from activities.matching.instruments import RuleBook
from activities.matching.steps import append_commands
from domain.clock import iso, to_ms
from domain.events import BusinessEvent, OrderAmendRequested, OrderCancelRequested, OrderCreated
from domain.instruments import Instrument
from domain.liquidation_saga import CANCEL_ORDERS, Takeover
from domain.matching import (
    Amend,
    Amended,
    AmendRejected,
    AnyCommand,
    Cancel,
    Cancelled,
    Expired,
    Filled,
    New,
    Placed,
    Rejected,
    Side,
    StopPlaced,
    Trade,
)
from domain.money import ZERO, plain
from domain.order_entry import protection
from domain.sagas import (
    ACCEPT_ORDERS,
    APPLY_ORDER_EVENTS,
    CANCEL_UNCOVERED,
    REQUEST_CANCELS,
    Acceptance,
    EventRange,
    OrderBatch,
    Outcome,
    Uncovered,
    Verdict,
)
from storage import outbox
from storage.db import Connection, Pool, columns
from storage.once import advance_cursor
from storage.outbox import UserPush
from telemetry.metrics import ORDERS

log = logging.getLogger(__name__)

OPEN_STATUSES = ("PENDING", "ACCEPTED", "PLACED", "PARTIALLY_FILLED", "CANCEL_REQUESTED")
IN_ENGINE_STATUSES = ("ACCEPTED", "PLACED", "PARTIALLY_FILLED")
# The engine has protection in millionths.
PROTECTION_UNITS = 1_000_000
# Of an order or amendment (`domain.matching.New.backed`).
ALL_BACKED = -1
VERDICTS_CHANNEL = "orders:verdicts"
ORDER_COLUMNS = (
    "order_id, client_order_id, user_id, instrument_id, side, type, time_in_force, price, quantity, filled_quantity,"
    " filled_notional, status, failure_reason, stp_mode, post_only, reduce_only, stop_price, working_type,"
    " is_liquidation, created_at, updated_at"
)
# What an order's margin is held at: see `storage.tables.orders`.
MARGIN_COLUMNS = "bound_price, margin_price, open_loss"
AMENDMENT_COLUMNS = "amendment_id, order_id, user_id, price, quantity, status, failure_reason, created_at, updated_at"


def order_view(row: Mapping[str, Any] | asyncpg.Record) -> dict[str, Any]:
    """An order as its user sees it, from ORDER_COLUMNS."""
    filled: Decimal = row["filled_quantity"]
    price: Decimal | None = row["price"]
    return {
        "orderId": row["order_id"],
        "clientOrderId": row["client_order_id"],
        "userId": str(row["user_id"]),
        "instrumentId": row["instrument_id"],
        "side": row["side"],
        "type": row["type"],
        "timeInForce": row["time_in_force"],
        "price": None if price is None else plain(price),
        "quantity": plain(row["quantity"]),
        "filledQuantity": plain(filled),
        "averagePrice": average_price(row["filled_notional"], filled),
        "status": row["status"],
        "failureReason": row["failure_reason"],
        "stpMode": row["stp_mode"],
        "postOnly": row["post_only"],
        "reduceOnly": row["reduce_only"],
        "stopPrice": None if row["stop_price"] is None else plain(row["stop_price"]),
        "workingType": row["working_type"],
        "isLiquidation": row["is_liquidation"],
        "createdAt": iso(row["created_at"]),
        "updatedAt": iso(row["updated_at"]),
    }


def amendment_view(row: Mapping[str, Any] | asyncpg.Record) -> dict[str, Any]:
    """An amendment as its user sees it, from AMENDMENT_COLUMNS."""
    price, quantity = row["price"], row["quantity"]
    return {
        "amendmentId": row["amendment_id"],
        "orderId": row["order_id"],
        "price": None if price is None else plain(price),
        "quantity": None if quantity is None else plain(quantity),
        "status": row["status"],
        "failureReason": row["failure_reason"],
        "createdAt": iso(row["created_at"]),
        "updatedAt": iso(row["updated_at"]),
    }


def average_price(filled_notional: Decimal, filled_quantity: Decimal) -> str | None:
    """Quote per base over all fills, 8 decimals; None before the first."""
    if not filled_quantity:
        return None
    return plain((filled_notional / filled_quantity).quantize(Decimal("1e-8")))


@dataclass(slots=True)
class OrderChange:
    """What a range of engine events does to one order: fills to add, and the state it reaches (None: still open).

    Amendments have their ids from the same source; of them there is only how they ended, and why.
    """

    filled_quantity: Decimal = ZERO
    filled_notional: Decimal = ZERO
    final_status: str | None = None
    reason: str | None = None
    # After an amendment: what the order is over, less what it had filled before these events; its price, and at which
    # price and open loss its margin is held.
    quantity: Decimal | None = None
    price: Decimal | None = None
    margin_price: Decimal | None = None
    open_loss: Decimal | None = None


def fold_events(log: Iterable[SequencedEvent], instrument: Instrument) -> dict[int, OrderChange]:
    """Engine events by order or amendment."""
    changes: defaultdict[int, OrderChange] = defaultdict(OrderChange)
    for _, event in log:
        match event:
            case Trade():
                quantity = instrument.lots_to_quantity(event.quantity)
                notional = instrument.ticks_to_price(event.price) * quantity
                for order_id in (event.maker_order_id, event.taker_order_id):
                    change = changes[order_id]
                    change.filled_quantity += quantity
                    change.filled_notional += notional
            case Placed() | StopPlaced():
                changes[event.order_id].reason = None
            case Amended():
                change = changes[event.order_id]
                change.quantity = change.filled_quantity + instrument.lots_to_quantity(event.quantity)
                change.price = instrument.ticks_to_price(event.price)
                change.margin_price = instrument.ticks_to_price(event.basis or event.price)
                change.open_loss = instrument.ticks_to_price(event.loss)
                if event.amendment_id:
                    changes[event.amendment_id].final_status = "AMENDED"
            case AmendRejected() if event.amendment_id:
                rejected = changes[event.amendment_id]
                rejected.final_status, rejected.reason = "REJECTED", event.reason
            case Filled():
                changes[event.order_id].final_status = "FILLED"
            case Cancelled():
                changes[event.order_id].final_status, changes[event.order_id].reason = "CANCELLED", event.reason
            case Expired():
                changes[event.order_id].final_status, changes[event.order_id].reason = "EXPIRED", event.reason
            case Rejected():
                changes[event.order_id].final_status, changes[event.order_id].reason = "REJECTED", event.reason
            case _:
                pass
    return dict(changes)


class OrderActivities:
    """Activities on the orders service's own tables."""

    def __init__(self, pool: Pool, redis: Redis, log: EngineLog) -> None:
        self._pool = pool
        self._redis = redis
        self._log = log
        self._rules = RuleBook()

    @activity.defn(name=ACCEPT_ORDERS)
    async def accept(self, acceptance: Acceptance) -> Verdict:
        """End the placement of orders and amendments: ACCEPTED and in the command log, or FAILED with the reason; one
        transaction."""
        async with self._pool.acquire() as conn, conn.transaction():
            await _accept(conn, acceptance, (await self._rules.rules(conn)).instruments)
            if acceptance.refused:
                await _fail(conn, acceptance)
            await _close_saga(conn, acceptance.saga_id)
        verdict = Verdict(len(acceptance.passed), acceptance.refused)
        ORDERS.labels("ACCEPTED").inc(len(acceptance.passed))
        ORDERS.labels("FAILED").inc(len(acceptance.refused))
        # A hint for the api process that waits; what counts is committed, so the saga does not wait for Redis.
        try:
            await self._redis.publish(
                VERDICTS_CHANNEL, msgspec.json.encode({"sagaId": acceptance.saga_id, "verdict": verdict})
            )
        except (RedisError, OSError) as error:
            log.warning("The verdict of %s could not be announced: %r", acceptance.saga_id, error)
        return verdict

    @activity.defn(name=REQUEST_CANCELS)
    async def request_cancels(self, batch: OrderBatch) -> Outcome:
        """Append CANCEL commands for the orders the engine has; `busy` are those still on their way to it."""
        async with self._pool.acquire() as conn, conn.transaction():
            checked = await _lock_checked(conn, batch.order_ids)
            requested = await _request_cancels(conn, checked)
            waiting = await conn.fetch(
                "SELECT order_id FROM orders.orders WHERE order_id = ANY($1) AND order_id <> ALL($2)",
                batch.order_ids,
                checked,
            )
            if not waiting:
                await _close_saga(conn, batch.saga_id)
        return Outcome(requested, busy=[row["order_id"] for row in waiting])

    @activity.defn(name=APPLY_ORDER_EVENTS)
    async def apply_events(self, events: EventRange) -> None:
        """Fold a range of engine events into the orders and tell their users."""
        async with self._pool.acquire() as conn, conn.transaction():
            if await advance_cursor(conn, "orders", events):
                instrument = (await self._rules.rules(conn)).instruments[events.instrument_id]
                changes = fold_events(await self._log.read(conn, events), instrument)
                await _apply(conn, changes)
                for outcome, count in Counter(change.final_status for change in changes.values()).items():
                    ORDERS.labels(outcome or "OPEN").inc(count)

    @activity.defn(name=CANCEL_UNCOVERED)
    async def cancel_uncovered(self, uncovered: Uncovered) -> None:
        """Request the cancellation of all open orders, in one instrument, of users whose money a loss took."""
        async with self._pool.acquire() as conn, conn.transaction():
            await _cancel_uncovered(conn, [(user_id, uncovered.instrument_id) for user_id in uncovered.user_ids])

    @activity.defn(name=CANCEL_ORDERS)
    async def cancel_for_liquidation(self, takeover: Takeover) -> int:
        """Request the cancellation of all open orders of a user whose position is liquidated; how many it was now."""
        async with self._pool.acquire() as conn, conn.transaction():
            rows = await conn.fetch(
                "SELECT order_id FROM orders.orders WHERE user_id = $1 AND instrument_id = ANY($2) AND status = ANY($3)"
                " AND NOT is_liquidation ORDER BY order_id",
                takeover.user_id,
                takeover.instrument_ids,
                IN_ENGINE_STATUSES,
            )
            return len(await _request_cancels(conn, [row["order_id"] for row in rows], "LIQUIDATION"))


async def submit_liquidation_order(
    conn: Connection, user_id: int, instrument: Instrument, side: Side, quantity: Decimal, bound_price: Decimal
) -> int:
    """Insert a liquidation order, accepted, and append it to the engine's log in the caller's transaction.

    MARKET, reduce-only, at `bound_price` or better. Answers the seq of its command. No other order of the user is in
    its way: one that still is ends.
    """
    order_id = await conn.fetchval("SELECT nextval('orders.order_id_seq')")
    row = await conn.fetchrow(
        "INSERT INTO orders.orders (order_id, user_id, instrument_id, side, type, time_in_force, bound_price, quantity,"
        " stp_mode, reduce_only, is_liquidation, status)"
        " VALUES ($1, $2, $3, $4, 'MARKET', 'IOC', $5, $6, 'EXPIRE_MAKER', TRUE, TRUE, 'ACCEPTED')"
        f" RETURNING {ORDER_COLUMNS}, {MARGIN_COLUMNS}",
        order_id,
        user_id,
        instrument.instrument_id,
        side,
        bound_price,
        quantity,
    )
    assert row is not None
    await outbox.emit(conn, [_created_event(row)], _order_pushes([row]))
    seqs = await append_commands(conn, {instrument.instrument_id: [_new(row, instrument)]})
    return seqs[instrument.instrument_id]


async def _accept(conn: Connection, acceptance: Acceptance, instruments: Mapping[str, Instrument]) -> None:
    order_ids, backed = acceptance.passed, {backing.order_id: backing.lots for backing in acceptance.backed}
    rows = await conn.fetch(
        "UPDATE orders.orders SET status = 'ACCEPTED', updated_at = now()"
        " WHERE order_id = ANY($1) AND status = 'PENDING'"
        f" RETURNING order_id, user_id, instrument_id, side, type, time_in_force, price, {MARGIN_COLUMNS}, quantity,"
        " stp_mode, post_only, reduce_only, stop_price, working_type, is_liquidation, updated_at",
        order_ids,
    )
    commands: defaultdict[str, list[AnyCommand]] = defaultdict(list)
    events: list[BusinessEvent] = []
    for row in sorted(rows, key=lambda row: row["order_id"]):
        commands[row["instrument_id"]].append(
            _new(row, instruments[row["instrument_id"]], backed.get(row["order_id"], ALL_BACKED))
        )
        events.append(_created_event(row))
    for row in await _accept_amendments(conn, _others(order_ids, rows)):
        amendment = amendment_view(row)
        commands[row["instrument_id"]].append(
            _amend(row, instruments[row["instrument_id"]], backed.get(row["amendment_id"], ALL_BACKED))
        )
        events.append(
            OrderAmendRequested(row["order_id"], row["amendment_id"], amendment["price"], amendment["quantity"])
        )
    await outbox.emit(conn, events)
    await append_commands(conn, commands)


def _created_event(row: asyncpg.Record) -> OrderCreated:
    return OrderCreated(
        row["order_id"],
        str(row["user_id"]),
        row["instrument_id"],
        row["side"],
        row["type"],
        None if row["price"] is None else plain(row["price"]),
        plain(row["quantity"]),
        row["is_liquidation"],
    )


def _others(ids: Iterable[int], orders: Iterable[asyncpg.Record]) -> list[int]:
    """Those of `ids` that are not of `orders`: amendments, if anything."""
    return sorted(set(ids) - {row["order_id"] for row in orders})


async def _accept_amendments(conn: Connection, amendment_ids: Sequence[int]) -> list[asyncpg.Record]:
    if not amendment_ids:
        return []
    rows = await conn.fetch(
        "UPDATE orders.amendments SET status = 'ACCEPTED', updated_at = now()"
        f" WHERE amendment_id = ANY($1) AND status = 'PENDING' RETURNING {AMENDMENT_COLUMNS}, instrument_id,"
        " margin_price, open_loss",
        amendment_ids,
    )
    return sorted(rows, key=lambda row: row["amendment_id"])


def _amend(row: asyncpg.Record, instrument: Instrument, backed: int) -> Amend:
    price, quantity = row["price"], row["quantity"]
    return Amend(
        at=to_ms(row["updated_at"]),
        order_id=row["order_id"],
        user_id=row["user_id"],
        price=None if price is None else instrument.price_to_ticks(price),
        quantity=None if quantity is None else instrument.quantity_to_lots(quantity),
        amendment_id=row["amendment_id"],
        basis=_ticks(row["margin_price"], instrument),
        loss=_ticks(row["open_loss"], instrument),
        backed=backed,
    )


def _ticks(price: Decimal | None, instrument: Instrument) -> int:
    """`price` in ticks, 0 for none."""
    return instrument.price_to_ticks(price) if price else 0


def _new(row: asyncpg.Record, instrument: Instrument, backed: int = ALL_BACKED) -> New:
    price, basis = instrument.price_to_ticks(row["bound_price"]), _ticks(row["margin_price"], instrument)
    waits_for_market = row["type"] in ("STOP_MARKET", "TAKE_PROFIT_MARKET")
    return New(
        at=to_ms(row["updated_at"]),
        order_id=row["order_id"],
        user_id=row["user_id"],
        side=row["side"],
        type=row["type"],
        time_in_force=row["time_in_force"],
        price=price,
        quantity=instrument.quantity_to_lots(row["quantity"]),
        stp_mode=row["stp_mode"],
        liquidation=row["is_liquidation"],
        post_only=row["post_only"],
        reduce_only=row["reduce_only"],
        stop_price=_ticks(row["stop_price"], instrument),
        working_type=row["working_type"] or "MARK",
        basis=0 if basis == price else basis,
        loss=_ticks(row["open_loss"], instrument),
        protection=int(protection(instrument) * PROTECTION_UNITS) if waits_for_market else 0,
        backed=backed,
    )


async def _fail(conn: Connection, acceptance: Acceptance) -> None:
    rows = await conn.fetch(
        "UPDATE orders.orders SET status = 'FAILED', failure_reason = n.reason, updated_at = now()"
        " FROM unnest($1::bigint[], $2::text[]) AS n (id, reason)"
        f" WHERE order_id = n.id AND status = 'PENDING' RETURNING {ORDER_COLUMNS}",
        *columns([(refusal.order_id, refusal.reason) for refusal in acceptance.refused], 2),
    )
    failed = {refusal.order_id: ("FAILED", refusal.reason) for refusal in acceptance.refused}
    amendments = await _end_amendments(conn, {id_: failed[id_] for id_ in _others(failed, rows)}, "PENDING")
    await outbox.emit(conn, pushes=_order_pushes(rows) + amendments)


async def _end_amendments(
    conn: Connection, ends: Mapping[int, tuple[str | None, str | None]], status: str
) -> list[UserPush]:
    """Bring amendments that are in `status` to their final status, with the reason if there is one."""
    if not ends:
        return []
    rows = await conn.fetch(
        "UPDATE orders.amendments SET status = n.final, failure_reason = n.reason, updated_at = now()"
        " FROM unnest($1::bigint[], $2::text[], $3::text[]) AS n (id, final, reason)"
        f" WHERE amendment_id = n.id AND status = $4 RETURNING {AMENDMENT_COLUMNS}",
        *columns([(id_, *end) for id_, end in ends.items()], 3),
        status,
    )
    in_order = sorted(rows, key=lambda row: row["amendment_id"])
    return [UserPush(row["user_id"], "amendment", amendment_view(row)) for row in in_order]


async def _lock(conn: Connection, order_ids: Sequence[int]) -> None:
    """Lock in order of ids, so that no two transactions wait for each other."""
    await conn.execute("SELECT 1 FROM orders.orders WHERE order_id = ANY($1) ORDER BY order_id FOR UPDATE", order_ids)


async def _lock_checked(conn: Connection, order_ids: Sequence[int]) -> list[int]:
    """The same for those of `order_ids` whose check is over; answers which these are.

    Others are not waited for: the transaction that ends their check has locked some of them, in no order, and may be
    about to wait for the rest.
    """
    rows = await conn.fetch(
        "SELECT order_id FROM orders.orders WHERE order_id = ANY($1) AND status <> 'PENDING'"
        " ORDER BY order_id FOR UPDATE",
        order_ids,
    )
    return [row["order_id"] for row in rows]


async def _close_saga(conn: Connection, saga_id: str) -> None:
    await conn.execute("UPDATE orders.sagas SET done = TRUE WHERE workflow_id = $1 AND NOT done", saga_id)


async def cancel_all_uncovered(conn: Connection) -> int:
    """Request the cancellation of all orders that are not covered in full, wherever a loss took their money: a cross
    account's loss takes it in other instruments than its own. How many it was."""
    keys = await conn.fetch("SELECT user_id, instrument_id FROM ledger.v_margin_holds WHERE order_short > 0")
    return await _cancel_uncovered(conn, [(row["user_id"], row["instrument_id"]) for row in keys]) if keys else 0


async def _cancel_uncovered(conn: Connection, keys: Sequence[tuple[int, str]]) -> int:
    rows = await conn.fetch(
        "SELECT order_id FROM orders.orders JOIN unnest($1::bigint[], $2::text[]) AS k (user_id, instrument_id)"
        " USING (user_id, instrument_id) WHERE status = ANY($3) ORDER BY order_id",
        *columns(keys, 2),
        IN_ENGINE_STATUSES,
    )
    return len(await _request_cancels(conn, [row["order_id"] for row in rows], "INSUFFICIENT_MARGIN")) if rows else 0


async def _request_cancels(conn: Connection, order_ids: Sequence[int], reason: str = "USER_REQUEST") -> list[int]:
    await _lock(conn, order_ids)
    rows = await conn.fetch(
        "UPDATE orders.orders SET status = 'CANCEL_REQUESTED', updated_at = now()"
        " WHERE order_id = ANY($1) AND status = ANY($2) RETURNING order_id, user_id, instrument_id, updated_at",
        order_ids,
        IN_ENGINE_STATUSES,
    )
    commands: defaultdict[str, list[AnyCommand]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: row["order_id"]):
        commands[row["instrument_id"]].append(
            Cancel(at=to_ms(row["updated_at"]), order_id=row["order_id"], user_id=row["user_id"], reason=reason)
        )
    requested = sorted(row["order_id"] for row in rows)
    await outbox.emit(conn, [OrderCancelRequested(order_id) for order_id in requested])
    await append_commands(conn, commands)
    return requested


async def _apply(conn: Connection, changes: dict[int, OrderChange]) -> None:
    await _lock(conn, list(changes))
    rows = await conn.fetch(
        "UPDATE orders.orders SET filled_quantity = filled_quantity + n.traded,"
        " filled_notional = filled_notional + n.paid, quantity = coalesce(filled_quantity + n.quantity_left, quantity),"
        " price = CASE WHEN price IS NULL THEN NULL ELSE coalesce(n.new_price, price) END,"
        " bound_price = coalesce(n.new_price, bound_price), margin_price = coalesce(n.new_margin_price, margin_price),"
        " open_loss = coalesce(n.new_open_loss, open_loss),"
        " status = CASE WHEN n.final IS NOT NULL THEN n.final WHEN status = 'CANCEL_REQUESTED' THEN status"
        "   WHEN filled_quantity + n.traded > 0 THEN 'PARTIALLY_FILLED' ELSE 'PLACED' END,"
        " failure_reason = coalesce(n.reason, failure_reason), updated_at = now()"
        " FROM unnest($1::bigint[], $2::numeric[], $3::numeric[], $4::text[], $5::text[], $6::numeric[], $7::numeric[],"
        " $8::numeric[], $9::numeric[])"
        " AS n (id, traded, paid, final, reason, quantity_left, new_price, new_margin_price, new_open_loss)"
        f" WHERE order_id = n.id RETURNING {ORDER_COLUMNS}",
        *columns(
            [
                (
                    i,
                    c.filled_quantity,
                    c.filled_notional,
                    c.final_status,
                    c.reason,
                    c.quantity,
                    c.price,
                    c.margin_price,
                    c.open_loss,
                )
                for i, c in changes.items()
            ],
            9,
        ),
    )
    ends = {id_: (changes[id_].final_status, changes[id_].reason) for id_ in _others(changes, rows)}
    await outbox.emit(conn, pushes=_order_pushes(rows) + await _end_amendments(conn, ends, "ACCEPTED"))


def _order_pushes(rows: Iterable[asyncpg.Record]) -> list[UserPush]:
    # Postgres gives updated rows in any order.
    in_order = sorted(rows, key=lambda row: row["order_id"])
    return [UserPush(row["user_id"], "order", order_view(row)) for row in in_order]

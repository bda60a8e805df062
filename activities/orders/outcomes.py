"""What engine events make of orders and amendments."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal

from activities.matching.engine_log import SequencedEvent
from activities.orders.cancels import lock_orders
from activities.orders.rows import AmendmentRow, ChangedRow, EndedRow, OrderRow
from activities.orders.views import amendment_view, order_pushes
from domain.instruments import Instrument
from domain.matching import Amended, AmendRejected, Cancelled, Expired, Filled, Placed, Rejected, StopPlaced, Trade
from domain.money import ZERO
from storage import outbox
from storage.db import Connection
from storage.outbox import UserPush
from storage.rows import batch, column_list, read, unnest

_APPLY = f"""
    UPDATE orders.orders o SET filled_quantity = filled_quantity + n.traded,
        filled_notional = filled_notional + n.paid, quantity = coalesce(filled_quantity + n.quantity_left, quantity),
        price = CASE WHEN price IS NULL THEN NULL ELSE coalesce(n.new_price, price) END,
        bound_price = coalesce(n.new_price, bound_price), margin_price = coalesce(n.new_margin_price, margin_price),
        open_loss = coalesce(n.new_open_loss, open_loss),
        status = CASE WHEN n.final IS NOT NULL THEN n.final WHEN status = 'CANCEL_REQUESTED' THEN status
                      WHEN filled_quantity + n.traded > 0 THEN 'PARTIALLY_FILLED' ELSE 'PLACED' END,
        failure_reason = coalesce(n.reason, failure_reason), updated_at = now()
    FROM {unnest(ChangedRow)} WHERE o.order_id = n.order_id RETURNING {column_list(OrderRow, "o")}
"""


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


def others(ids: Iterable[int], orders: Iterable[OrderRow]) -> list[int]:
    """Those of `ids` that are not of `orders`: amendments, if anything."""
    return sorted(set(ids) - {row.order_id for row in orders})


async def end_amendments(conn: Connection, ends: Sequence[EndedRow], status: str) -> list[UserPush]:
    """Bring amendments that are in `status` to their final status, with the reason if there is one."""
    if not ends:
        return []
    rows = await conn.fetch(
        "UPDATE orders.amendments SET status = n.final, failure_reason = n.reason, updated_at = now()"
        f" FROM {unnest(EndedRow)} WHERE amendment_id = n.id AND status = $4 RETURNING {column_list(AmendmentRow)}",
        *batch(EndedRow, ends),
        status,
    )
    in_order = sorted(read(AmendmentRow, rows), key=lambda row: row.amendment_id)
    return [UserPush(row.user_id, "amendment", amendment_view(row)) for row in in_order]


async def apply_changes(conn: Connection, changes: dict[int, OrderChange]) -> None:
    """Write what engine events made of orders and amendments, and tell their users."""
    await lock_orders(conn, list(changes))
    changed = [_changed_row(order_id, change) for order_id, change in changes.items()]
    rows = read(OrderRow, await conn.fetch(_APPLY, *batch(ChangedRow, changed)))
    ends = [EndedRow(id_, changes[id_].final_status, changes[id_].reason) for id_ in others(changes, rows)]
    await outbox.emit(conn, pushes=order_pushes(rows) + await end_amendments(conn, ends, "ACCEPTED"))


def _changed_row(order_id: int, change: OrderChange) -> ChangedRow:
    return ChangedRow(
        order_id=order_id,
        traded=change.filled_quantity,
        paid=change.filled_notional,
        final=change.final_status,
        reason=change.reason,
        quantity_left=change.quantity,
        new_price=change.price,
        new_margin_price=change.margin_price,
        new_open_loss=change.open_loss,
    )

"""Orders on their way, as their senders see them: just taken in, or after the engine's word."""

from datetime import datetime
from typing import Any

from activities.orders.outcomes import OrderChange
from activities.orders.rows import OrderRow
from activities.orders.views import average_price, order_view
from domain.money import ZERO, plain
from domain.order_entry import NewOrder


def pending_view(order_id: int, order: NewOrder, now: datetime) -> dict[str, Any]:
    """An order just taken in, as `activities.orders.order_view` shows it from its row."""
    request = order.request
    return order_view(
        OrderRow(
            order_id=order_id,
            client_order_id=request.client_order_id,
            user_id=order.user_id,
            instrument_id=request.instrument_id,
            side=request.side,
            type=request.type,
            time_in_force=request.time_in_force,
            price=request.price,
            quantity=request.quantity,
            filled_quantity=ZERO,
            filled_notional=ZERO,
            status="PENDING",
            failure_reason=None,
            stp_mode=request.stp_mode,
            post_only=request.post_only,
            reduce_only=request.reduce_only,
            stop_price=request.stop_price,
            working_type=request.working_type if request.is_stop else None,
            is_liquidation=False,
            bound_price=order.bound_price,
            margin_price=order.margin_price,
            open_loss=order.open_loss,
            created_at=now,
            updated_at=now,
        )
    )


def verdict_view(change: OrderChange) -> dict[str, Any]:
    """The members of an order that the engine's first word on it changes."""
    resting = "PARTIALLY_FILLED" if change.filled_quantity else "PLACED"
    return {
        "status": change.final_status or resting,
        "failureReason": change.reason,
        "filledQuantity": plain(change.filled_quantity),
        "averagePrice": average_price(change.filled_notional, change.filled_quantity),
    }

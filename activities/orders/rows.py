"""Rows of the orders service's tables; their fields carry the names of the columns."""

from datetime import datetime
from decimal import Decimal
from typing import NamedTuple

from domain.matching import OrderType, Side, StpMode, TimeInForce, WorkingType

OPEN_STATUSES = ("PENDING", "ACCEPTED", "PLACED", "PARTIALLY_FILLED", "CANCEL_REQUESTED")
IN_ENGINE_STATUSES = ("ACCEPTED", "PLACED", "PARTIALLY_FILLED")


class OrderRow(NamedTuple):
    """An order. At `bound_price`, `margin_price` and `open_loss` its margin is held: see `storage.tables.orders`."""

    order_id: int
    client_order_id: str | None
    user_id: int
    instrument_id: str
    side: Side
    type: OrderType
    time_in_force: TimeInForce
    price: Decimal | None
    quantity: Decimal
    filled_quantity: Decimal
    filled_notional: Decimal
    status: str
    failure_reason: str | None
    stp_mode: StpMode
    post_only: bool
    reduce_only: bool
    stop_price: Decimal | None
    working_type: WorkingType | None
    is_liquidation: bool
    bound_price: Decimal
    margin_price: Decimal | None
    open_loss: Decimal
    created_at: datetime
    updated_at: datetime


class TakenInRow(NamedTuple):
    """An order as it is taken in; all else of it is as the table has it by default."""

    order_id: int
    user_id: int
    instrument_id: str
    client_order_id: str | None
    side: str
    type: str
    time_in_force: str
    price: Decimal | None
    bound_price: Decimal
    quantity: Decimal
    stp_mode: str
    open_loss: Decimal
    post_only: bool
    reduce_only: bool
    stop_price: Decimal | None
    working_type: str | None
    margin_price: Decimal | None


class ChangedRow(NamedTuple):
    """What engine events add to an order and change of it (see `outcomes.OrderChange`); None leaves it as it is."""

    order_id: int
    traded: Decimal
    paid: Decimal
    final: str | None
    reason: str | None
    quantity_left: Decimal | None
    new_price: Decimal | None
    new_margin_price: Decimal | None
    new_open_loss: Decimal | None


class EndedRow(NamedTuple):
    """How an order or an amendment (`id`) ended, and why."""

    id: int
    final: str | None
    reason: str | None


class AmendmentRow(NamedTuple):
    """An amendment; None leaves the order's price or quantity as it is."""

    amendment_id: int
    order_id: int
    user_id: int
    instrument_id: str
    price: Decimal | None
    quantity: Decimal | None
    margin_price: Decimal | None
    open_loss: Decimal
    status: str
    failure_reason: str | None
    created_at: datetime
    updated_at: datetime


class TakenInAmendmentRow(NamedTuple):
    """An amendment as it is taken in, with what it claims beyond what the order has."""

    order_id: int
    user_id: int
    instrument_id: str
    side: Side
    reduce_only: bool
    price: Decimal | None
    quantity: Decimal | None
    open_quantity: Decimal
    claimed_quantity: Decimal
    claimed_notional: Decimal
    claimed_loss: Decimal
    margin_price: Decimal | None
    open_loss: Decimal

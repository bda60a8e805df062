"""Rows of the positions service's tables; their fields carry the names of the columns."""

from datetime import datetime
from decimal import Decimal
from typing import NamedTuple

from domain.exposure import Side


class PositionRow(NamedTuple):
    """A position as other services and clients see it."""

    position_id: int
    user_id: int
    instrument_id: str
    signed_quantity: Decimal
    entry_notional: Decimal
    margin: Decimal
    realized_pnl: Decimal
    leverage: int
    margin_mode: str
    liquidation_price: Decimal | None
    status: str

    @property
    def key(self) -> tuple[int, str]:
        """User and instrument."""
        return self.user_id, self.instrument_id


class HeldRow(NamedTuple):
    """What a user holds in an instrument, and the terms on which its next parts are backed."""

    user_id: int
    signed_quantity: Decimal
    entry_notional: Decimal
    leverage: int
    margin_mode: str


class AdoptedRow(NamedTuple):
    """What a position takes over from the ledger, and all that follows from its margin."""

    position_id: int
    margin: Decimal
    margin_version: int
    realized_pnl: Decimal
    leverage: int
    liquidation_price: Decimal | None
    status: str
    warning_price: Decimal | None


class FillRow(NamedTuple):
    """One user's side of a trade, in `positions.position_events`."""

    user_id: int
    instrument_id: str
    seq: int
    role: str
    type: str
    status: str
    trade_id: int
    order_id: int | None
    side: Side
    price: Decimal
    quantity: Decimal
    fee: Decimal
    realized_pnl: Decimal
    signed_quantity_after: Decimal
    entry_notional_after: Decimal
    leverage: int
    open_loss: Decimal
    cause: str
    created_at: datetime

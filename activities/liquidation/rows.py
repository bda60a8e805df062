"""Rows that liquidations read and write; their fields carry the names of the columns."""

from datetime import datetime
from decimal import Decimal
from typing import NamedTuple

from domain.liquidation import Holding


class CrossedRow(NamedTuple):
    """An isolated position whose liquidation price the mark has reached, with the margin that the ledger holds."""

    position_id: int
    user_id: int
    instrument_id: str
    signed_quantity: Decimal
    entry_notional: Decimal
    mark: Decimal
    margin: Decimal

    @property
    def holding(self) -> Holding:
        """The position with its margin."""
        return Holding(self.signed_quantity, self.entry_notional, self.margin)


class CrossPositionRow(NamedTuple):
    """A cross position, valued at the last mark, with what is available to its account and held for its instrument.

    `idle_held` is held for cross instruments without a position; `mark` is None where there never was one. All quote
    but the quantity.
    """

    position_id: int
    user_id: int
    instrument_id: str
    signed_quantity: Decimal
    entry_notional: Decimal
    status: str
    warned: bool
    mark: Decimal | None
    quote_asset: str
    state: str
    available: Decimal
    held: Decimal
    pnl: Decimal
    maintenance: Decimal
    idle_held: Decimal
    unsettled: bool


class SituationRow(NamedTuple):
    """Where a liquidation stands: its position, and what it has to wait for."""

    user_id: int
    instrument_id: str
    margin_mode: str
    status: str
    stopping: bool
    signed_quantity: Decimal
    entry_notional: Decimal
    state: str
    quote_asset: str
    margin: Decimal
    has_orders: bool
    unbooked: bool
    unanswered: bool

    @property
    def holding(self) -> Holding:
        """The position with its own margin."""
        return Holding(self.signed_quantity, self.entry_notional, self.margin)


class RunningRow(NamedTuple):
    """Whose position a liquidation that is under way closes, and whether all of their account stands behind it."""

    user_id: int
    instrument_id: str
    margin_mode: str


class CounterpartyRow(NamedTuple):
    """A position on the other side of one that is bankrupt."""

    user_id: int
    signed_quantity: Decimal
    entry_notional: Decimal
    margin: Decimal

    @property
    def holding(self) -> Holding:
        """The position with its margin."""
        return Holding(self.signed_quantity, self.entry_notional, self.margin)


class DueRow(NamedTuple):
    """A position to be liquidated, for `risk.liquidation_queue`."""

    position_id: int
    user_id: int
    instrument_id: str
    reason: str
    margin_mode: str


class QueueRow(NamedTuple):
    """A liquidation in `risk.liquidation_queue`, as operators see it."""

    liquidation_id: int
    position_id: int
    user_id: int
    instrument_id: str
    margin_mode: str
    reason: str
    status: str
    created_at: datetime
    updated_at: datetime


class SnapshotRow(NamedTuple):
    """What the risk of a position was when its status changed."""

    user_id: int
    instrument_id: str
    mark_price: Decimal
    margin: Decimal
    unrealized_pnl: Decimal
    maintenance_margin: Decimal
    margin_ratio: Decimal | None
    liquidation_price: Decimal | None
    status: str

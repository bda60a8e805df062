"""Rows of the risk service's tables; their fields carry the names of the columns."""

from decimal import Decimal
from typing import NamedTuple

from domain.exposure import Exposure, Side

Key = tuple[int, str]


class ExposureRow(NamedTuple):
    """What a user has open in an instrument, on which terms, and which of them the engine was told last."""

    user_id: int
    instrument_id: str
    leverage: int
    margin_mode: str
    signed_quantity: Decimal
    entry_notional: Decimal
    bid_quantity: Decimal
    bid_notional: Decimal
    ask_quantity: Decimal
    ask_notional: Decimal
    open_orders: int
    bid_loss: Decimal
    ask_loss: Decimal
    order_margin: Decimal
    pending_step: str | None
    told_leverage: int | None
    told_maintenance: int | None
    told_mode: str | None

    @property
    def key(self) -> Key:
        """User and instrument."""
        return self.user_id, self.instrument_id

    @property
    def state(self) -> Exposure:
        """The same by the rules of `domain.exposure`."""
        return Exposure(
            leverage=self.leverage,
            signed_quantity=self.signed_quantity,
            entry_notional=self.entry_notional,
            bid_quantity=self.bid_quantity,
            bid_notional=self.bid_notional,
            ask_quantity=self.ask_quantity,
            ask_notional=self.ask_notional,
            open_orders=self.open_orders,
            bid_loss=self.bid_loss,
            ask_loss=self.ask_loss,
            cross=self.margin_mode == "CROSS",
        )


class OpenRow(NamedTuple):
    """What orders and fills change of an exposure."""

    user_id: int
    instrument_id: str
    signed_quantity: Decimal
    entry_notional: Decimal
    bid_quantity: Decimal
    bid_notional: Decimal
    ask_quantity: Decimal
    ask_notional: Decimal
    open_orders: int
    order_margin: Decimal
    bid_loss: Decimal
    ask_loss: Decimal


class NewExposureRow(NamedTuple):
    """The exposure of somebody who never had an order in an instrument."""

    user_id: int
    instrument_id: str
    leverage: int


class ToldTermsRow(NamedTuple):
    """The terms that the engine was told (`told_maintenance` in millionths)."""

    user_id: int
    instrument_id: str
    told_leverage: int
    told_maintenance: int
    told_mode: str


class ToldCoverRow(NamedTuple):
    """What covers a cross position (quote), as the engine was told."""

    user_id: int
    instrument_id: str
    told_cover: Decimal


class ClaimRow(NamedTuple):
    """What an order, or an amendment (`order_id`, too), claims of an exposure."""

    order_id: int
    user_id: int
    instrument_id: str
    side: Side
    open_quantity: Decimal
    quantity: Decimal
    notional: Decimal
    orders: int
    loss: Decimal
    reduce_only: bool

    @property
    def key(self) -> Key:
        """User and instrument."""
        return self.user_id, self.instrument_id

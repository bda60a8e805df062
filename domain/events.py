"""The catalogue of business events: every name, its topic and its fields; `docs/events.md` is made from it.

Events are written to the outbox in the transaction that makes them true and relayed in order to the Redis
Stream named by the topic. Money, prices and quantities are decimal strings, times ISO-8601 UTC.
"""

from typing import ClassVar

import msgspec

# Of every entry. A field that is added leaves it as it is, and readers ignore those they don't know; one that is taken
# away, renamed or given another meaning raises it. A reader that meets an event without a field it needs (written by an
# older process) reads the tables instead.
SCHEMA_VERSION = 1


class BusinessEvent(msgspec.Struct, frozen=True, rename="camel"):
    """Base of all events. `topic` names the stream."""

    topic: ClassVar[str]

    @property
    def name(self) -> str:
        """The event's name in the catalogue."""
        return type(self).__name__


class AuthSessionRevoked(BusinessEvent, frozen=True):
    """A session has ended before its time; its access token is refused and its sockets close."""

    topic: ClassVar[str] = "auth.session-revoked"
    session_id: str
    user_id: str
    reason: str


class OrderSubmitted(BusinessEvent, frozen=True):
    """An order is taken in (PENDING); the caller has its id."""

    topic: ClassVar[str] = "order.submitted"
    order_id: int
    user_id: str
    instrument_id: str
    side: str
    type: str
    price: str | None
    quantity: str


class MarginPreCheckPassed(BusinessEvent, frozen=True):
    """Risk admits the order, or the amendment with this id, and asks the ledger for this much."""

    topic: ClassVar[str] = "risk.margin-check-passed"
    order_id: int
    required_margin: str


class MarginPreCheckFailed(BusinessEvent, frozen=True):
    """Risk refuses the order, or the amendment with this id."""

    topic: ClassVar[str] = "risk.margin-check-failed"
    order_id: int
    reason: str


class FundsFrozen(BusinessEvent, frozen=True):
    """The ledger has moved `amount` from available to reserved for the order, or for the amendment with this id."""

    topic: ClassVar[str] = "ledger.funds-frozen"
    order_id: int
    user_id: str
    asset: str
    amount: str


class FundsFrozenFailed(BusinessEvent, frozen=True):
    """The money that risk saw was gone when the ledger came to freeze it; risk checks the order once more."""

    topic: ClassVar[str] = "ledger.funds-frozen-failed"
    order_id: int
    user_id: str
    asset: str
    reason: str


class FundsUnfrozen(BusinessEvent, frozen=True):
    """The order has ended, or its placement was undone; what was reserved for it is available again."""

    topic: ClassVar[str] = "ledger.funds-unfrozen"
    order_id: int
    user_id: str
    asset: str
    amount: str


class OrderCreated(BusinessEvent, frozen=True):
    """The order is ACCEPTED and in the engine's command log."""

    topic: ClassVar[str] = "order.created"
    order_id: int
    user_id: str
    instrument_id: str
    side: str
    type: str
    price: str | None
    quantity: str
    is_liquidation: bool


class OrderCancelRequested(BusinessEvent, frozen=True):
    """The engine is asked to end the order."""

    topic: ClassVar[str] = "order.cancel-requested"
    order_id: int


class OrderAmendRequested(BusinessEvent, frozen=True):
    """The engine is asked to change an order: `quantity` is that of the whole order; null leaves it as it is."""

    topic: ClassVar[str] = "order.amend-requested"
    order_id: int
    amendment_id: int
    price: str | None
    quantity: str | None


class OrderPlaced(BusinessEvent, frozen=True):
    """The order rests in the book with this quantity."""

    topic: ClassVar[str] = "matching.order-placed"
    order_id: int
    instrument_id: str
    side: str
    price: str
    quantity: str


class OrderFilled(BusinessEvent, frozen=True):
    """The order is filled completely."""

    topic: ClassVar[str] = "matching.order-filled"
    order_id: int
    instrument_id: str
    user_id: str


class OrderCancelled(BusinessEvent, frozen=True):
    """A real cancel or expiry (`status` says which); never a full fill."""

    topic: ClassVar[str] = "matching.order-cancelled"
    order_id: int
    instrument_id: str
    user_id: str
    status: str
    reason: str
    remaining_quantity: str


class OrderRejected(BusinessEvent, frozen=True):
    """The engine does not take the order; nothing of it was executed."""

    topic: ClassVar[str] = "matching.order-rejected"
    order_id: int
    instrument_id: str
    user_id: str
    reason: str


class OrderAmended(BusinessEvent, frozen=True):
    """What is open of an order is now `quantity` at `price`."""

    topic: ClassVar[str] = "matching.order-amended"
    order_id: int
    instrument_id: str
    user_id: str
    side: str
    price: str
    quantity: str
    reason: str


class OrderAmendRejected(BusinessEvent, frozen=True):
    """The order stays as it was."""

    topic: ClassVar[str] = "matching.order-amend-rejected"
    order_id: int
    instrument_id: str
    user_id: str
    amendment_id: int
    reason: str


class OrderTriggered(BusinessEvent, frozen=True):
    """A stop or take-profit order has seen its price and enters."""

    topic: ClassVar[str] = "matching.order-triggered"
    order_id: int
    instrument_id: str
    user_id: str


class InstrumentStateChanged(BusinessEvent, frozen=True):
    """The engine has changed what it allows in the instrument."""

    topic: ClassVar[str] = "matching.instrument-state"
    instrument_id: str
    state: str


class TradeExecuted(BusinessEvent, frozen=True):
    """Two orders were matched."""

    topic: ClassVar[str] = "matching.trade-executed"
    trade_id: int
    instrument_id: str
    buy_order_id: int
    sell_order_id: int
    price: str
    quantity: str
    buyer_user_id: str
    seller_user_id: str
    taker_side: str
    maker_fee: str
    taker_fee: str
    fee: str
    executed_at: str


class LedgerEntryCreated(BusinessEvent, frozen=True):
    """A row of the double-entry ledger that belongs to a user."""

    topic: ClassVar[str] = "ledger.entry-created"
    user_id: str
    instrument_id: str | None
    asset: str
    delta_available: str
    delta_reserved: str
    balance_after: str
    entry_type: str
    reference_type: str
    reference_id: str


class InsuranceFundRequired(BusinessEvent, frozen=True):
    """A loss is larger than what its user had behind it; the insurance fund is asked for the rest."""

    topic: ClassVar[str] = "ledger.insurance-fund-required"
    user_id: str
    instrument_id: str
    asset: str
    amount: str


class PositionUpdated(BusinessEvent, frozen=True):
    """A position has changed, or its profit has moved by a tenth of its margin since it was last published."""

    topic: ClassVar[str] = "positions.updated"
    user_id: str
    instrument_id: str
    side: str | None
    quantity: str
    entry_price: str | None
    mark_price: str | None
    unrealized_pnl: str | None
    liquidation_price: str | None


class PositionClosed(BusinessEvent, frozen=True):
    """A position has become flat, also for a moment, when a fill turned it from long to short or back."""

    topic: ClassVar[str] = "positions.closed"
    user_id: str
    instrument_id: str
    realized_pnl: str


class MarkPriceUpdated(BusinessEvent, frozen=True):
    """A new mark price, or (`isFrozen`) the last one before the index became unusable."""

    topic: ClassVar[str] = "market.mark-price"
    instrument_id: str
    index_price: str
    mark_price: str
    fair_price: str
    premium_index: str
    funding_basis: str
    calculated_at: str
    source: str
    # Without a fresh index the last mark stands, and this says since when.
    is_frozen: bool = False
    frozen_since: str | None = None


class FundingRateUpdated(BusinessEvent, frozen=True):
    """The funding rate of the interval that ended at `effectiveAt` is fixed."""

    topic: ClassVar[str] = "market.funding-rate"
    instrument_id: str
    rate: str
    effective_at: str
    source: str


class KlineClosed(BusinessEvent, frozen=True):
    """A kline is complete. A trade that arrives later still changes it, without a second event."""

    topic: ClassVar[str] = "market.kline"
    instrument_id: str
    period: str
    open: str
    high: str
    low: str
    close: str
    volume: str
    timestamp: str


class RiskUpdate(BusinessEvent, frozen=True):
    """How far a position is from its liquidation."""

    topic: ClassVar[str] = "risk.update"
    user_id: str
    instrument_id: str
    margin_ratio: str | None
    liquidation_price: str | None
    status: str


class LiquidationTriggered(BusinessEvent, frozen=True):
    """A position is taken over for liquidation."""

    topic: ClassVar[str] = "risk.liquidation-triggered"
    position_id: str
    user_id: str
    instrument_id: str
    reason: str
    liquidation_id: int


class AutoDeleveraged(BusinessEvent, frozen=True):
    """A position was reduced to close the position of a bankrupt user, for whom there was no other buyer or seller."""

    topic: ClassVar[str] = "risk.auto-deleveraged"
    user_id: str
    instrument_id: str
    quantity: str
    price: str
    # Of the closing trade: what the deleveraged user did, and for whom.
    side: str
    trade_id: int
    bankrupt_user_id: str
    executed_at: str


CATALOGUE: dict[str, type[BusinessEvent]] = {kind.__name__: kind for kind in BusinessEvent.__subclasses__()}
USER_PUSH_TOPIC = "gateway.user-push"

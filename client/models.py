"""What goes over the wire, typed: prices in quote per base, quantities in base, money in Decimal, times in UTC.

Members that are added to the API later are ignored.
"""

from datetime import datetime
from decimal import Decimal
from typing import Any, Generic, Literal, TypeVar

import msgspec

Side = Literal["BUY", "SELL"]
OrderType = Literal["LIMIT", "MARKET", "STOP_MARKET", "STOP_LIMIT", "TAKE_PROFIT_MARKET", "TAKE_PROFIT_LIMIT"]
TimeInForce = Literal["GTC", "IOC", "FOK"]
StpMode = Literal["EXPIRE_TAKER", "EXPIRE_MAKER", "EXPIRE_BOTH"]
Permission = Literal["READ", "TRADE"]
MarginMode = Literal["ISOLATED", "CROSS"]
Level = tuple[Decimal, Decimal]

OPEN_STATUSES = ("PENDING", "ACCEPTED", "PLACED", "PARTIALLY_FILLED", "CANCEL_REQUESTED")
FINAL_STATUSES = frozenset({"FILLED", "CANCELLED", "EXPIRED", "FAILED", "REJECTED"})

Item = TypeVar("Item")


class _Model(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    pass


class Page(_Model, Generic[Item], frozen=True):
    """Part of a list, newest first."""

    items: list[Item]
    next_cursor: str | None = None


class Tokens(_Model, frozen=True):
    """The tokens of a session; the refresh token is good for one use."""

    access_token: str
    refresh_token: str
    session_id: str
    expires_in: int


class User(_Model, frozen=True):
    """An account."""

    user_id: str
    email: str
    status: str
    created_at: datetime


class KeyDetails(_Model, frozen=True):
    """An API key; without `allowed_addresses` it may be used from everywhere, without `instruments` for all."""

    key_id: str
    label: str
    algorithm: Literal["HMAC_SHA256", "ED25519"]
    permissions: list[Permission]
    allowed_addresses: list[str]
    instruments: list[str]
    created_at: datetime
    expires_at: datetime
    last_used_at: datetime | None


class NewKeyDetails(KeyDetails, frozen=True):
    """An API key just made, and the secret if it is of HMAC_SHA256."""

    secret: str | None


class NewOrder(_Model, frozen=True, omit_defaults=True):
    """An order to place: `price` with the types that have a limit, `stop_price` with those that wait for it."""

    instrument_id: str
    side: Side
    type: OrderType
    quantity: Decimal
    price: Decimal | None = None
    time_in_force: TimeInForce = "GTC"
    stp_mode: StpMode = "EXPIRE_TAKER"
    client_order_id: str | None = None
    post_only: bool = False
    reduce_only: bool = False
    stop_price: Decimal | None = None
    working_type: Literal["MARK", "LAST"] = "MARK"


class Order(_Model, frozen=True):
    """An order; `average_price` is over all fills."""

    order_id: int
    client_order_id: str | None
    instrument_id: str
    side: Side
    type: str
    time_in_force: TimeInForce
    price: Decimal | None
    quantity: Decimal
    filled_quantity: Decimal
    average_price: Decimal | None
    status: str
    failure_reason: str | None
    reduce_only: bool
    post_only: bool
    stop_price: Decimal | None
    is_liquidation: bool
    created_at: datetime
    updated_at: datetime

    @property
    def is_final(self) -> bool:
        """Whether nothing more will happen to it."""
        return self.status in FINAL_STATUSES


class AmendedOrder(Order, frozen=True):
    """The order, and how far the amendment is: PENDING, ACCEPTED, AMENDED, REJECTED or FAILED."""

    amendment_id: int
    amendment_status: str
    amendment_failure_reason: str | None


class Cancellation(_Model, frozen=True):
    """A cancellation on its way to the engine."""

    order_id: int


class Fill(_Model, frozen=True):
    """One's side of a trade. Fee and realised profit in quote."""

    trade_id: int
    order_id: int
    instrument_id: str
    price: Decimal
    quantity: Decimal
    side: Side
    role: Literal["MAKER", "TAKER"]
    fee: Decimal
    realized_pnl: Decimal
    executed_at: datetime


class Position(_Model, frozen=True):
    """A position; `side` is null when flat. What depends on the mark price is null while there is none."""

    instrument_id: str
    side: str | None
    quantity: Decimal
    entry_price: Decimal | None
    mark_price: Decimal | None
    unrealized_pnl: Decimal | None
    realized_pnl: Decimal
    leverage: int
    margin_mode: MarginMode
    margin: Decimal
    maintenance_margin: Decimal | None
    margin_ratio: Decimal | None
    liquidation_price: Decimal | None
    status: str
    adl_rank: int | None = None


class Balance(_Model, frozen=True):
    """Money in one asset; `reserved` backs open orders and positions."""

    asset: str
    available: Decimal
    reserved: Decimal
    total: Decimal


class LedgerEntry(_Model, frozen=True):
    """One movement of money; `balance_after` is what was available after it."""

    entry_id: int
    entry_type: str
    asset: str
    instrument_id: str | None
    delta_available: Decimal
    delta_reserved: Decimal
    balance_after: Decimal
    reference_type: str
    reference_id: str
    created_at: datetime


class FundingPayment(_Model, frozen=True):
    """What was got (positive) or paid (negative) as funding."""

    funding_time: datetime
    instrument_id: str
    quantity: Decimal
    side: str
    mark_price: Decimal
    rate: Decimal
    payment: Decimal


class PreCheck(_Model, frozen=True):
    """Whether an order would be accepted, and what it would reserve, in quote."""

    allowed: bool
    required_margin: Decimal
    reason: str | None


class DeadManSwitch(_Model, frozen=True):
    """When the open orders are cancelled unless there is another sign of life; null: not by themselves."""

    timeout_ms: int
    cancel_at: datetime | None


class Instrument(_Model, frozen=True):
    """What may be traded, in which steps, at which fees."""

    instrument_id: str
    base_asset: str
    quote_asset: str
    tick_size: Decimal
    lot_size: Decimal
    min_notional: Decimal
    maker_fee_rate: Decimal
    taker_fee_rate: Decimal
    max_leverage: int
    default_leverage: int
    state: str


class Ticker(_Model, frozen=True):
    """The latest prices and the last 24 hours; null where there is nothing yet."""

    instrument_id: str
    last_price: Decimal | None
    best_bid: Decimal | None
    best_ask: Decimal | None
    volume_24h: Decimal = msgspec.field(name="volume24h")
    high_24h: Decimal | None = msgspec.field(name="high24h")
    low_24h: Decimal | None = msgspec.field(name="low24h")
    mark_price: Decimal | None
    index_price: Decimal | None
    is_frozen: bool
    funding_rate: Decimal | None


class Depth(_Model, frozen=True):
    """(price, quantity) per level, best first, up to engine event `seq`."""

    instrument_id: str
    seq: int
    bids: list[Level]
    asks: list[Level]


class Trade(_Model, frozen=True):
    """A public trade; `side` is the taker's."""

    trade_id: int
    price: Decimal
    quantity: Decimal
    side: Side
    executed_at: datetime


class MarkPrice(_Model, frozen=True):
    """The mark price and the index behind it; frozen: there is no fresh index."""

    instrument_id: str
    mark_price: Decimal
    index_price: Decimal
    calculated_at: datetime
    is_frozen: bool


class Kline(_Model, frozen=True):
    """A kline of the trades from `open_time` up to before `close_time`; `volume` in base."""

    open_time: datetime
    close_time: datetime
    open: Decimal
    high: Decimal
    low: Decimal
    close: Decimal
    volume: Decimal
    trade_count: int
    closed: bool


class FundingRate(_Model, frozen=True):
    """The rate that was paid at `effective_at`."""

    instrument_id: str
    effective_at: datetime
    rate: Decimal
    mark_price: Decimal


class AuditCheck(_Model, frozen=True):
    """One invariant of the ledger; `detail` names offenders, or how much was in motion."""

    name: str
    ok: bool
    detail: str


class Audit(_Model, frozen=True):
    """All invariants of the ledger."""

    ok: bool
    checks: list[AuditCheck]


class MarketMessage(_Model, frozen=True):
    """A message of `/ws/market`: a snapshot, or an update on the one whose `seq` is `prev_seq`."""

    type: Literal["snapshot", "update"]
    channel: str
    instrument_id: str
    seq: int
    prev_seq: int
    data: msgspec.Raw
    period: str = ""


class Book(_Model, frozen=True):
    """Levels of `depth`: all of a snapshot; of an update those that changed, quantity 0 when gone."""

    bids: list[Level]
    asks: list[Level]


class UserMessage(_Model, frozen=True):
    """A message of `/ws/user`. The first of every connection is `auth`: look up what happened before over REST."""

    channel: str
    data: Any = None

    def as_order(self) -> Order:
        """The data of channel `order`."""
        return msgspec.convert(self.data, Order)

    def as_fill(self) -> Fill:
        """The data of channel `fill`."""
        return msgspec.convert(self.data, Fill)

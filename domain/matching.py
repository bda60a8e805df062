"""Commands to and events of the matching engine, as they stand in its logs.

Prices are integer ticks, quantities integer lots, fees integers of 1e-8 quote, times Unix milliseconds
(the command's: an event never carries a clock of its own, so a replay gives the same bytes).
"""

from typing import Literal

import msgspec

Side = Literal["BUY", "SELL"]
OrderType = Literal["LIMIT", "MARKET"]
TimeInForce = Literal["GTC", "IOC", "FOK"]
StpMode = Literal["EXPIRE_TAKER", "EXPIRE_MAKER", "EXPIRE_BOTH"]


class Command(msgspec.Struct, frozen=True, tag_field="kind", gc=False):
    """Base of what may stand in `matching.commands`; `at` is the time of acceptance.

    `gc=False` (here and for events): scalars only, so nothing for the cycle collector to look at.
    """

    at: int


class New(Command, tag="NEW", frozen=True, kw_only=True, omit_defaults=True):
    """Enter an order. `price` is the limit of a LIMIT order and the protection price of a MARKET order."""

    order_id: int
    user_id: int
    side: Side
    type: OrderType
    time_in_force: TimeInForce
    price: int
    quantity: int
    stp_mode: StpMode = "EXPIRE_TAKER"
    liquidation: bool = False


class Cancel(Command, tag="CANCEL", frozen=True, kw_only=True):
    """Take one order out of the book; an order that is not there is ignored (it has ended already)."""

    order_id: int
    user_id: int
    reason: str = "USER_REQUEST"


class CancelAll(Command, tag="CANCEL_ALL", frozen=True, kw_only=True):
    """Take every order of one user out of this instrument's book, in order of entry."""

    user_id: int
    reason: str = "USER_REQUEST"


AnyCommand = New | Cancel | CancelAll


class Event(msgspec.Struct, frozen=True, tag_field="kind", gc=False):
    """Base of what may stand in `matching.events`; `at` is the time of the command that caused it."""

    at: int


class Placed(Event, tag="PLACED", frozen=True, kw_only=True):
    """The rest of an order now rests in the book: `quantity` lots at `price`."""

    order_id: int
    user_id: int
    side: Side
    price: int
    quantity: int


class Trade(Event, tag="TRADE", frozen=True, kw_only=True):
    """One match at the maker's price. `taker_price` is the taker's limit or protection price."""

    trade_id: int
    price: int
    quantity: int
    taker_side: Side
    maker_order_id: int
    maker_user_id: int
    maker_remaining: int
    maker_fee: int
    taker_order_id: int
    taker_user_id: int
    taker_remaining: int
    taker_fee: int
    taker_price: int
    taker_liquidation: bool


class Filled(Event, tag="FILLED", frozen=True, kw_only=True):
    """Nothing of this order remains: it was traded in full."""

    order_id: int
    user_id: int


class Ended(Event, frozen=True, kw_only=True):
    """An order ended with `quantity` lots untraded; `price` is its limit or protection price."""

    order_id: int
    user_id: int
    side: Side
    price: int
    quantity: int
    reason: str


class Cancelled(Ended, tag="CANCELLED", frozen=True, kw_only=True):
    """Ended by request."""


class Expired(Ended, tag="EXPIRED", frozen=True, kw_only=True):
    """Ended by its own terms: time in force, protection price, self-trade prevention."""


class Rejected(Ended, tag="REJECTED", frozen=True, kw_only=True):
    """Never entered the book."""


AnyEvent = Placed | Trade | Filled | Cancelled | Expired | Rejected

encode = msgspec.json.Encoder().encode
decode_command = msgspec.json.Decoder(AnyCommand).decode
decode_event = msgspec.json.Decoder(AnyEvent).decode

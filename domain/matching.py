"""Commands to and events of the matching engine, as they stand in its logs.

Prices are integer ticks, quantities integer lots, fees integers of 1e-8 quote, times Unix milliseconds
(the command's: an event never carries a clock of its own, so a replay gives the same bytes).
Fields that came later have defaults and are left out of the bytes when they hold them: old logs stay as they are.
"""

from decimal import ROUND_FLOOR, Decimal
from typing import Literal, final

import msgspec

Side = Literal["BUY", "SELL"]
OrderType = Literal["LIMIT", "MARKET", "STOP_LIMIT", "STOP_MARKET", "TAKE_PROFIT_LIMIT", "TAKE_PROFIT_MARKET"]
TimeInForce = Literal["GTC", "IOC", "FOK"]
StpMode = Literal["EXPIRE_TAKER", "EXPIRE_MAKER", "EXPIRE_BOTH"]
WorkingType = Literal["MARK", "LAST"]
TradingState = Literal["TRADING", "CANCEL_ONLY", "HALTED"]


class Command(msgspec.Struct, frozen=True, tag_field="kind", gc=False):
    """Base of what may stand in `matching.commands`; `at` is the time of acceptance.

    `gc=False` (here and for events): nothing in it can point back to it, so nothing for the cycle collector to do.
    """

    at: int


@final
class New(Command, tag="NEW", frozen=True, kw_only=True, omit_defaults=True):
    """Enter an order. `price` is the limit of a limit order and the protection price of a market order.

    A stop or take-profit order waits outside the book until the price of its `working_type` reaches `stop_price`
    (a stop to buy and a take-profit to sell: from below; the others: from above), at once if it is there already.
    It then enters as the limit or market order it is; without a limit it may trade as far from the mark of that moment
    as `protection` says (millionths; 0: at `price` or better).
    `post_only` goes with GTC limit orders. `reduce_only` orders only ever bring the user's position nearer to zero.
    `basis` is the price at which the order's initial margin is held (0: `price`), `loss` what is held beyond it per
    lot, in ticks: see `engine/guards.py`. `backed`: for how many of its lots initial margin is held, should they open a
    position (below 0: for all).
    """

    order_id: int
    user_id: int
    side: Side
    type: OrderType
    time_in_force: TimeInForce
    price: int
    quantity: int
    stp_mode: StpMode = "EXPIRE_TAKER"
    liquidation: bool = False
    post_only: bool = False
    reduce_only: bool = False
    stop_price: int = 0
    working_type: WorkingType = "MARK"
    basis: int = 0
    loss: int = 0
    protection: int = 0
    backed: int = -1


@final
class Cancel(Command, tag="CANCEL", frozen=True, kw_only=True):
    """Take out one order, in the book or waiting; an order that is not there is ignored (it has ended already)."""

    order_id: int
    user_id: int
    reason: str = "USER_REQUEST"


class CancelAll(Command, tag="CANCEL_ALL", frozen=True, kw_only=True):
    """Take out every order of one user, those in the book in order of entry, then those waiting in order of entry."""

    user_id: int
    reason: str = "USER_REQUEST"


class Amend(Command, tag="AMEND", frozen=True, kw_only=True, omit_defaults=True):
    """Change the price, or the quantity of the whole order, or both; None leaves it as it is.

    What was filled is part of `quantity`, so that a fill on the way here does not make the order larger than asked.
    The order keeps its place in the queue if its price stays and its quantity does not grow; otherwise it enters anew,
    and may trade. One AMENDED or AMEND_REJECTED with `amendment_id` answers it. `basis` and `loss` become the order's;
    `backed` is for how many lots more initial margin is held (below 0: for all that it grows by).
    """

    order_id: int
    user_id: int
    price: int | None = None
    quantity: int | None = None
    amendment_id: int = 0
    basis: int = 0
    loss: int = 0
    backed: int = -1


class CancelReplace(Command, tag="CANCEL_REPLACE", frozen=True, kw_only=True):
    """Take out `cancel_order_id` and enter `order` of the same user, or, if the former is not there, do neither.

    The new order may still be refused by its own terms; the old one is cancelled all the same.
    """

    cancel_order_id: int
    order: New


class SetState(Command, tag="SET_STATE", frozen=True, kw_only=True):
    """Open or close the instrument. In CANCEL_ONLY and HALTED orders only leave: entry, amendment and triggers rest.

    For the matcher both are alike (whoever is afraid must always be able to withdraw); HALTED tells the rest of the
    exchange that nothing, marks and liquidations included, goes on. Back in TRADING, waiting orders whose price was
    reached meanwhile are triggered.
    """

    state: TradingState


class MarkPrice(Command, tag="MARK_PRICE", frozen=True, kw_only=True, omit_defaults=True):
    """The mark price: orders that wait for it are triggered, and fills are judged by it.

    `price` is the mark rounded down to a tick, `ceiling` rounded up (0: the mark is a whole tick). A mark is live for
    MARK_AGE_MAX (`domain/mark_price.py`) unless `frozen`: then the last one stands, and nothing opens.
    """

    price: int
    ceiling: int = 0
    frozen: bool = False


class SetTerms(Command, tag="SET_TERMS", frozen=True, kw_only=True, omit_defaults=True):
    """On which terms a user's fills are guarded from here on: leverage, and the maintenance margin rate (millionths)
    of the largest position that their open orders can lead to. `cross`: all of the account backs the position.

    `bankruptcy` is for a position that was opened before the user had terms: its bankruptcy price in millionths of a
    tick (0: there is none).
    """

    user_id: int
    leverage: int
    maintenance: int
    cross: bool = False
    bankruptcy: int = 0


class SetCover(Command, tag="SET_COVER", frozen=True, kw_only=True):
    """What a user's account has for a cross position beyond that position's own margin, in millionths of a tick times a
    lot, rounded down; below 0 it lacks as much.

    More than before counts only while nothing of the user was filled after event `after_seq`, up to which it was
    decided.
    """

    user_id: int
    cover: int
    after_seq: int


class MoveMargin(Command, tag="MOVE_MARGIN", frozen=True, kw_only=True):
    """The margin of a user's position changes by `amount`, in millionths of a tick times a lot, rounded down.

    More margin counts only while nothing of the user was filled after event `after_seq`, up to which it was decided.
    """

    user_id: int
    amount: int
    after_seq: int


def margin_units(amount: Decimal, unit: Decimal) -> int:
    """`amount` (quote) as `MoveMargin` has it, rounded down; `unit` is what a tick times a lot is worth (quote)."""
    return int((amount / unit * 1_000_000).to_integral_value(ROUND_FLOOR))


class Deleverage(Command, tag="DELEVERAGE", frozen=True, kw_only=True):
    """Close up to `quantity` lots of a bankrupt user's position at `price` against those in `counterparties`, first
    one first, without book and fees. Nobody's position grows or turns: who holds less, or nothing, gives less."""

    user_id: int
    side: Side
    price: int
    quantity: int
    counterparties: list[int]


AnyCommand = (
    New
    | Cancel
    | CancelAll
    | Amend
    | CancelReplace
    | SetState
    | MarkPrice
    | Deleverage
    | SetTerms
    | SetCover
    | MoveMargin
)


class Event(msgspec.Struct, frozen=True, tag_field="kind", gc=False):
    """Base of what may stand in `matching.events`; `at` is the time of the command that caused it.

    Those that are made most often are not `kw_only`: by position they are made in half the time.
    """

    at: int


class Placed(Event, tag="PLACED", frozen=True, omit_defaults=True):
    """The rest of an order now rests in the book: `quantity` lots at `price`."""

    order_id: int
    user_id: int
    side: Side
    price: int
    quantity: int
    reduce_only: bool = False


class Trade(Event, tag="TRADE", frozen=True, omit_defaults=True):
    """One match at the maker's price. `taker_price` is the taker's limit or protection price.

    `…_basis` (0: `price` of the maker, `taker_price`) and `…_loss` are those of the orders. `…_open_loss` is by how
    many ticks a side that opens is worse than the mark, as far as its order holds it; `…_leverage` backs what it opens
    (0: as the risk service has it). `mark` is the mark rounded down (0: not known).
    """

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
    maker_reduce_only: bool = False
    taker_reduce_only: bool = False
    maker_basis: int = 0
    taker_basis: int = 0
    maker_loss: int = 0
    taker_loss: int = 0
    maker_open_loss: int = 0
    taker_open_loss: int = 0
    maker_leverage: int = 0
    taker_leverage: int = 0
    mark: int = 0


class Filled(Event, tag="FILLED", frozen=True):
    """Nothing of this order remains: it was traded in full."""

    order_id: int
    user_id: int


class Ended(Event, frozen=True, omit_defaults=True):
    """An order ended with `quantity` lots untraded; `price` is its limit or protection price; `basis` and `loss` are
    those of the order."""

    order_id: int
    user_id: int
    side: Side
    price: int
    quantity: int
    reason: str
    reduce_only: bool = False
    basis: int = 0
    loss: int = 0


class Cancelled(Ended, tag="CANCELLED", frozen=True):
    """Ended by request."""


class Expired(Ended, tag="EXPIRED", frozen=True):
    """Ended by its own terms: time in force, protection price, self-trade prevention, nothing left to reduce."""


class Rejected(Ended, tag="REJECTED", frozen=True):
    """Never entered the book."""


class StopPlaced(Event, tag="STOP_PLACED", frozen=True, kw_only=True, omit_defaults=True):
    """A stop or take-profit order now waits outside the book for its price."""

    order_id: int
    user_id: int
    side: Side
    price: int
    quantity: int
    stop_price: int
    working_type: WorkingType
    reduce_only: bool = False


class Triggered(Event, tag="TRIGGERED", frozen=True, kw_only=True, omit_defaults=True):
    """The stop price was reached: the order enters now, its fate follows in the next events."""

    order_id: int
    user_id: int
    side: Side
    price: int
    quantity: int
    reduce_only: bool = False


class Amended(Event, tag="AMENDED", frozen=True, kw_only=True, omit_defaults=True):
    """`quantity` lots at `price` are open now, and no longer `old_quantity` at `old_price`.

    `was_resting`: the old lots leave the book. `resting`: the new ones stand in it; otherwise the order waits for its
    stop price or is entering, and what it does is in the next events. Reasons: USER_REQUEST, REDUCE_ONLY (shrunk
    with the position; `amendment_id` is 0 then).
    """

    order_id: int
    user_id: int
    side: Side
    price: int
    quantity: int
    old_price: int
    old_quantity: int
    reason: str
    reduce_only: bool = False
    was_resting: bool = True
    resting: bool = True
    amendment_id: int = 0
    basis: int = 0
    loss: int = 0
    old_basis: int = 0
    old_loss: int = 0


class AmendRejected(Event, tag="AMEND_REJECTED", frozen=True, kw_only=True, omit_defaults=True):
    """The order stays as it was, or has ended already (ORDER_NOT_FOUND)."""

    order_id: int
    user_id: int
    reason: str
    amendment_id: int = 0


class Deleveraged(Event, tag="DELEVERAGED", frozen=True, kw_only=True):
    """`quantity` lots of two opposite positions ended at `price`: `user_id`'s by an order of `side`, so to speak."""

    trade_id: int
    price: int
    quantity: int
    side: Side
    user_id: int
    counterparty_user_id: int


class StateChanged(Event, tag="STATE_CHANGED", frozen=True, kw_only=True):
    """The instrument is in `state` from here on."""

    state: TradingState


AnyEvent = (
    Placed
    | Trade
    | Filled
    | Cancelled
    | Expired
    | Rejected
    | StopPlaced
    | Triggered
    | Amended
    | AmendRejected
    | Deleveraged
    | StateChanged
)

encode = msgspec.json.Encoder().encode
decode_command = msgspec.json.Decoder(AnyCommand).decode
decode_event = msgspec.json.Decoder(AnyEvent).decode

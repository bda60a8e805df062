"""What an order must be to be taken in: steps of the instrument, bounds, protection price. No state is asked."""

from dataclasses import dataclass, replace
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal

from domain.instruments import Instrument
from domain.matching import OrderType, Side, StpMode, TimeInForce, WorkingType
from domain.money import ZERO, plain
from domain.problems import Problem

LIMIT_TYPES = ("LIMIT", "STOP_LIMIT", "TAKE_PROFIT_LIMIT")
MARKET_PROTECTION = Decimal("0.05")
# On the side where nobody loses by it a price may be so far from the mark: beyond is a slip of the finger.
FAR_BAND = Decimal("0.5")
QUANTITY_MAX = Decimal("1e9")


@dataclass(frozen=True, slots=True)
class OrderRequest:
    """An order as a user asks for it; `price` in quote (None for MARKET), `quantity` in base."""

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
    working_type: WorkingType = "MARK"

    @property
    def is_stop(self) -> bool:
        """Whether it waits for a price before it enters."""
        return self.type not in ("LIMIT", "MARKET")

    @property
    def has_limit(self) -> bool:
        """Whether it has a price of its own; the others get a protection price."""
        return self.type in LIMIT_TYPES


@dataclass(frozen=True, slots=True)
class NewOrder:
    """A request that passed the checks of `domain.order_entry`, with its user and bound price.

    Its initial margin is held at `margin_price` (None: at the bound), and `open_loss` beyond it (both quote per base):
    what a fill at the bound would lose at once against the mark.
    """

    user_id: int
    request: OrderRequest
    bound_price: Decimal
    open_loss: Decimal = ZERO
    margin_price: Decimal | None = None


@dataclass(frozen=True, slots=True)
class OpenOrder:
    """An order that may be amended: its terms now, its bound price, what is filled of it, and the price and the open
    loss (quote per base) at which its margin is held."""

    order_id: int
    user_id: int
    request: OrderRequest
    bound_price: Decimal
    filled_quantity: Decimal
    margin_price: Decimal
    open_loss: Decimal = ZERO


@dataclass(frozen=True, slots=True)
class Amendment:
    """A change to an order that passed the checks; `price` and `quantity` (of the whole order) None: as it is.

    `open_quantity` is what would be open (base), `margin_price` and `open_loss` as of a new order. The claim is what
    that needs beyond the order as it is (base, and quote of notional and of open loss; 0 for one that only reduces).
    """

    order: OpenOrder
    price: Decimal | None
    quantity: Decimal | None
    open_quantity: Decimal
    claimed_quantity: Decimal
    claimed_notional: Decimal
    claimed_loss: Decimal
    margin_price: Decimal
    open_loss: Decimal


@dataclass(frozen=True, slots=True)
class Reference:
    """What bounds are taken from: the mark (quote per base). Quotes are not asked: whoever likes sets them."""

    mark: Decimal


def bound_price(request: OrderRequest, instrument: Instrument, reference: Reference) -> Decimal:
    """The worst price the order may trade at: its limit, or without one the protection price; a whole tick.

    A limit has to lie within the instrument's band around mark on the side where it would lose, and within FAR_BAND on
    the other; that of a stop order, around its stop price. Protection is MARKET_PROTECTION beyond the mark (the stop
    price of a stop order), rounded inwards, and never beyond the band. The minimum notional is measured at the limit,
    or without one at the mark. An order that only reduces may be smaller.
    Raises Problem INSTRUMENT_NOT_TRADING, VALIDATION_FAILED, PRICE_NOT_ON_TICK, QUANTITY_NOT_ON_LOT, MIN_NOTIONAL
    or PRICE_OUT_OF_BAND.
    """
    if instrument.state != "TRADING":
        raise Problem("INSTRUMENT_NOT_TRADING", f"{instrument.instrument_id} is {instrument.state}")
    if not 0 < request.quantity <= QUANTITY_MAX:
        raise Problem("VALIDATION_FAILED", f"Expected 0 < quantity <= {QUANTITY_MAX:f}, was {request.quantity}")
    instrument.quantity_to_lots(request.quantity)
    _check_terms(request, instrument, reference)
    start = _reference_price(request, reference)
    if request.has_limit:
        bound = valued_at = _limit_price(request, instrument, start)
    else:
        bound, valued_at = _protection_price(request.side, instrument, start), start
    if not request.reduce_only and valued_at * request.quantity < instrument.min_notional:
        raise Problem(
            "MIN_NOTIONAL", f"Expected a notional of at least {plain(instrument.min_notional)} {instrument.quote_asset}"
        )
    return bound


def new_order(user_id: int, request: OrderRequest, instrument: Instrument, reference: Reference) -> NewOrder:
    """The order of a request that may be taken in. Raises the problems of `bound_price`."""
    bound = bound_price(request, instrument, reference)
    return NewOrder(user_id, request, bound, *_margin_terms(request, bound, instrument, reference))


def _reference_price(request: OrderRequest, reference: Reference) -> Decimal:
    """The mark at which the order will enter, as far as that can be known."""
    return reference.mark if request.stop_price is None else request.stop_price


def _margin_terms(
    request: OrderRequest, bound: Decimal, instrument: Instrument, reference: Reference
) -> tuple[Decimal, Decimal]:
    """Open loss and the price at which initial margin is held (quote per base, whole ticks, rounded against the user).

    A sale may trade at the mark, above its bound, and is backed for that. What has no limit gets no further from the
    mark than initial margin covers (`engine/guards.py`), so that nothing is held for its open loss; nor for what only
    reduces.
    """
    start, tick = _reference_price(request, reference), instrument.tick_size
    if request.side == "BUY":
        gap = bound - to_tick(start, tick, ROUND_FLOOR)
    else:
        gap = to_tick(start, tick, ROUND_CEILING) - bound
    gap = max(ZERO, gap)
    loss = gap if request.has_limit and not request.reduce_only else ZERO
    if request.side == "BUY":
        return loss, bound
    # A take-profit that is due already sells at the mark, however far below that it waits.
    is_due = request.type.startswith("TAKE_PROFIT") and start < reference.mark
    return loss, max(bound + gap, to_tick(reference.mark, tick, ROUND_CEILING)) if is_due else bound + gap


def protection(instrument: Instrument) -> Decimal:
    """How far from the mark, as a fraction, an order without a limit may trade."""
    return min(MARKET_PROTECTION, instrument.price_band)


def amendment(
    order: OpenOrder, price: Decimal | None, quantity: Decimal | None, instrument: Instrument, reference: Reference
) -> Amendment:
    """The change of an order to `price` and `quantity` (of the whole order; None: as it is).

    Raises Problem VALIDATION_FAILED if that changes nothing, ORDER_NOT_AMENDABLE without a limit or if all of
    `quantity` is filled already, and the problems of `bound_price`: of its price only if the order's changes or grows.
    """
    old = order.request
    if not old.has_limit:
        raise Problem("ORDER_NOT_AMENDABLE", f"A {old.type} order cannot be amended")
    new = replace(
        old,
        price=old.price if price is None else price,
        quantity=old.quantity if quantity is None else quantity,
    )
    if new == old:
        raise Problem("VALIDATION_FAILED", "Expected another price or another quantity than the order has")
    if new.price == old.price and new.quantity < old.quantity:
        # Less of the same: wherever the mark has gone, that may be.
        bound_price(new, instrument, Reference(order.bound_price))
        bound, loss, margin_price = order.bound_price, order.open_loss, order.margin_price
    else:
        bound = bound_price(new, instrument, reference)
        loss, margin_price = _margin_terms(new, bound, instrument, reference)
    open_quantity = new.quantity - order.filled_quantity
    if open_quantity <= 0:
        raise Problem("ORDER_NOT_AMENDABLE", f"{order.filled_quantity:f} of order {order.order_id} are filled already")
    claimed_quantity = claimed_notional = claimed_loss = ZERO
    if not old.reduce_only:
        old_quantity = old.quantity - order.filled_quantity
        claimed_quantity, claimed_notional = amendment_claim(
            old_quantity, order.margin_price, open_quantity, margin_price
        )
        _, claimed_loss = amendment_claim(old_quantity, order.open_loss, open_quantity, loss)
    return Amendment(
        order, price, quantity, open_quantity, claimed_quantity, claimed_notional, claimed_loss, margin_price, loss
    )


def amendment_claim(
    old_quantity: Decimal, old_price: Decimal, new_quantity: Decimal, new_price: Decimal
) -> tuple[Decimal, Decimal]:
    """Base and quote to be reserved beside an order that is amended (open quantities, bound prices), both >= 0.

    Until the engine amends it, up to `old_quantity` may be filled at the old price, which leaves as much less of the
    new quantity. After a fill of f the order needs q_old * p_old - f * p_old as it is, and q_new * p_new - f * p_new
    once amended. The claim is the most by which the second exceeds the first, which is at f = 0 or f = q_old.
    """
    notional = new_quantity * new_price - old_quantity * min(old_price, new_price)
    return max(ZERO, new_quantity - old_quantity), max(ZERO, notional)


def _check_terms(request: OrderRequest, instrument: Instrument, reference: Reference) -> None:
    if not request.has_limit and request.price is not None:
        raise Problem("VALIDATION_FAILED", f"A {request.type} order has no price")
    if request.post_only and (request.type != "LIMIT" or request.time_in_force != "GTC"):
        raise Problem("VALIDATION_FAILED", "postOnly goes with LIMIT orders that are GTC")
    if request.is_stop != (request.stop_price is not None):
        raise Problem("VALIDATION_FAILED", "stopPrice goes with stop and take-profit orders, which need it")
    if request.stop_price is not None:
        low, high = reference.mark * (1 - FAR_BAND), reference.mark * (1 + FAR_BAND)
        if not low <= request.stop_price <= high:
            raise Problem(
                "PRICE_OUT_OF_BAND",
                f"Expected a stopPrice from {plain(low)} to {plain(high)}, was {plain(request.stop_price)}",
            )
        instrument.price_to_ticks(request.stop_price)


def _limit_price(request: OrderRequest, instrument: Instrument, start: Decimal) -> Decimal:
    if request.price is None or request.price <= 0:
        raise Problem("VALIDATION_FAILED", f"A {request.type} order needs a price above 0")
    below, above = FAR_BAND, instrument.price_band
    if request.side == "SELL":
        below, above = above, below
    low, high = start * (1 - below), start * (1 + above)
    if request.price > high:
        raise Problem("PRICE_OUT_OF_BAND", f"Expected a price of at most {plain(high)}, was {plain(request.price)}")
    instrument.price_to_ticks(request.price)
    if request.price < low:
        raise Problem("PRICE_OUT_OF_BAND", f"Expected a price of at least {plain(low)}, was {plain(request.price)}")
    return request.price


def _protection_price(side: Side, instrument: Instrument, start: Decimal) -> Decimal:
    if side == "BUY":
        return to_tick(start * (1 + protection(instrument)), instrument.tick_size, ROUND_FLOOR)
    return to_tick(start * (1 - protection(instrument)), instrument.tick_size, ROUND_CEILING)


def to_tick(price: Decimal, tick_size: Decimal, rounding: str) -> Decimal:
    """`price` as a multiple of `tick_size`."""
    return (price / tick_size).to_integral_value(rounding) * tick_size

"""What an order must be to be taken in: steps of the instrument, bounds, protection price. No state is asked."""

from dataclasses import dataclass, replace
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal

from domain.instruments import Instrument
from domain.margin import open_loss
from domain.matching import OrderType, Side, StpMode, TimeInForce, WorkingType
from domain.money import ZERO, plain
from domain.problems import Problem

LIMIT_TYPES = ("LIMIT", "STOP_LIMIT", "TAKE_PROFIT_LIMIT")
MARKET_PROTECTION = Decimal("0.05")
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

    `open_loss` is what it would lose at once if it were filled as expected (quote): its user must have that, too.
    """

    user_id: int
    request: OrderRequest
    bound_price: Decimal
    open_loss: Decimal = ZERO


@dataclass(frozen=True, slots=True)
class OpenOrder:
    """An order that may be amended: its terms now, its bound price, and what is filled of it."""

    order_id: int
    user_id: int
    request: OrderRequest
    bound_price: Decimal
    filled_quantity: Decimal


@dataclass(frozen=True, slots=True)
class Amendment:
    """A change to an order that passed the checks; `price` and `quantity` (of the whole order) None: as it is.

    `open_quantity` is what would be open (base). The claim is the margin basis beyond that of the order as it is
    (base and quote, 0 for an order that only reduces); `open_loss` as of a new order.
    """

    order: OpenOrder
    price: Decimal | None
    quantity: Decimal | None
    open_quantity: Decimal
    claimed_quantity: Decimal
    claimed_notional: Decimal
    open_loss: Decimal


@dataclass(frozen=True, slots=True)
class Reference:
    """Prices that bounds are taken from: mark, and the best quotes where there are any (quote per base)."""

    mark: Decimal
    best_bid: Decimal | None = None
    best_ask: Decimal | None = None


def bound_price(request: OrderRequest, instrument: Instrument, reference: Reference) -> Decimal:
    """The worst price the order may trade at: its limit, or without one the protection price; a whole tick.

    A limit has to lie within the instrument's band around mark. Protection is MARKET_PROTECTION beyond the best
    opposite quote (mark if there is none; the stop price of a stop order), rounded inwards, and never beyond the band.
    An order that only reduces may be smaller than the minimum notional.
    Raises Problem INSTRUMENT_NOT_TRADING, VALIDATION_FAILED, PRICE_NOT_ON_TICK, QUANTITY_NOT_ON_LOT, MIN_NOTIONAL
    or PRICE_OUT_OF_BAND.
    """
    if instrument.state != "TRADING":
        raise Problem("INSTRUMENT_NOT_TRADING", f"{instrument.instrument_id} is {instrument.state}")
    if not 0 < request.quantity <= QUANTITY_MAX:
        raise Problem("VALIDATION_FAILED", f"Expected 0 < quantity <= {QUANTITY_MAX:f}, was {request.quantity}")
    instrument.quantity_to_lots(request.quantity)
    low, high = reference.mark * (1 - instrument.price_band), reference.mark * (1 + instrument.price_band)
    _check_terms(request, instrument, low, high)
    if request.has_limit:
        bound = _limit_price(request, instrument, low, high)
    else:
        # A stop will meet the book that there is when its price is reached.
        start = Reference(request.stop_price) if request.stop_price is not None else reference
        bound = _protection_price(request.side, instrument, start, low, high)
    if not request.reduce_only and bound * request.quantity < instrument.min_notional:
        raise Problem(
            "MIN_NOTIONAL", f"Expected a notional of at least {plain(instrument.min_notional)} {instrument.quote_asset}"
        )
    return bound


def amendment(
    order: OpenOrder, price: Decimal | None, quantity: Decimal | None, instrument: Instrument, reference: Reference
) -> Amendment:
    """The change of an order to `price` and `quantity` (of the whole order; None: as it is).

    Raises Problem VALIDATION_FAILED if that changes nothing, ORDER_NOT_AMENDABLE without a limit or if all of
    `quantity` is filled already, and the problems of `bound_price`.
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
    bound = bound_price(new, instrument, reference)
    open_quantity = new.quantity - order.filled_quantity
    if open_quantity <= 0:
        raise Problem("ORDER_NOT_AMENDABLE", f"{order.filled_quantity:f} of order {order.order_id} are filled already")
    claim = ZERO, ZERO
    if not old.reduce_only:
        claim = amendment_claim(old.quantity - order.filled_quantity, order.bound_price, open_quantity, bound)
    loss = expected_open_loss(replace(new, quantity=open_quantity), reference)
    return Amendment(order, price, quantity, open_quantity, *claim, loss)


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


def _check_terms(request: OrderRequest, instrument: Instrument, low: Decimal, high: Decimal) -> None:
    if not request.has_limit and request.price is not None:
        raise Problem("VALIDATION_FAILED", f"A {request.type} order has no price")
    if request.post_only and (request.type != "LIMIT" or request.time_in_force != "GTC"):
        raise Problem("VALIDATION_FAILED", "postOnly goes with LIMIT orders that are GTC")
    if request.is_stop != (request.stop_price is not None):
        raise Problem("VALIDATION_FAILED", "stopPrice goes with stop and take-profit orders, which need it")
    if request.stop_price is not None:
        if not low <= request.stop_price <= high:
            raise Problem(
                "PRICE_OUT_OF_BAND",
                f"Expected a stopPrice from {plain(low)} to {plain(high)}, was {plain(request.stop_price)}",
            )
        instrument.price_to_ticks(request.stop_price)


def expected_open_loss(request: OrderRequest, reference: Reference) -> Decimal:
    """Open loss (quote, >= 0) at the limit, or for MARKET at the best opposite quote, against mark.

    0 for what waits for another mark price, and for what only reduces.
    """
    if request.is_stop or request.reduce_only:
        return ZERO
    best = reference.best_ask if request.side == "BUY" else reference.best_bid
    price = request.price or best or reference.mark
    return open_loss(request.side, request.quantity, price, reference.mark)


def _limit_price(request: OrderRequest, instrument: Instrument, low: Decimal, high: Decimal) -> Decimal:
    if request.price is None or request.price <= 0:
        raise Problem("VALIDATION_FAILED", f"A {request.type} order needs a price above 0")
    if request.price > high:
        raise Problem("PRICE_OUT_OF_BAND", f"Expected a price of at most {plain(high)}, was {plain(request.price)}")
    instrument.price_to_ticks(request.price)
    if request.price < low:
        raise Problem("PRICE_OUT_OF_BAND", f"Expected a price of at least {plain(low)}, was {plain(request.price)}")
    return request.price


def _protection_price(side: Side, instrument: Instrument, reference: Reference, low: Decimal, high: Decimal) -> Decimal:
    if side == "BUY":
        bound = min((reference.best_ask or reference.mark) * (1 + MARKET_PROTECTION), high)
        return _to_tick(bound, instrument.tick_size, ROUND_FLOOR)
    bound = max((reference.best_bid or reference.mark) * (1 - MARKET_PROTECTION), low)
    return _to_tick(bound, instrument.tick_size, ROUND_CEILING)


def _to_tick(price: Decimal, tick_size: Decimal, rounding: str) -> Decimal:
    return (price / tick_size).to_integral_value(rounding) * tick_size

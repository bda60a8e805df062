"""One instrument of the exchange in memory: the real matcher, the mark, and the orders as their users sent them."""

from dataclasses import dataclass, field, replace
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal

from domain.instruments import Instrument
from domain.mark_price import MARK_AGE_MAX
from domain.matching import (
    Amend,
    Amended,
    AnyEvent,
    Cancelled,
    Expired,
    Filled,
    MarkPrice,
    New,
    Rejected,
    Trade,
)
from domain.order_entry import Amendment, NewOrder, OpenOrder, protection
from engine.guards import ONE
from engine.matcher import Matcher

MARK_AGE_MAX_MS = int(MARK_AGE_MAX.total_seconds() * 1000)


@dataclass
class Venue:
    """`live_until` (ms): until then the mark is live. `orders` are those that may be amended."""

    instrument: Instrument
    mark: Decimal
    matcher: Matcher = field(init=False)
    live_until: int = -1
    state: str = "TRADING"
    orders: dict[int, OpenOrder] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.matcher = Matcher(self.instrument)

    def is_live(self, at: int) -> bool:
        """Whether the mark says anything about now."""
        return at <= self.live_until

    def mark_command(self, mark: Decimal, at: int, *, frozen: bool = False) -> MarkPrice:
        """The mark as the engine is told."""
        self.mark = mark
        self.live_until = -1 if frozen else at + MARK_AGE_MAX_MS
        ticks = mark / self.instrument.tick_size
        floor, ceiling = (int(ticks.to_integral_value(rounding)) for rounding in (ROUND_FLOOR, ROUND_CEILING))
        return MarkPrice(at=at, price=floor, ceiling=ceiling, frozen=frozen)

    def new_command(self, order: NewOrder, order_id: int, at: int) -> New:
        """An order as the engine gets it (as `activities.orders.commands.new_command`)."""
        request, ticks = order.request, self.instrument.price_to_ticks
        price = ticks(order.bound_price)
        basis = ticks(order.margin_price or order.bound_price)
        waits_for_market = request.type in ("STOP_MARKET", "TAKE_PROFIT_MARKET")
        self.orders[order_id] = OpenOrder(
            order_id,
            order.user_id,
            request,
            order.bound_price,
            Decimal(0),
            order.margin_price or order.bound_price,
            order.open_loss,
        )
        return New(
            at=at,
            order_id=order_id,
            user_id=order.user_id,
            side=request.side,
            type=request.type,
            time_in_force=request.time_in_force if request.has_limit else "IOC",
            price=price,
            quantity=self.instrument.quantity_to_lots(request.quantity),
            stp_mode=request.stp_mode,
            reduce_only=request.reduce_only,
            stop_price=ticks(request.stop_price) if request.stop_price else 0,
            basis=0 if basis == price else basis,
            loss=ticks(order.open_loss),
            protection=int(protection(self.instrument) * ONE) if waits_for_market else 0,
        )

    def amend_command(self, amendment: Amendment, amendment_id: int, at: int) -> Amend:
        """An amendment as the engine gets it (as `activities.orders.commands.amend_command`)."""
        instrument = self.instrument
        return Amend(
            at=at,
            order_id=amendment.order.order_id,
            user_id=amendment.order.user_id,
            price=None if amendment.price is None else instrument.price_to_ticks(amendment.price),
            quantity=None if amendment.quantity is None else instrument.quantity_to_lots(amendment.quantity),
            amendment_id=amendment_id,
            basis=instrument.price_to_ticks(amendment.margin_price),
            loss=instrument.price_to_ticks(amendment.open_loss),
        )

    def remember(self, event: AnyEvent) -> None:
        """Fold an event into the orders that may be amended."""
        match event:
            case Trade():
                for order_id in (event.maker_order_id, event.taker_order_id):
                    if order_id in self.orders:
                        order = self.orders[order_id]
                        filled = order.filled_quantity + self.instrument.lots_to_quantity(event.quantity)
                        self.orders[order_id] = replace(order, filled_quantity=filled)
            case Filled() | Cancelled() | Expired() | Rejected():
                self.orders.pop(event.order_id, None)
            case Amended():
                self._amended(event)
            case _:
                pass

    def _amended(self, event: Amended) -> None:
        price, order = self.instrument.ticks_to_price, self.orders[event.order_id]
        total = order.filled_quantity + self.instrument.lots_to_quantity(event.quantity)
        has_limit = order.request.has_limit
        request = replace(order.request, quantity=total, price=price(event.price) if has_limit else None)
        self.orders[event.order_id] = replace(
            order,
            request=request,
            bound_price=price(event.price),
            margin_price=price(event.basis or event.price),
            open_loss=price(event.loss),
        )

"""Our matcher behind the stdio protocol of `tracebook-conformance`: `python -m tests.conformance.tracebook_adapter`.

Requests are put into our commands and our events into its observations; every answer is read from the matcher and
its book. `docs/conformance.md` says how the rules are mapped.
"""

import sys
from collections.abc import Iterator
from decimal import ROUND_HALF_EVEN, Decimal
from typing import TypeVar

from tracebook.conformance.model import (
    BookSnapshot,
    BookState,
    ConformanceConfig,
    ConformanceError,
    EngineMetadata,
    Observation,
    Outcome,
    RestingOrder,
    TradeFill,
    canonical_decimal,
)
from tracebook.conformance.protocol import serve_stdio
from tracebook.core.order import NO_OWNER, OrderSide, OrderType, SelfTradePolicy
from tracebook.events import MarketEvent

from domain import matching
from domain.instruments import SHIPPED
from domain.matching import Amend, AnyEvent, Cancel, CancelAll, New, Rejected, Side, StpMode, TimeInForce, Trade
from engine.book import BookSide, Order
from engine.matcher import Matcher

Value = TypeVar("Value")

TERMS: dict[OrderType, tuple[matching.OrderType, TimeInForce]] = {
    OrderType.LIMIT: ("LIMIT", "GTC"),
    OrderType.MARKET: ("MARKET", "IOC"),
    OrderType.IOC: ("LIMIT", "IOC"),
    OrderType.FOK: ("LIMIT", "FOK"),
}
STP_MODES: dict[SelfTradePolicy, StpMode] = {
    SelfTradePolicy.NONE: "EXPIRE_TAKER",  # without effect: every order is a user of its own
    SelfTradePolicy.CANCEL_RESTING: "EXPIRE_MAKER",
    SelfTradePolicy.CANCEL_INCOMING: "EXPIRE_TAKER",
}
# A market order there has no limit, ours has a protection price: in ticks, far beyond every price of a trace.
HIGHEST_PRICE, LOWEST_PRICE = 10**12, 1


class Adapter:
    """The books of all symbols of one trace. Prices are ticks of the configured size, quantities 1e-places."""

    def __init__(self, config: ConformanceConfig) -> None:
        if config.matching_algorithm != "fifo":
            raise ConformanceError(f"Expected fifo, was {config.matching_algorithm}: our books know no other rule")
        self.metadata = EngineMetadata("saga-exchange", "0.1.0", "Python")
        self.config = config
        self.tick = Decimal(canonical_decimal(config.tick_size))
        self.lot = Decimal(1).scaleb(-config.quantity_decimal_places)
        self.books: dict[str, Matcher] = {}
        self.owners: dict[tuple[str, int], int] = {}

    def apply(self, event: MarketEvent, index: int) -> Observation:
        """Carry out one request."""
        events, reason = self._carry_out(event, index)
        outcome = Outcome("rejected", reason) if reason else Outcome("applied")
        trades = tuple(self._fill(event.symbol, trade) for trade in events if isinstance(trade, Trade))
        state = self.snapshot()
        return Observation(index, outcome, trades, state.digest(), state.order_count)

    def snapshot(self) -> BookState:
        """Every resting order, in the order in which they would trade."""
        return BookState(
            tuple(
                BookSnapshot(
                    symbol,
                    tuple(self._resting(symbol, matcher, matcher.book.bids)),
                    tuple(self._resting(symbol, matcher, matcher.book.asks)),
                )
                for symbol, matcher in sorted(self.books.items())
            )
        )

    def close(self) -> None:
        """Nothing is held."""

    def _carry_out(self, event: MarketEvent, index: int) -> tuple[list[AnyEvent], str | None]:
        """The events of a request, or why it is refused."""
        if event.op in ("new", "clear"):
            matcher = self.books.setdefault(event.symbol, Matcher(SHIPPED[0]))
            return self._new(matcher, event, index) if event.op == "new" else _clear(matcher, index)
        order_id = _given(event.order_id)
        matcher = self.books.get(event.symbol) or Matcher(SHIPPED[0])
        resting = matcher.book.orders.get(order_id)
        if resting is None:
            return [], "ORDER_NOT_ACTIVE"
        if event.op == "replace":
            return self._replace(matcher, resting, event, index)
        left = 0 if event.op == "cancel" else resting.remaining - self._lots(_given(event.quantity))
        if left < 0:
            return [], "INVALID_ORDER"
        user_id = resting.new.user_id
        if left:
            total = resting.new.quantity - resting.remaining + left
            return matcher.apply(Amend(at=index, order_id=order_id, user_id=user_id, quantity=total)), None
        return matcher.apply(Cancel(at=index, order_id=order_id, user_id=user_id)), None

    def _replace(
        self, matcher: Matcher, resting: Order, event: MarketEvent, index: int
    ) -> tuple[list[AnyEvent], str | None]:
        """Always a new place in the queue, unlike our `Amend`: a cancel and a new order with the same id."""
        old = resting.new
        price = resting.price if event.price is None else self._ticks(event.price)
        quantity = resting.remaining if event.quantity is None else self._lots(event.quantity)
        if price <= 0 or quantity <= 0:
            return [], "INVALID_REPLACEMENT"
        cancel = Cancel(at=index, order_id=old.order_id, user_id=old.user_id)
        again = self._order(old.order_id, old.user_id, old.side, OrderType.LIMIT, price, quantity, index)
        return matcher.apply(cancel) + matcher.apply(again), None

    def _new(self, matcher: Matcher, event: MarketEvent, index: int) -> tuple[list[AnyEvent], str | None]:
        order_id, side = _given(event.order_id), _side(_given(event.side))
        if event.order_type is OrderType.MARKET:
            price = HIGHEST_PRICE if side == "BUY" else LOWEST_PRICE
        else:
            price = self._ticks(_given(event.price))
        policy_applies = self.config.self_trade_policy is not SelfTradePolicy.NONE and event.owner != NO_OWNER
        user_id = event.owner if policy_applies else -order_id
        order = self._order(order_id, user_id, side, event.order_type, price, self._lots(_given(event.quantity)), index)
        events = matcher.apply(order)
        if not events:
            return [], "DUPLICATE_ORDER_ID"
        if isinstance(events[0], Rejected):
            return [], "INVALID_ORDER"
        self.owners[event.symbol, order_id] = event.owner
        return events, None

    def _order(
        self, order_id: int, user_id: int, side: Side, order_type: OrderType, price: int, quantity: int, index: int
    ) -> New:
        our_type, time_in_force = TERMS[order_type]
        return New(
            at=index,
            order_id=order_id,
            user_id=user_id,
            side=side,
            type=our_type,
            time_in_force=time_in_force,
            price=price,
            quantity=quantity,
            stp_mode=STP_MODES[self.config.self_trade_policy],
        )

    def _fill(self, symbol: str, trade: Trade) -> TradeFill:
        taker_buys = trade.taker_side == "BUY"
        return TradeFill(
            symbol=symbol,
            buy_order_id=trade.taker_order_id if taker_buys else trade.maker_order_id,
            sell_order_id=trade.maker_order_id if taker_buys else trade.taker_order_id,
            price=canonical_decimal(trade.price * self.tick),
            quantity=canonical_decimal(trade.quantity * self.lot),
        )

    def _resting(self, symbol: str, matcher: Matcher, side: BookSide) -> Iterator[RestingOrder]:
        for order in matcher.book.resting(side):
            yield RestingOrder(
                order_id=order.new.order_id,
                price=canonical_decimal(order.price * self.tick),
                remaining_quantity=canonical_decimal(order.remaining * self.lot),
                owner=self.owners[symbol, order.new.order_id],
            )

    def _ticks(self, price: float) -> int:
        """The nearest tick: prices of a trace may lie beside the grid."""
        return int((Decimal(str(price)) / self.tick).quantize(Decimal(1), rounding=ROUND_HALF_EVEN))

    def _lots(self, quantity: float) -> int:
        return int((Decimal(str(quantity)) / self.lot).quantize(Decimal(1), rounding=ROUND_HALF_EVEN))


def _clear(matcher: Matcher, index: int) -> tuple[list[AnyEvent], None]:
    users = [user_id for user_id, account in matcher.book.accounts.items() if account.orders]
    return [event for user_id in users for event in matcher.apply(CancelAll(at=index, user_id=user_id))], None


def _side(side: OrderSide) -> Side:
    return "BUY" if side is OrderSide.BUY else "SELL"


def _given(value: Value | None) -> Value:
    if value is None:
        raise ConformanceError("Expected a value, was none")
    return value


if __name__ == "__main__":
    sys.exit(serve_stdio(Adapter))

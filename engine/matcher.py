"""The matching rules of one instrument: a command in, its events out.

Pure: no I/O, clock, randomness or floats. The same commands give the same events, byte for byte, on any machine.
Prices are ticks, quantities lots, fees 1e-8 quote.
"""

from collections import deque
from fractions import Fraction

import msgspec
from msgspec import structs

from domain.instruments import Instrument
from domain.matching import (
    Amend,
    Amended,
    AmendRejected,
    AnyCommand,
    AnyEvent,
    Cancel,
    CancelAll,
    Cancelled,
    CancelReplace,
    Expired,
    Filled,
    MarkPrice,
    New,
    Placed,
    Rejected,
    SetState,
    StateChanged,
    StopPlaced,
    Trade,
    TradingState,
    Triggered,
)
from engine.book import Book, BookSide, Order
from engine.fillable import fillable
from engine.reductions import Reductions
from engine.stops import Stops, waits_for_rise

# A trade's id is its event's seq and its instrument's number: unique across instruments, and below 2^53 for
# the first 8.8 * 10^12 events of an instrument.
INSTRUMENTS_MAX = 1024
FEE_UNITS = 10**8
SNAPSHOT_VERSION = 2
PLAIN = frozenset({"LIMIT", "MARKET"})
RESTING = frozenset({"LIMIT", "STOP_LIMIT", "TAKE_PROFIT_LIMIT"})


class Snapshot(msgspec.Struct, frozen=True, array_like=True):
    """All that a matcher knows. Orders are in order of entry."""

    version: int
    event_seq: int
    state: TradingState
    mark_price: int
    last_price: int
    positions: list[tuple[int, int]]
    resting: list[Order]
    waiting: list[Order]


class Matcher:
    """The book of one instrument and the rules that change it; `event_seq` is the seq of the last event given out.

    `mark_price` and `last_price` are 0 as long as there is none. Amended and shrunk reduce-only orders, stops and the
    like are told in `domain/matching.py`, with the command or event that is about them.
    """

    __slots__ = (
        "_due",
        "_instrument_number",
        "_maker_fee",
        "_taker_fee",
        "book",
        "event_seq",
        "last_price",
        "mark_price",
        "reductions",
        "state",
        "stops",
    )

    def __init__(self, instrument: Instrument) -> None:
        assert 0 <= instrument.number < INSTRUMENTS_MAX, f"Expected a number below {INSTRUMENTS_MAX}, was {instrument}"
        self.book = Book()
        self.stops = Stops()
        self.reductions = Reductions()
        self.state: TradingState = "TRADING"
        self.mark_price = 0
        self.last_price = 0
        self.event_seq = 0
        # Triggered orders that have not entered yet; empty between commands.
        self._due: deque[Order] = deque()
        self._instrument_number = instrument.number
        # Fee units per tick and lot as numerator and denominator: fees are exact with integers alone.
        notional_units = Fraction(instrument.tick_size) * Fraction(instrument.lot_size) * FEE_UNITS
        self._maker_fee = (notional_units * Fraction(instrument.maker_fee_rate)).as_integer_ratio()
        self._taker_fee = (notional_units * Fraction(instrument.taker_fee_rate)).as_integer_ratio()

    def dump(self) -> bytes:
        """The complete state: `load` of it goes on exactly as this matcher would."""
        return msgspec.msgpack.encode(
            Snapshot(
                SNAPSHOT_VERSION,
                self.event_seq,
                self.state,
                self.mark_price,
                self.last_price,
                sorted((user_id, lots) for user_id, lots in self.reductions.positions.items() if lots),
                list(self.book.orders.values()),
                list(self.stops.orders.values()),
            )
        )

    @classmethod
    def load(cls, instrument: Instrument, state: bytes) -> "Matcher":
        """The matcher that was dumped. Raises ValueError if `state` is malformed or of another version."""
        snapshot = msgspec.msgpack.decode(state, type=Snapshot)
        if snapshot.version != SNAPSHOT_VERSION:
            raise ValueError(f"Expected a snapshot of version {SNAPSHOT_VERSION}, was {snapshot.version}")
        matcher = cls(instrument)
        matcher.event_seq = snapshot.event_seq
        matcher.state = snapshot.state
        matcher.mark_price = snapshot.mark_price
        matcher.last_price = snapshot.last_price
        matcher.reductions.positions.update(snapshot.positions)
        for order in snapshot.resting:
            matcher._rest(order)
        for order in snapshot.waiting:
            matcher.stops.add(order)
        return matcher

    def apply(self, command: AnyCommand) -> list[AnyEvent]:
        """Carry out one command. Its events, in order, have the seqs that follow the former `event_seq`."""
        events: list[AnyEvent] = []
        if isinstance(command, New):
            self._new(command, command.at, events)
        elif isinstance(command, Cancel):
            self._cancel(command, events)
        else:
            self._apply_rare(command, events)
        if self._due or self.stops.orders:
            self._trigger(command.at, events)
        self.event_seq += len(events)
        return events

    def _apply_rare(
        self, command: CancelAll | Amend | CancelReplace | SetState | MarkPrice, events: list[AnyEvent]
    ) -> None:
        if isinstance(command, CancelAll):
            self._cancel_all(command, events)
        elif isinstance(command, Amend):
            self._amend(command, events)
        elif isinstance(command, CancelReplace):
            self._cancel_replace(command, events)
        elif isinstance(command, SetState):
            if command.state != self.state:
                self.state = command.state
                events.append(StateChanged(at=command.at, state=command.state))
                self._mark_reached()
        elif command.price > 0:
            self.mark_price = command.price
            self._mark_reached()

    # Entry

    def _new(self, new: New, at: int, events: list[AnyEvent]) -> None:
        order_id = new.order_id
        if order_id in self.book.orders or order_id in self.stops.orders:
            # The same command twice. An event would be about the order that is there, which is in good order.
            return
        order = Order(new, new.price, new.quantity)
        if self.state != "TRADING":
            events.append(_ended(Rejected, order, at, "INSTRUMENT_NOT_TRADING"))
        elif _invalid(new):
            events.append(_ended(Rejected, order, at, "INVALID_ORDER"))
        elif new.type in PLAIN:
            self._enter(order, at, Rejected, events)
        else:
            self._wait(order, at, events)

    def _wait(self, order: Order, at: int, events: list[AnyEvent]) -> None:
        new = order.new
        price = self.mark_price if new.working_type == "MARK" else self.last_price
        if price and (price >= new.stop_price if waits_for_rise(new) else price <= new.stop_price):
            self._due.append(order)
            return
        self.stops.add(order)
        events.append(
            StopPlaced(
                at=at,
                order_id=new.order_id,
                user_id=new.user_id,
                side=new.side,
                price=order.price,
                quantity=order.remaining,
                stop_price=new.stop_price,
                working_type=new.working_type,
                reduce_only=new.reduce_only,
            )
        )

    def _enter(self, order: Order, at: int, refused: type[Rejected | Expired], events: list[AnyEvent]) -> None:
        """Let an order trade and rest. One that its terms forbid to enter ends with an event of kind `refused`."""
        new = order.new
        book = self.book
        if new.side == "BUY":
            opposite, limit_key = book.asks, order.price
        else:
            opposite, limit_key = book.bids, -order.price
        best = opposite.best
        crosses = best is not None and best.key <= limit_key
        if new.post_only and crosses:
            events.append(_ended(refused, order, at, "POST_ONLY_WOULD_CROSS"))
            return
        if new.reduce_only and not self._shrink_taker(order, at, refused, events):
            return
        if new.time_in_force == "FOK" and not fillable(order, book, opposite, limit_key, self.reductions):
            events.append(_ended(Expired, order, at, "FOK_NOT_FILLABLE"))
            return

        self_trade = crosses and self._match(order, at, opposite, limit_key, events)
        if not order.remaining:
            events.append(Filled(at, new.order_id, new.user_id))
        elif self_trade:
            events.append(_ended(Expired, order, at, "SELF_TRADE"))
        elif new.type not in RESTING:
            reason = "NO_LIQUIDITY" if opposite.best is None else "PROTECTION_PRICE"
            events.append(_ended(Expired, order, at, reason))
        elif new.time_in_force != "GTC":
            events.append(_ended(Expired, order, at, "IOC"))
        elif not new.reduce_only or self._shrink_resting(order, at, events):
            self._rest(order)
            events.append(
                Placed(at, new.order_id, new.user_id, new.side, order.price, order.remaining, new.reduce_only)
            )

    def _rest(self, order: Order) -> None:
        self.book.add(order)
        if order.new.reduce_only:
            self.reductions.add(order)

    # Matching

    def _match(self, order: Order, at: int, opposite: BookSide, limit_key: int, events: list[AnyEvent]) -> bool:
        """Trade with the opposite side up to the limit; whether self-trade prevention ended it."""
        new, book = order.new, self.book
        side, user_id, order_id, taker_reduces = new.side, new.user_id, new.order_id, new.reduce_only
        maker_units, maker_per = self._maker_fee
        taker_units, taker_per = self._taker_fee
        reductions = self.reductions
        positions, reducing = reductions.positions, reductions.users
        trade_id = self.event_seq * INSTRUMENTS_MAX + self._instrument_number
        remaining = order.remaining
        level = opposite.best
        while level is not None and level.key <= limit_key:
            maker = level.queue[0]
            maker_remaining = maker.remaining
            if not maker_remaining:
                maker = level.first()
                maker_remaining = maker.remaining
            maker_new = maker.new
            maker_user_id = maker_new.user_id
            if maker_user_id == user_id:
                if new.stp_mode != "EXPIRE_TAKER":
                    events.append(_ended(Expired, maker, at, "SELF_TRADE"))
                    self._remove(maker)
                if new.stp_mode != "EXPIRE_MAKER":
                    return True
                level = opposite.best
                continue
            price = level.price
            quantity = remaining if remaining < maker_remaining else maker_remaining
            order.remaining = remaining = remaining - quantity
            maker.remaining = maker_remaining = maker_remaining - quantity
            level.lots -= quantity
            notional = price * quantity
            events.append(
                Trade(
                    at,
                    trade_id + (len(events) + 1) * INSTRUMENTS_MAX,
                    price,
                    quantity,
                    side,
                    maker_new.order_id,
                    maker_user_id,
                    maker_remaining,
                    -(-notional * maker_units // maker_per),
                    order_id,
                    user_id,
                    remaining,
                    -(-notional * taker_units // taker_per),
                    order.price,
                    new.liquidation,
                    maker_new.reduce_only,
                    taker_reduces,
                )
            )
            self.last_price = price
            bought = quantity if side == "BUY" else -quantity
            positions[user_id] = positions.get(user_id, 0) + bought
            positions[maker_user_id] = positions.get(maker_user_id, 0) - bought
            if not maker_remaining:
                level.queue.popleft()
                if not level.lots:
                    opposite.emptied(level)
                book.forget(maker_new)
                events.append(Filled(at, maker_new.order_id, maker_user_id))
            if reducing:
                self._position_changed(maker, quantity, user_id, at, events)
            if not remaining:
                return False
            level = opposite.best
        return False

    # Reduce-only

    def _position_changed(self, maker: Order, quantity: int, taker_id: int, at: int, events: list[AnyEvent]) -> None:
        """Bring the reduce-only orders of both sides of a trade in line with their positions."""
        if maker.new.reduce_only:
            if maker.remaining:
                self.reductions.take(maker, quantity)
            else:
                self.reductions.remove(maker, quantity)
        for user_id in (maker.new.user_id, taker_id):
            excess = self.reductions.excess(user_id)
            while excess > 0:
                order = self.reductions.newest(user_id)
                cut = min(excess, order.remaining)
                if cut == order.remaining:
                    events.append(_ended(Expired, order, at, "REDUCE_ONLY"))
                    self._remove(order)
                else:
                    old = order.remaining
                    self._lower(order, old - cut)
                    events.append(_amended(order, at, order.price, old, "REDUCE_ONLY"))
                excess -= cut

    def _shrink_taker(self, order: Order, at: int, refused: type[Rejected | Expired], events: list[AnyEvent]) -> bool:
        """Cut an entering order to the position; false if there is none."""
        room = self.reductions.reducible(order.new.user_id, order.new.side)
        if not room:
            reason = "REDUCE_ONLY_REJECTED" if refused is Rejected else "REDUCE_ONLY"
            events.append(_ended(refused, order, at, reason))
            return False
        self._shrink_outside(order, room, at, events)
        return True

    def _shrink_resting(self, order: Order, at: int, events: list[AnyEvent]) -> bool:
        """Cut an order about to rest to what older reduce-only orders leave of the position; false if that is nothing.

        It traded first: whoever wants out now comes before those who wait for a better price.
        """
        user_id = order.new.user_id
        room = self.reductions.reducible(user_id, order.new.side) - self.reductions.lots(user_id)
        if room <= 0:
            events.append(_ended(Expired, order, at, "REDUCE_ONLY"))
            return False
        self._shrink_outside(order, room, at, events)
        return True

    def _shrink_outside(self, order: Order, room: int, at: int, events: list[AnyEvent]) -> None:
        old = order.remaining
        if old > room:
            _resize(order, room)
            events.append(_amended(order, at, order.price, old, "REDUCE_ONLY", was_resting=False, resting=False))

    # Leaving and changing

    def _remove(self, order: Order) -> None:
        if order.new.reduce_only:
            self.reductions.remove(order, order.remaining)
        self.book.remove(order)

    def _lower(self, order: Order, remaining: int) -> None:
        """Take lots off a resting order, which keeps its place."""
        cut = order.remaining - remaining
        side = self.book.side(order.new.side)
        side.levels[side.sign * order.price].lots -= cut
        _resize(order, remaining)
        if order.new.reduce_only:
            self.reductions.take(order, cut)

    def _cancel(self, command: Cancel, events: list[AnyEvent]) -> None:
        order = self.book.orders.get(command.order_id) or self.stops.orders.get(command.order_id)
        if order is not None and order.new.user_id == command.user_id:
            self._take_out(order, command.at, command.reason, events)

    def _cancel_all(self, command: CancelAll, events: list[AnyEvent]) -> None:
        for users in (self.book.users, self.stops.users):
            for order in list(users.get(command.user_id, {}).values()):
                self._take_out(order, command.at, command.reason, events)

    def _cancel_replace(self, command: CancelReplace, events: list[AnyEvent]) -> None:
        new = command.order
        if new.order_id in self.book.orders or new.order_id in self.stops.orders:
            return
        old = self._order_of(new.user_id, command.cancel_order_id)
        if old is None:
            events.append(_ended(Rejected, Order(new, new.price, new.quantity), command.at, "REPLACED_ORDER_NOT_FOUND"))
            return
        if self.state == "TRADING" and not _invalid(new):
            self._take_out(old, command.at, "REPLACED", events)
        self._new(new, command.at, events)

    def _order_of(self, user_id: int, order_id: int) -> Order | None:
        """The user's order of this id, resting or waiting."""
        order = self.book.orders.get(order_id) or self.stops.orders.get(order_id)
        return order if order is not None and order.new.user_id == user_id else None

    def _take_out(self, order: Order, at: int, reason: str, events: list[AnyEvent]) -> None:
        events.append(_ended(Cancelled, order, at, reason))
        if order.new.order_id in self.book.orders:
            self._remove(order)
        else:
            self.stops.remove(order)

    def _amend(self, command: Amend, events: list[AnyEvent]) -> None:
        order = self._order_of(command.user_id, command.order_id)
        if order is None:
            events.append(_amend_rejected(command, "ORDER_NOT_FOUND"))
            return
        new = order.new
        price = order.price if command.price is None else command.price
        total = new.quantity if command.quantity is None else command.quantity
        refusal = self._amend_refusal(order, price, total)
        if refusal:
            events.append(_amend_rejected(command, refusal))
            return
        terms = structs.replace(new, price=price, quantity=total)
        remaining = total - (new.quantity - order.remaining)
        if command.order_id in self.book.orders:
            self._amend_resting(order, terms, remaining, command, events)
        else:
            old_price, old_quantity = order.price, order.remaining
            order.new, order.price, order.remaining = terms, price, remaining
            events.append(_amended_by(command, order, old_price, old_quantity, was_resting=False, resting=False))

    def _amend_refusal(self, order: Order, price: int, total: int) -> str:
        """Why the order may not have this price and be over `total` lots; empty if it may."""
        if self.state != "TRADING":
            return "INSTRUMENT_NOT_TRADING"
        if price <= 0 or total <= 0:
            return "INVALID_ORDER"
        if total <= order.new.quantity - order.remaining:
            return "QUANTITY_ALREADY_FILLED"
        if order.new.post_only and order.new.order_id in self.book.orders:
            opposite = self.book.asks if order.new.side == "BUY" else self.book.bids
            if opposite.best is not None and opposite.best.key <= opposite.sign * price:
                return "POST_ONLY_WOULD_CROSS"
        return ""

    def _amend_resting(self, order: Order, terms: New, remaining: int, command: Amend, events: list[AnyEvent]) -> None:
        old_price, old_quantity = order.price, order.remaining
        amended = Order(terms, terms.price, remaining)
        if terms.reduce_only:
            # Room beside the user's other orders; never less than this one has already.
            reductions = self.reductions
            room = reductions.reducible(terms.user_id, terms.side) - reductions.lots(terms.user_id) + old_quantity
            if remaining > room:
                _resize(amended, room)
        if amended.price == old_price and amended.remaining <= old_quantity:
            self._lower(order, amended.remaining)
            events.append(_amended_by(command, order, old_price, old_quantity))
            return
        self._remove(order)
        events.append(_amended_by(command, amended, old_price, old_quantity, resting=False))
        self._enter(amended, command.at, Expired, events)

    # Stops

    def _mark_reached(self) -> None:
        if self.state == "TRADING" and self.mark_price:
            self._due += self.stops.reached("MARK", self.mark_price)

    def _trigger(self, at: int, events: list[AnyEvent]) -> None:
        """Let triggered orders enter, one after the other. Those that their trades trigger in turn queue up behind."""
        due, seen = self._due, 0
        while True:
            if self.stops.await_last():
                for event in events[seen:]:
                    if isinstance(event, Trade):
                        due += self.stops.reached("LAST", event.price)
            seen = len(events)
            if not due:
                return
            order = due.popleft()
            new = order.new
            events.append(
                Triggered(
                    at=at,
                    order_id=new.order_id,
                    user_id=new.user_id,
                    side=new.side,
                    price=order.price,
                    quantity=order.remaining,
                    reduce_only=new.reduce_only,
                )
            )
            self._enter(order, at, Expired, events)


def _invalid(new: New) -> bool:
    if new.type not in PLAIN and new.stop_price <= 0:
        return True
    if new.price <= 0 or new.quantity <= 0:
        return True
    return new.post_only and (new.type not in RESTING or new.time_in_force != "GTC")


def _ended(
    kind: type[Cancelled | Expired | Rejected], order: Order, at: int, reason: str
) -> Cancelled | Expired | Rejected:
    new = order.new
    return kind(at, new.order_id, new.user_id, new.side, order.price, order.remaining, reason, new.reduce_only)


def _amended(
    order: Order,
    at: int,
    old_price: int,
    old_quantity: int,
    reason: str,
    *,
    was_resting: bool = True,
    resting: bool = True,
    amendment_id: int = 0,
) -> Amended:
    new = order.new
    return Amended(
        at=at,
        order_id=new.order_id,
        user_id=new.user_id,
        side=new.side,
        price=order.price,
        quantity=order.remaining,
        old_price=old_price,
        old_quantity=old_quantity,
        reason=reason,
        reduce_only=new.reduce_only,
        was_resting=was_resting,
        resting=resting,
        amendment_id=amendment_id,
    )


def _amended_by(
    command: Amend, order: Order, old_price: int, old_quantity: int, *, was_resting: bool = True, resting: bool = True
) -> Amended:
    return _amended(
        order,
        command.at,
        old_price,
        old_quantity,
        "USER_REQUEST",
        was_resting=was_resting,
        resting=resting,
        amendment_id=command.amendment_id,
    )


def _amend_rejected(command: Amend, reason: str) -> AmendRejected:
    return AmendRejected(
        at=command.at,
        order_id=command.order_id,
        user_id=command.user_id,
        reason=reason,
        amendment_id=command.amendment_id,
    )


def _resize(order: Order, remaining: int) -> None:
    """Let `remaining` lots be open; what was filled stays as it was."""
    total = order.new.quantity - order.remaining + remaining
    order.new = structs.replace(order.new, quantity=total)
    order.remaining = remaining

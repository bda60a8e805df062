"""The matching rules of one instrument: a command in, its events out.

Pure: no I/O, clock, randomness or floats. The same commands give the same events, byte for byte, on any machine.
Prices are ticks, quantities lots, fees 1e-8 quote.
"""

from collections import deque
from fractions import Fraction
from math import lcm

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
    Deleverage,
    Deleveraged,
    Expired,
    Filled,
    MarkPrice,
    New,
    Placed,
    Rejected,
    SetState,
    Side,
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
        "_fees",
        "_instrument_number",
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
        self.reductions = Reductions(self.book.accounts)
        self.state: TradingState = "TRADING"
        self.mark_price = 0
        self.last_price = 0
        self.event_seq = 0
        # Triggered orders that have not entered yet; empty between commands.
        self._due: deque[Order] = deque()
        self._instrument_number = instrument.number
        # Fee units of maker and taker per tick and lot, and what divides both: fees are exact with integers alone.
        notional_units = Fraction(instrument.tick_size) * Fraction(instrument.lot_size) * FEE_UNITS
        maker_fee = notional_units * Fraction(instrument.maker_fee_rate)
        taker_fee = notional_units * Fraction(instrument.taker_fee_rate)
        per = lcm(maker_fee.denominator, taker_fee.denominator)
        self._fees = (int(maker_fee * per), int(taker_fee * per), per)

    def dump(self) -> bytes:
        """The complete state: `load` of it goes on exactly as this matcher would."""
        return msgspec.msgpack.encode(
            Snapshot(
                SNAPSHOT_VERSION,
                self.event_seq,
                self.state,
                self.mark_price,
                self.last_price,
                sorted((user_id, own.position) for user_id, own in self.book.accounts.items() if own.position),
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
        for user_id, position in snapshot.positions:
            matcher.book.accounts[user_id].position = position
        for order in snapshot.resting:
            matcher._rest(order)
        for order in snapshot.waiting:
            matcher.stops.add(order)
        return matcher

    def apply(self, command: AnyCommand) -> list[AnyEvent]:
        """Carry out one command. Its events, in order, have the seqs that follow the former `event_seq`."""
        events: list[AnyEvent] = []
        # Not by `isinstance`, which takes long to say no to a class with a metaclass.
        if type(command) is New:
            self._new(command, command.at, events)
        elif type(command) is Cancel:
            self._cancel(command, events)
        else:
            self._apply_rare(command, events)
        if self._due or self.stops.orders:
            self._trigger(command.at, events)
        self.event_seq += len(events)
        return events

    def _apply_rare(
        self, command: CancelAll | Amend | CancelReplace | SetState | MarkPrice | Deleverage, events: list[AnyEvent]
    ) -> None:
        if isinstance(command, CancelAll):
            self._cancel_all(command, events)
        elif isinstance(command, Amend):
            self._amend(command, events)
        elif isinstance(command, CancelReplace):
            self._cancel_replace(command, events)
        elif isinstance(command, Deleverage):
            self._deleverage(command, events)
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
        quantity = new.quantity
        plain = new.type in PLAIN
        if self.state != "TRADING":
            events.append(_ended(Rejected, new, quantity, at, "INSTRUMENT_NOT_TRADING"))
        elif (quantity <= 0 or new.price <= 0 or not plain or new.post_only) and _invalid(new):
            events.append(_ended(Rejected, new, quantity, at, "INVALID_ORDER"))
        elif plain:
            self._enter(new, quantity, at, Rejected, events)
        else:
            self._wait(Order(new, new.price, quantity), at, events)

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

    def _enter(
        self, new: New, quantity: int, at: int, refused: type[Rejected | Expired], events: list[AnyEvent]
    ) -> None:
        """Let `quantity` lots of an order trade and rest. What its terms forbid to enter ends as `refused`."""
        book, price = self.book, new.price
        if new.side == "BUY":
            opposite = book.asks
            best = opposite.best
            crosses = best is not None and best.price <= price
        else:
            opposite = book.bids
            best = opposite.best
            crosses = best is not None and best.price >= price
        if crosses and new.post_only:
            events.append(_ended(refused, new, quantity, at, "POST_ONLY_WOULD_CROSS"))
            return
        if new.reduce_only:
            room = self.reductions.reducible(new.user_id, new.side)
            if not room:
                reason = "REDUCE_ONLY_REJECTED" if refused is Rejected else "REDUCE_ONLY"
                events.append(_ended(refused, new, quantity, at, reason))
                return
            new, quantity = _shrunk(new, quantity, room, at, events)
        time_in_force = new.time_in_force
        if time_in_force == "FOK" and not fillable(new, quantity, book, opposite, self.reductions):
            events.append(_ended(Expired, new, quantity, at, "FOK_NOT_FILLABLE"))
            return

        if crosses:
            quantity = self._match(new, quantity, at, opposite, events)
            if not quantity:
                return
        if new.type not in RESTING:
            reason = "NO_LIQUIDITY" if opposite.best is None else "PROTECTION_PRICE"
            events.append(_ended(Expired, new, quantity, at, reason))
        elif time_in_force != "GTC":
            events.append(_ended(Expired, new, quantity, at, "IOC"))
        elif new.reduce_only:
            self._rest_reducing(new, quantity, at, events)
        else:
            book.add(Order(new, price, quantity))
            events.append(Placed(at, new.order_id, new.user_id, new.side, price, quantity))

    def _rest(self, order: Order) -> None:
        self.book.add(order)
        if order.new.reduce_only:
            self.reductions.add(order)

    # Matching

    def _match(self, new: New, remaining: int, at: int, opposite: BookSide, events: list[AnyEvent]) -> int:
        """Trade with the opposite side up to the limit; the lots that remain, 0 if the order has ended."""
        side, user_id, order_id, limit = new.side, new.user_id, new.order_id, new.price
        liquidation, taker_reduces, buys = new.liquidation, new.reduce_only, side == "BUY"
        orders, accounts, reducing = self.book.orders, self.book.accounts, self.reductions.users
        maker_units, taker_units, per = self._fees
        trade_id = self.event_seq * INSTRUMENTS_MAX + self._instrument_number
        taker = accounts[user_id]
        while (level := opposite.best) is not None:
            price, queue = level.price, level.queue
            if (buys and price > limit) or (not buys and price < limit):
                return remaining
            while level.lots:
                maker = queue[0]
                if not maker.remaining:
                    maker = level.first()
                open_lots = maker.remaining
                maker_new = maker.new
                maker_user_id = maker_new.user_id
                if maker_user_id == user_id:
                    if self._prevented(maker, new, remaining, at, events):
                        return 0
                    continue
                maker_order_id = maker_new.order_id
                quantity = open_lots if open_lots < remaining else remaining
                remaining -= quantity
                open_lots -= quantity
                level.lots -= quantity
                notional = price * quantity
                maker_fee, taker_fee = notional * maker_units, notional * taker_units
                if per != 1:
                    maker_fee, taker_fee = -(-maker_fee // per), -(-taker_fee // per)
                events.append(
                    Trade(
                        at,
                        trade_id + (len(events) + 1) * INSTRUMENTS_MAX,
                        price,
                        quantity,
                        side,
                        maker_order_id,
                        maker_user_id,
                        open_lots,
                        maker_fee,
                        order_id,
                        user_id,
                        remaining,
                        taker_fee,
                        limit,
                        liquidation,
                        maker_new.reduce_only,
                        taker_reduces,
                    )
                )
                self.last_price = price
                bought = quantity if buys else -quantity
                taker.position += bought
                account = accounts[maker_user_id]
                account.position -= bought
                if open_lots:
                    maker.remaining = open_lots
                else:
                    queue.popleft()
                    del orders[maker_order_id], account.orders[maker_order_id]
                    events.append(Filled(at, maker_order_id, maker_user_id))
                    if not level.lots:
                        opposite.emptied(level)
                if reducing:
                    self._position_changed(maker, open_lots, quantity, user_id, at, events)
                if not remaining:
                    events.append(Filled(at, order_id, user_id))
                    return 0
        return remaining

    def _prevented(self, maker: Order, new: New, remaining: int, at: int, events: list[AnyEvent]) -> bool:
        """Self-trade prevention: end the maker's order, the taker's or both; whether it ended the taker's."""
        if new.stp_mode != "EXPIRE_TAKER":
            events.append(_ended(Expired, maker.new, maker.remaining, at, "SELF_TRADE"))
            self._remove(maker)
        if new.stp_mode == "EXPIRE_MAKER":
            return False
        events.append(_ended(Expired, new, remaining, at, "SELF_TRADE"))
        return True

    # Reduce-only

    def _position_changed(
        self, maker: Order, open_lots: int, quantity: int, taker_id: int, at: int, events: list[AnyEvent]
    ) -> None:
        """Bring the reduce-only orders of both sides of a trade in line with their positions.

        Of the maker's order `quantity` lots were traded and `open_lots` are still open.
        """
        if maker.new.reduce_only:
            if open_lots:
                self.reductions.take(maker, quantity)
            else:
                self.reductions.remove(maker, quantity)
        for user_id in (maker.new.user_id, taker_id):
            self._fit_reducers(user_id, at, events)

    def _fit_reducers(self, user_id: int, at: int, events: list[AnyEvent]) -> None:
        """Shrink the user's reduce-only orders, newest first, to what there is to reduce."""
        excess = self.reductions.excess(user_id)
        while excess > 0:
            order = self.reductions.newest(user_id)
            cut = min(excess, order.remaining)
            if cut == order.remaining:
                events.append(_ended(Expired, order.new, cut, at, "REDUCE_ONLY"))
                self._remove(order)
            else:
                old = order.remaining
                self._lower(order, old - cut)
                events.append(_amended(order, at, order.price, old, "REDUCE_ONLY"))
            excess -= cut

    def _rest_reducing(self, new: New, quantity: int, at: int, events: list[AnyEvent]) -> None:
        """Let a reduce-only order rest, cut to what older ones leave of the position; it ends if that is nothing.

        It traded first: whoever wants out now comes before those who wait for a better price.
        """
        room = self.reductions.reducible(new.user_id, new.side) - self.reductions.lots(new.user_id)
        if room <= 0:
            events.append(_ended(Expired, new, quantity, at, "REDUCE_ONLY"))
            return
        new, quantity = _shrunk(new, quantity, room, at, events)
        self._rest(Order(new, new.price, quantity))
        events.append(Placed(at, new.order_id, new.user_id, new.side, new.price, quantity, reduce_only=True))

    # Deleveraging

    def _deleverage(self, command: Deleverage, events: list[AnyEvent]) -> None:
        if self.state != "TRADING" or command.price <= 0:
            return
        accounts, reducible = self.book.accounts, self.reductions.reducible
        user_id, side = command.user_id, command.side
        opposite: Side = "SELL" if side == "BUY" else "BUY"
        left = min(command.quantity, reducible(user_id, side))
        for counterparty in command.counterparties:
            lots = min(left, reducible(counterparty, opposite))
            if lots <= 0:
                continue
            left -= lots
            bought = lots if side == "BUY" else -lots
            accounts[user_id].position += bought
            accounts[counterparty].position -= bought
            events.append(
                Deleveraged(
                    at=command.at,
                    trade_id=(self.event_seq + len(events) + 1) * INSTRUMENTS_MAX + self._instrument_number,
                    price=command.price,
                    quantity=lots,
                    side=side,
                    user_id=user_id,
                    counterparty_user_id=counterparty,
                )
            )
            for reduced in (counterparty, user_id):
                self._fit_reducers(reduced, command.at, events)

    # Leaving and changing

    def _remove(self, order: Order) -> None:
        if order.new.reduce_only:
            self.reductions.remove(order, order.remaining)
        self.book.remove(order)

    def _lower(self, order: Order, remaining: int) -> None:
        """Take lots off a resting order, which keeps its place."""
        cut = order.remaining - remaining
        side = self.book.side(order.new.side)
        side.levels[order.price].lots -= cut
        _resize(order, remaining)
        if order.new.reduce_only:
            self.reductions.take(order, cut)

    def _cancel(self, command: Cancel, events: list[AnyEvent]) -> None:
        order = self.book.orders.get(command.order_id) or self.stops.orders.get(command.order_id)
        if order is not None and order.new.user_id == command.user_id:
            self._take_out(order, command.at, command.reason, events)

    def _cancel_all(self, command: CancelAll, events: list[AnyEvent]) -> None:
        account = self.book.accounts.get(command.user_id)
        waiting = self.stops.users.get(command.user_id, {})
        for order in [*(account.orders.values() if account else ()), *waiting.values()]:
            self._take_out(order, command.at, command.reason, events)

    def _cancel_replace(self, command: CancelReplace, events: list[AnyEvent]) -> None:
        new = command.order
        if new.order_id in self.book.orders or new.order_id in self.stops.orders:
            return
        old = self._order_of(new.user_id, command.cancel_order_id)
        if old is None:
            events.append(_ended(Rejected, new, new.quantity, command.at, "REPLACED_ORDER_NOT_FOUND"))
            return
        if self.state == "TRADING" and not _invalid(new):
            self._take_out(old, command.at, "REPLACED", events)
        self._new(new, command.at, events)

    def _order_of(self, user_id: int, order_id: int) -> Order | None:
        """The user's order of this id, resting or waiting."""
        order = self.book.orders.get(order_id) or self.stops.orders.get(order_id)
        return order if order is not None and order.new.user_id == user_id else None

    def _take_out(self, order: Order, at: int, reason: str, events: list[AnyEvent]) -> None:
        new = order.new
        order_id, reduces = new.order_id, new.reduce_only
        events.append(Cancelled(at, order_id, new.user_id, new.side, order.price, order.remaining, reason, reduces))
        if order_id in self.book.orders:
            if reduces:
                self.reductions.remove(order, order.remaining)
            self.book.remove(order)
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
        self._enter(amended.new, amended.remaining, command.at, Expired, events)

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
            self._enter(new, order.remaining, at, Expired, events)


def _invalid(new: New) -> bool:
    if new.type not in PLAIN and new.stop_price <= 0:
        return True
    if new.price <= 0 or new.quantity <= 0:
        return True
    return new.post_only and (new.type not in RESTING or new.time_in_force != "GTC")


def _ended(
    kind: type[Cancelled | Expired | Rejected], new: New, quantity: int, at: int, reason: str
) -> Cancelled | Expired | Rejected:
    return kind(at, new.order_id, new.user_id, new.side, new.price, quantity, reason, new.reduce_only)


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


def _shrunk(new: New, quantity: int, room: int, at: int, events: list[AnyEvent]) -> tuple[New, int]:
    """The terms and lots of a reduce-only order outside the book, cut to `room` if it is larger."""
    if quantity <= room:
        return new, quantity
    order = Order(new, new.price, quantity)
    _resize(order, room)
    events.append(_amended(order, at, new.price, quantity, "REDUCE_ONLY", was_resting=False, resting=False))
    return order.new, room

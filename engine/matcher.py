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
from domain.mark_price import MARK_AGE_MAX
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
    MoveMargin,
    New,
    Placed,
    Rejected,
    SetCover,
    SetState,
    SetTerms,
    Side,
    StateChanged,
    StopPlaced,
    Trade,
    TradingState,
    Triggered,
)
from domain.money import AMOUNT_STEP
from engine import openings
from engine.book import Account, Book, BookSide, Level, Order
from engine.fillable import fillable
from engine.guards import ONE, Guards, book_fill, move_margin, reducible, set_cover, set_terms
from engine.reductions import Reductions
from engine.stops import Stops, waits_for_rise

# A trade's id is its event's seq and its instrument's number: unique across instruments, and below 2^53 for
# the first 8.8 * 10^12 events of an instrument.
INSTRUMENTS_MAX = 1024
FEE_UNITS = 10**8
SNAPSHOT_VERSION = 3
# Version 2 had no guards; its users have no terms yet.
SNAPSHOT_VERSIONS = (2, SNAPSHOT_VERSION)
MARK_AGE_MAX_MS = int(MARK_AGE_MAX.total_seconds() * 1000)
PLAIN = frozenset({"LIMIT", "MARKET"})
RESTING = frozenset({"LIMIT", "STOP_LIMIT", "TAKE_PROFIT_LIMIT"})


class Guarded(msgspec.Struct, frozen=True, array_like=True):
    """What `engine.book.Account` keeps of a user with terms, or of one whose cover was told before them."""

    user_id: int
    leverage: int
    maintenance: int
    cross: bool
    # As text, since it may be beyond 64 bits.
    backing: str
    fill_seq: int
    cover: str = "0"
    # Below 0: in a snapshot of before.
    bids_backed: int = -1
    asks_backed: int = -1


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
    mark_ceiling: int = 0
    mark_live_until: int = 0
    guarded: list[Guarded] = []


class Matcher:
    """The book of one instrument and the rules that change it; `event_seq` is the seq of the last event given out.

    `last_price` and `mark_price` are 0 as long as there is none. Amended and shrunk reduce-only orders, stops and the
    like are told in `domain/matching.py`, with the command or event that is about them.
    """

    __slots__ = (
        "_amendment_backed",
        "_due",
        "_fees",
        "_folded",
        "_instrument_number",
        "book",
        "event_seq",
        "guards",
        "last_price",
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
        unit = instrument.tick_size * instrument.lot_size
        # Margin and entry notional are rounded to 8 decimals each.
        self.guards = Guards(-int(-instrument.taker_fee_rate * ONE // 1), -int(-2 * AMOUNT_STEP * ONE / unit // 1))
        self.last_price = 0
        self.event_seq = 0
        # Triggered orders that have not entered yet; empty between commands.
        self._due: deque[Order] = deque()
        # How many events of this command the accounts know of; what its amendment backs.
        self._folded, self._amendment_backed = 0, -1
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
                self.guards.mark,
                self.last_price,
                sorted((user_id, own.position) for user_id, own in self.book.accounts.items() if own.position),
                list(self.book.orders.values()),
                list(self.stops.orders.values()),
                self.guards.ceiling,
                self.guards.live_until,
                [
                    Guarded(
                        user_id,
                        own.leverage,
                        own.maintenance,
                        own.cross,
                        str(own.backing),
                        own.fill_seq,
                        str(own.cover),
                        own.bids_backed,
                        own.asks_backed,
                    )
                    for user_id, own in sorted(self.book.accounts.items(), key=lambda item: item[0])
                    if own.leverage or own.cover
                ],
            )
        )

    @classmethod
    def load(cls, instrument: Instrument, state: bytes) -> "Matcher":
        """The matcher that was dumped. Raises ValueError if `state` is malformed or of another version."""
        snapshot = msgspec.msgpack.decode(state, type=Snapshot)
        if snapshot.version not in SNAPSHOT_VERSIONS:
            raise ValueError(f"Expected a snapshot of version {SNAPSHOT_VERSION}, was {snapshot.version}")
        matcher = cls(instrument)
        matcher.event_seq = snapshot.event_seq
        matcher.state = snapshot.state
        matcher.guards.mark = snapshot.mark_price
        matcher.guards.ceiling = snapshot.mark_ceiling or snapshot.mark_price
        matcher.guards.live_until = snapshot.mark_live_until
        matcher.last_price = snapshot.last_price
        for user_id, position in snapshot.positions:
            matcher.book.accounts[user_id].position = position
        for kept in snapshot.guarded:
            account = matcher.book.accounts[kept.user_id]
            account.leverage, account.maintenance, account.cross = kept.leverage, kept.maintenance, kept.cross
            account.backing, account.fill_seq, account.cover = int(kept.backing), kept.fill_seq, int(kept.cover)
            matcher.guards.asked = matcher.guards.asked or account.leverage > 0
        for order in snapshot.resting:
            matcher._rest(order)
        for order in snapshot.waiting:
            matcher.stops.add(order)
        for kept in snapshot.guarded:
            account = matcher.book.accounts[kept.user_id]
            matcher._count_openings(kept.user_id)
            if kept.bids_backed >= 0:
                account.bids_backed, account.asks_backed = kept.bids_backed, kept.asks_backed
        return matcher

    def apply(self, command: AnyCommand) -> list[AnyEvent]:
        """Carry out one command. Its events, in order, have the seqs that follow the former `event_seq`."""
        events: list[AnyEvent] = []
        self._folded, self._amendment_backed = 0, -1
        # Not by `isinstance`, which takes long to say no to a class with a metaclass.
        if type(command) is New:
            self._new(command, command.at, events)
        elif type(command) is Cancel:
            self._cancel(command, events)
        else:
            self._apply_rare(command, events)
        if self._due or self.stops.orders:
            self._trigger(command.at, events)
        if self.guards.asked:
            self._fold(events)
        self.event_seq += len(events)
        return events

    @property
    def mark_price(self) -> int:
        """The mark, rounded down to a tick."""
        return self.guards.mark

    def _apply_rare(self, command: AnyCommand, events: list[AnyEvent]) -> None:
        if isinstance(command, MarkPrice):
            self._mark(command)
        elif isinstance(command, CancelAll):
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
        elif isinstance(command, SetTerms):
            self._set_terms(command)
        elif isinstance(command, SetCover):
            set_cover(self.book.accounts[command.user_id], command)
        elif isinstance(command, MoveMargin):
            move_margin(self.book.accounts[command.user_id], command.amount, command.after_seq)

    def _mark(self, command: MarkPrice) -> None:
        guards = self.guards
        if command.price > 0:
            guards.mark, guards.ceiling = command.price, command.ceiling or command.price
            guards.live_until = 0 if command.frozen else command.at + MARK_AGE_MAX_MS
            self._mark_reached()

    def _set_terms(self, terms: SetTerms) -> None:
        account = self.book.accounts[terms.user_id]
        if not account.leverage:
            self._count_openings(terms.user_id)
        set_terms(account, terms)

    def _count_openings(self, user_id: int) -> None:
        self.guards.asked = True
        account = self.book.accounts[user_id]
        openings.begin(account, [*account.orders.values(), *self.stops.users.get(user_id, {}).values()])

    def _fold(self, events: list[AnyEvent]) -> None:
        """Let the accounts know what has left and changed, as far as they do not yet."""
        accounts = self.book.accounts
        for event in events[self._folded :]:
            if isinstance(event, Cancelled | Expired | Rejected | Amended):
                account = accounts[event.user_id]
                if account.leverage:
                    openings.fold(account, event, self._amendment_backed)
        self._folded = len(events)

    def _admit(self, new: New) -> None:
        account = self.book.accounts[new.user_id]
        if account.leverage:
            openings.admit(account, new)

    # Entry

    def _new(self, new: New, at: int, events: list[AnyEvent]) -> None:
        order_id = new.order_id
        if order_id in self.book.orders or order_id in self.stops.orders:
            # The same command twice. An event would be about the order that is there, which is in good order.
            return
        if self.guards.asked:
            self._fold(events)
            self._admit(new)
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
        rises = waits_for_rise(new)
        price = self.last_price
        if new.working_type == "MARK":
            price = self.guards.mark if rises else self.guards.ceiling
        if price and (price >= new.stop_price if rises else price <= new.stop_price):
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
        book, price, buys = self.book, new.price, new.side == "BUY"
        opposite = book.asks if buys else book.bids
        best = opposite.best
        crosses = best is not None and (best.price <= price if buys else best.price >= price)
        guarded = book.accounts[new.user_id].leverage
        if self.guards.asked:
            self._fold(events)
        if guarded or new.post_only or new.reduce_only:
            refusal = self._entry_refusal(new, quantity, at, refused, crosses=crosses)
            if refusal:
                events.append(_ended(refused, new, quantity, at, refusal))
                return
        if new.reduce_only:
            room = self.reductions.reducible(new.user_id, new.side)
            new, quantity = _shrunk(new, quantity, room, at, events)
        time_in_force = new.time_in_force
        if time_in_force == "FOK" and not fillable(new, quantity, book, opposite, self.reductions, self.guards):
            events.append(_ended(Expired, new, quantity, at, "FOK_NOT_FILLABLE"))
            return

        if crosses:
            quantity = self._match(new, quantity, at, opposite, events)
            if not quantity:
                return
            if guarded and self._is_stopped(new, opposite):
                events.append(_ended(Expired, new, quantity, at, "MARGIN_AT_MARK"))
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

    def _entry_refusal(
        self, new: New, quantity: int, at: int, refused: type[Rejected | Expired], *, crosses: bool
    ) -> str:
        """Why an order may not enter; empty if it may."""
        if crosses and new.post_only:
            return "POST_ONLY_WOULD_CROSS"
        account = self.book.accounts[new.user_id]
        closing = reducible(account, new.side)
        if new.reduce_only:
            return "" if closing else "REDUCE_ONLY_REJECTED" if refused is Rejected else "REDUCE_ONLY"
        if account.leverage and quantity > closing and at > self.guards.live_until:
            return "MARK_PRICE_UNAVAILABLE"
        return ""

    def _is_stopped(self, new: New, opposite: BookSide) -> bool:
        """Whether somebody is left whom only its guard kept the order from trading with."""
        best = opposite.best
        return best is not None and best.key <= opposite.sign * new.price

    def _rest(self, order: Order) -> None:
        self.book.add(order)
        if order.new.reduce_only:
            self.reductions.add(order)

    # Matching

    def _match(self, new: New, remaining: int, at: int, opposite: BookSide, events: list[AnyEvent]) -> int:
        """Trade with the opposite side up to the limit; the lots that remain, 0 if the order has ended."""
        side, user_id, order_id, limit = new.side, new.user_id, new.order_id, new.price
        liquidation, reduces, buys = new.liquidation, new.reduce_only, side == "BUY"
        accounts, reducing = self.book.accounts, self.reductions.users
        maker_units, taker_units, per = self._fees
        trade_id = self.event_seq * INSTRUMENTS_MAX + self._instrument_number
        taker = accounts[user_id]
        guarded = taker.leverage and not liquidation
        while (level := opposite.best) is not None:
            price, queue = level.price, level.queue
            # How many lots the taker's guard allows at this price.
            phase = self.guards.lots(taker, new, price, remaining) if guarded else remaining
            if not phase or (buys and price > limit) or (not buys and price < limit):
                return remaining
            while level.lots and phase:
                maker = queue[0] if queue[0].remaining else level.first()
                maker_new = maker.new
                account = accounts[maker_new.user_id]
                if account is taker:
                    if self._prevented(maker, new, remaining, at, events):
                        return 0
                    continue
                quantity = maker.remaining if maker.remaining < phase else phase
                covers: tuple[int, ...] = ()
                if account.leverage or taker.leverage:
                    self._fold(events)
                    quantity, covers = self._guarded(maker, account, taker, new, price, quantity)
                    if not quantity:
                        self._take_out(maker, at, "MARGIN_AT_MARK", events)
                        continue
                remaining -= quantity
                phase -= quantity
                open_lots = maker.remaining - quantity
                level.lots -= quantity
                maker_fee, taker_fee = price * quantity * maker_units, price * quantity * taker_units
                events.append(
                    Trade(
                        at,
                        trade_id + (len(events) + 1) * INSTRUMENTS_MAX,
                        price,
                        quantity,
                        side,
                        maker_new.order_id,
                        maker_new.user_id,
                        open_lots,
                        maker_fee if per == 1 else -(-maker_fee // per),
                        order_id,
                        user_id,
                        remaining,
                        taker_fee if per == 1 else -(-taker_fee // per),
                        limit,
                        liquidation,
                        maker_new.reduce_only,
                        reduces,
                    )
                )
                self.last_price = price
                bought = quantity if buys else -quantity
                taker.position += bought
                account.position -= bought
                if covers:
                    self._back(taker, bought, new, account, maker_new, covers, events)
                maker.remaining = open_lots
                if not open_lots:
                    self._maker_filled(level, maker, account, opposite, at, events)
                if reducing:
                    self._position_changed(maker, open_lots, quantity, user_id, at, events)
                if guarded and phase:
                    # What backs the rest was rounded, and what has become due does not grow.
                    phase = self.guards.lots(taker, new, price, remaining)
            if not remaining:
                events.append(Filled(at, order_id, user_id))
                return 0
        return remaining

    def _maker_filled(
        self, level: Level, maker: Order, account: Account, opposite: BookSide, at: int, events: list[AnyEvent]
    ) -> None:
        """Take the first order of a level out, of which nothing remains."""
        order_id = maker.new.order_id
        level.queue.popleft()
        del self.book.orders[order_id], account.orders[order_id]
        events.append(Filled(at, order_id, maker.new.user_id))
        if not level.lots:
            opposite.emptied(level)

    # Guards

    def _guarded(
        self, maker: Order, account: Account, taker: Account, new: New, price: int, quantity: int
    ) -> tuple[int, tuple[int, ...]]:
        """How many of `quantity` lots the maker's guard allows, and what the trade tells of the guards of both sides:
        the last fields of `Trade`."""
        terms, guards = maker.new, self.guards
        if account.leverage:
            quantity = guards.lots(account, terms, price, quantity)
        maker_opens = quantity > reducible(account, terms.side)
        taker_opens = quantity > reducible(taker, new.side)
        return quantity, (
            terms.basis,
            new.basis,
            terms.loss,
            new.loss,
            guards.open_loss(account, terms, price) if maker_opens else 0,
            guards.open_loss(taker, new, price) if taker_opens else 0,
            account.leverage,
            taker.leverage,
            guards.mark,
        )

    def _back(
        self,
        taker: Account,
        bought: int,
        new: New,
        maker: Account,
        maker_new: New,
        covers: tuple[int, ...],
        events: list[AnyEvent],
    ) -> None:
        """Let the trade that was written last tell of the guards, and fold it into what backs the positions of both
        sides."""
        plain = events.pop()
        assert isinstance(plain, Trade)
        trade = Trade(*structs.astuple(plain)[: -len(covers)], *covers)
        events.append(trade)
        seq, price = self.event_seq + len(events), trade.price
        for account, lots, terms, open_loss in (
            (taker, bought, new, trade.taker_open_loss),
            (maker, -bought, maker_new, trade.maker_open_loss),
        ):
            if account.leverage:
                openings.filled(account, lots, reduces=terms.reduce_only)
                basis = terms.basis or terms.price
                book_fill(self.guards, account, lots, price, basis, open_loss, seq, terms.loss)

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
                before = Order(order.new, order.price, order.remaining)
                self._lower(order, before.remaining - cut)
                events.append(_amended(order, at, before, "REDUCE_ONLY"))
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
            for account, lots_bought in ((accounts[user_id], bought), (accounts[counterparty], -bought)):
                account.position += lots_bought
                if account.leverage:
                    # Nothing for `openings`: a position that shrinks takes no backing away.
                    seq = self.event_seq + len(events) + 1
                    book_fill(self.guards, account, lots_bought, command.price, 0, 0, seq, free_of_fee=True)
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
            self._admit(new)
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
        events.append(
            Cancelled(
                at, order_id, new.user_id, new.side, order.price, order.remaining, reason, reduces, new.basis, new.loss
            )
        )
        if order_id in self.book.orders:
            if reduces:
                self.reductions.remove(order, order.remaining)
            self.book.remove(order)
        else:
            self.stops.remove(order)

    def _amend(self, command: Amend, events: list[AnyEvent]) -> None:
        self._amendment_backed = command.backed
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
        terms = structs.replace(new, price=price, quantity=total, basis=command.basis, loss=command.loss)
        remaining = total - (new.quantity - order.remaining)
        if command.order_id in self.book.orders:
            self._amend_resting(order, terms, remaining, command, events)
        else:
            before = Order(new, order.price, order.remaining)
            order.new, order.price, order.remaining = terms, price, remaining
            events.append(_amended_by(command, order, before, was_resting=False, resting=False))

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
        before = Order(order.new, order.price, order.remaining)
        amended = Order(terms, terms.price, remaining)
        if terms.reduce_only:
            # Room beside the user's other orders; never less than this one has already.
            reductions = self.reductions
            room = reductions.reducible(terms.user_id, terms.side) - reductions.lots(terms.user_id) + before.remaining
            if remaining > room:
                _resize(amended, room)
        if amended.price == before.price and amended.remaining <= before.remaining:
            self._lower(order, amended.remaining)
            order.new = structs.replace(order.new, basis=terms.basis, loss=terms.loss)
            events.append(_amended_by(command, order, before))
            return
        self._remove(order)
        events.append(_amended_by(command, amended, before, resting=False))
        self._enter(amended.new, amended.remaining, command.at, Expired, events)

    # Stops

    def _mark_reached(self) -> None:
        if self.state == "TRADING" and self.guards.mark:
            self._due += self.stops.reached("MARK", self.guards.mark, self.guards.ceiling)

    def _trigger(self, at: int, events: list[AnyEvent]) -> None:
        """Let triggered orders enter, one after the other. Those that their trades trigger in turn queue up behind."""
        due, seen = self._due, 0
        while True:
            if self.stops.await_last():
                for event in events[seen:]:
                    if isinstance(event, Trade):
                        due += self.stops.reached("LAST", event.price, event.price)
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
            self._enter(self._protected(new), order.remaining, at, Expired, events)

    def _protected(self, new: New) -> New:
        """A triggered order without a limit, at the protection price that the mark of this moment gives it."""
        if not new.protection or not self.guards.mark:
            return new
        if new.side == "BUY":
            price = self.guards.mark * (ONE + new.protection) // ONE
        else:
            price = max(1, -(-self.guards.ceiling * (ONE - new.protection) // ONE))
        return structs.replace(new, price=price, basis=new.basis or new.price)


def _invalid(new: New) -> bool:
    if new.type not in PLAIN and new.stop_price <= 0:
        return True
    if new.price <= 0 or new.quantity <= 0:
        return True
    return new.post_only and (new.type not in RESTING or new.time_in_force != "GTC")


def _ended(
    kind: type[Cancelled | Expired | Rejected], new: New, quantity: int, at: int, reason: str
) -> Cancelled | Expired | Rejected:
    return kind(
        at, new.order_id, new.user_id, new.side, new.price, quantity, reason, new.reduce_only, new.basis, new.loss
    )


def _amended(
    order: Order,
    at: int,
    before: Order,
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
        old_price=before.price,
        old_quantity=before.remaining,
        reason=reason,
        reduce_only=new.reduce_only,
        was_resting=was_resting,
        resting=resting,
        amendment_id=amendment_id,
        basis=new.basis,
        loss=new.loss,
        old_basis=before.new.basis,
        old_loss=before.new.loss,
    )


def _amended_by(
    command: Amend, order: Order, before: Order, *, was_resting: bool = True, resting: bool = True
) -> Amended:
    return _amended(
        order,
        command.at,
        before,
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
    before = Order(new, new.price, quantity)
    events.append(_amended(order, at, before, "REDUCE_ONLY", was_resting=False, resting=False))
    return order.new, room

"""The matching rules of one instrument: a command in, its events out.

Pure: no I/O, clock, randomness or floats. The same commands give the same events, byte for byte, on any machine.
Prices are ticks, quantities lots, fees 1e-8 quote.
"""

from fractions import Fraction

import msgspec

from domain.instruments import Instrument
from domain.matching import (
    AnyCommand,
    AnyEvent,
    Cancel,
    CancelAll,
    Cancelled,
    Expired,
    Filled,
    New,
    Placed,
    Rejected,
    Trade,
)
from engine.book import Book, BookSide, Order

# A trade's id is its event's seq and its instrument's number: unique across instruments, and below 2^53 for
# the first 8.8 * 10^12 events of an instrument.
INSTRUMENTS_MAX = 1024
FEE_UNITS = 10**8


SNAPSHOT_VERSION = 1


class Snapshot(msgspec.Struct, frozen=True, array_like=True):
    """All that a matcher knows. `orders` are (order id, user id, is bid, price, remaining) in order of entry."""

    version: int
    event_seq: int
    orders: list[tuple[int, int, bool, int, int]]


class Matcher:
    """The book of one instrument and the rules that change it; `event_seq` is the seq of the last event given out."""

    __slots__ = ("_instrument_number", "_maker_fee", "_taker_fee", "book", "event_seq")

    def __init__(self, instrument: Instrument) -> None:
        assert 0 <= instrument.number < INSTRUMENTS_MAX, f"Expected a number below {INSTRUMENTS_MAX}, was {instrument}"
        self.book = Book()
        self.event_seq = 0
        self._instrument_number = instrument.number
        # Fee units per tick and lot as numerator and denominator: fees are exact with integers alone.
        notional_units = Fraction(instrument.tick_size) * Fraction(instrument.lot_size) * FEE_UNITS
        self._maker_fee = (notional_units * Fraction(instrument.maker_fee_rate)).as_integer_ratio()
        self._taker_fee = (notional_units * Fraction(instrument.taker_fee_rate)).as_integer_ratio()

    def dump(self) -> bytes:
        """The complete state: `load` of it goes on exactly as this matcher would."""
        orders = [
            (order.order_id, order.user_id, order.level.side is self.book.bids, order.level.price, order.remaining)
            for order in self.book.orders.values()
        ]
        return msgspec.msgpack.encode(Snapshot(SNAPSHOT_VERSION, self.event_seq, orders))

    @classmethod
    def load(cls, instrument: Instrument, state: bytes) -> "Matcher":
        """The matcher that was dumped. Raises ValueError if `state` is malformed or of another version."""
        snapshot = msgspec.msgpack.decode(state, type=Snapshot)
        if snapshot.version != SNAPSHOT_VERSION:
            raise ValueError(f"Expected a snapshot of version {SNAPSHOT_VERSION}, was {snapshot.version}")
        matcher = cls(instrument)
        matcher.event_seq = snapshot.event_seq
        book = matcher.book
        for order_id, user_id, is_bid, price, remaining in snapshot.orders:
            book.add(book.bids if is_bid else book.asks, price, order_id, user_id, remaining)
        return matcher

    def apply(self, command: AnyCommand) -> list[AnyEvent]:
        """Carry out one command. Its events, in order, have the seqs that follow the former `event_seq`."""
        events: list[AnyEvent] = []
        if isinstance(command, New):
            self._enter(command, events)
        elif isinstance(command, Cancel):
            self._cancel(command, events)
        else:
            self._cancel_all(command, events)
        self.event_seq += len(events)
        return events

    def _enter(self, taker: New, events: list[AnyEvent]) -> None:
        book = self.book
        if taker.order_id in book.orders:
            # The same command twice. An event would be about the order that rests there, which is in good order.
            return
        if taker.price <= 0 or taker.quantity <= 0:
            events.append(_ended(Rejected, taker, taker.quantity, "INVALID_ORDER"))
            return
        if taker.side == "BUY":
            side, opposite, limit_key = book.bids, book.asks, taker.price
        else:
            side, opposite, limit_key = book.asks, book.bids, -taker.price

        if taker.time_in_force == "FOK" and not self._fillable(taker, opposite, limit_key):
            events.append(_ended(Expired, taker, taker.quantity, "FOK_NOT_FILLABLE"))
            return
        remaining, self_trade = taker.quantity, False
        best = opposite.best
        if best is not None and best.key <= limit_key:
            remaining, self_trade = self._match(taker, opposite, limit_key, events)

        if not remaining:
            events.append(Filled(at=taker.at, order_id=taker.order_id, user_id=taker.user_id))
        elif self_trade:
            events.append(_ended(Expired, taker, remaining, "SELF_TRADE"))
        elif taker.type == "MARKET":
            reason = "NO_LIQUIDITY" if opposite.best is None else "PROTECTION_PRICE"
            events.append(_ended(Expired, taker, remaining, reason))
        elif taker.time_in_force == "GTC":
            book.add(side, taker.price, taker.order_id, taker.user_id, remaining)
            events.append(
                Placed(
                    at=taker.at,
                    order_id=taker.order_id,
                    user_id=taker.user_id,
                    side=taker.side,
                    price=taker.price,
                    quantity=remaining,
                )
            )
        else:
            events.append(_ended(Expired, taker, remaining, "IOC"))

    def _match(self, taker: New, opposite: BookSide, limit_key: int, events: list[AnyEvent]) -> tuple[int, bool]:
        """Trade with the opposite side up to the limit: what remains, and whether self-trade prevention ended it."""
        book = self.book
        at, side, user_id, order_id = taker.at, taker.side, taker.user_id, taker.order_id
        maker_units, maker_per = self._maker_fee
        taker_units, taker_per = self._taker_fee
        number = self._instrument_number
        base_seq = self.event_seq + 1
        remaining = taker.quantity
        level = opposite.best
        while level is not None and level.key <= limit_key:
            maker = level.first
            assert maker is not None, f"Expected orders at {level.price}, was none"
            if maker.user_id == user_id:
                if taker.stp_mode != "EXPIRE_TAKER":
                    events.append(_ended_resting(Expired, maker, at, "SELF_TRADE"))
                    book.remove(maker)
                if taker.stp_mode != "EXPIRE_MAKER":
                    return remaining, True
                level = opposite.best
                continue
            price, maker_remaining = level.price, maker.remaining
            quantity = remaining if remaining < maker_remaining else maker_remaining
            remaining -= quantity
            maker_remaining -= quantity
            notional = price * quantity
            events.append(
                Trade(
                    at=at,
                    trade_id=(base_seq + len(events)) * INSTRUMENTS_MAX + number,
                    price=price,
                    quantity=quantity,
                    taker_side=side,
                    maker_order_id=maker.order_id,
                    maker_user_id=maker.user_id,
                    maker_remaining=maker_remaining,
                    maker_fee=-(-notional * maker_units // maker_per),
                    taker_order_id=order_id,
                    taker_user_id=user_id,
                    taker_remaining=remaining,
                    taker_fee=-(-notional * taker_units // taker_per),
                    taker_price=taker.price,
                    taker_liquidation=taker.liquidation,
                )
            )
            if maker_remaining:
                maker.remaining = maker_remaining
                level.lots -= quantity
                return 0, False
            book.remove(maker)
            events.append(Filled(at=at, order_id=maker.order_id, user_id=maker.user_id))
            if not remaining:
                return 0, False
            level = opposite.best
        return remaining, False

    def _fillable(self, taker: New, opposite: BookSide, limit_key: int) -> bool:
        """Whether the whole quantity would trade at once, self-trade prevention considered."""
        wanted, user_id = taker.quantity, taker.user_id
        has_own = user_id in self.book.users
        for level in opposite.within(limit_key):
            if not has_own:
                wanted -= level.lots
            else:
                for maker in level:
                    if maker.user_id != user_id:
                        wanted -= maker.remaining
                    elif wanted > 0 and taker.stp_mode != "EXPIRE_MAKER":
                        return False
            if wanted <= 0:
                return True
        return False

    def _cancel(self, command: Cancel, events: list[AnyEvent]) -> None:
        order = self.book.orders.get(command.order_id)
        if order is not None and order.user_id == command.user_id:
            self._take_out(order, command, events)

    def _cancel_all(self, command: CancelAll, events: list[AnyEvent]) -> None:
        for order in list(self.book.users.get(command.user_id, {}).values()):
            self._take_out(order, command, events)

    def _take_out(self, order: Order, command: Cancel | CancelAll, events: list[AnyEvent]) -> None:
        events.append(_ended_resting(Cancelled, order, command.at, command.reason))
        self.book.remove(order)


def _ended(kind: type[Expired | Rejected], order: New, quantity: int, reason: str) -> Expired | Rejected:
    return kind(
        at=order.at,
        order_id=order.order_id,
        user_id=order.user_id,
        side=order.side,
        price=order.price,
        quantity=quantity,
        reason=reason,
    )


def _ended_resting(kind: type[Expired | Cancelled], order: Order, at: int, reason: str) -> Expired | Cancelled:
    level = order.level
    return kind(
        at=at,
        order_id=order.order_id,
        user_id=order.user_id,
        side=level.side.name,
        price=level.price,
        quantity=order.remaining,
        reason=reason,
    )

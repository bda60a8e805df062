"""The oracle of the engine: the matching rules said as plainly as can be. Lists, linear scans, exact fractions."""

import copy
from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from typing import Any

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
    Triggered,
    WorkingType,
)


@dataclass
class Live:
    """An order that has not ended; those in a list stand in order of entry."""

    new: New
    price: int
    remaining: int
    filled: int = 0

    @property
    def terms(self) -> dict[str, Any]:
        """What nearly every event about an order says."""
        return {
            "order_id": self.new.order_id,
            "user_id": self.new.user_id,
            "side": self.new.side,
            "price": self.price,
            "quantity": self.remaining,
            "reduce_only": self.new.reduce_only,
        }


class ReferenceMatcher:
    """Same commands in, same events out as `engine.matcher.Matcher`, slowly."""

    def __init__(self, instrument: Instrument) -> None:
        self.instrument = instrument
        self.resting: list[Live] = []
        self.waiting: list[Live] = []
        self.due: list[Live] = []
        self.positions: dict[int, int] = {}
        self.prices: dict[WorkingType, int] = {"MARK": 0, "LAST": 0}
        self.state = "TRADING"
        self.event_seq = 0
        self.events: list[AnyEvent] = []
        self.at = 0

    def apply(self, command: AnyCommand) -> list[AnyEvent]:
        self.events, self.at = [], command.at
        match command:
            case New():
                self._new(command)
            case Cancel() | CancelAll():
                self._cancel(command)
            case Amend():
                self._amend(command)
            case CancelReplace():
                self._cancel_replace(command)
            case Deleverage():
                self._deleverage(command)
            case SetState():
                if command.state != self.state:
                    self.state = command.state
                    self.events.append(StateChanged(at=self.at, state=command.state))
                    self._reached("MARK")
            case MarkPrice():
                if command.price > 0:
                    self.prices["MARK"] = command.price
                    self._reached("MARK")
        while self.due:
            order = self.due.pop(0)
            self.events.append(Triggered(at=self.at, **order.terms))
            self._enter(order, triggered=True)
        self.event_seq += len(self.events)
        return self.events

    def queue(self, side: Side) -> list[Live]:
        """The orders of one side, best price first, then first come."""
        orders = [order for order in self.resting if order.new.side == side]
        return sorted(orders, key=lambda order: -order.price if side == "BUY" else order.price)

    def depth(self, side: Side) -> list[tuple[int, int]]:
        """(price, lots) per price of one side, best first."""
        lots: dict[int, int] = {}
        for order in self.queue(side):
            lots[order.price] = lots.get(order.price, 0) + order.remaining
        return list(lots.items())

    def _live(self, order_id: int) -> list[Live]:
        return [order for order in self.resting + self.waiting if order.new.order_id == order_id]

    def _end(self, kind: type[Cancelled | Expired | Rejected], order: Live, reason: str) -> None:
        self.events.append(kind(at=self.at, **order.terms, reason=reason))

    def _leave(self, order: Live) -> None:
        # By identity: equal orders are not the same order.
        self.resting = [other for other in self.resting if other is not order]
        self.waiting = [other for other in self.waiting if other is not order]

    # Commands

    def _new(self, new: New) -> None:
        if self._live(new.order_id):
            return
        order = Live(new, new.price, new.quantity)
        if self.state != "TRADING":
            self._end(Rejected, order, "INSTRUMENT_NOT_TRADING")
        elif not _sensible(new):
            self._end(Rejected, order, "INVALID_ORDER")
        elif new.type in ("LIMIT", "MARKET"):
            self._enter(order)
        elif self._is_reached(order, self.prices[new.working_type]):
            self.due.append(order)
        else:
            self.waiting.append(order)
            placed = StopPlaced(at=self.at, **order.terms, stop_price=new.stop_price, working_type=new.working_type)
            self.events.append(placed)

    def _cancel(self, command: Cancel | CancelAll) -> None:
        for order in self.resting + self.waiting:
            is_meant = isinstance(command, CancelAll) or order.new.order_id == command.order_id
            if is_meant and order.new.user_id == command.user_id:
                self._end(Cancelled, order, command.reason)
                self._leave(order)

    def _cancel_replace(self, command: CancelReplace) -> None:
        new = command.order
        if self._live(new.order_id):
            return
        old = [order for order in self._live(command.cancel_order_id) if order.new.user_id == new.user_id]
        if not old:
            self._end(Rejected, Live(new, new.price, new.quantity), "REPLACED_ORDER_NOT_FOUND")
        else:
            if self.state == "TRADING" and _sensible(new):
                self._end(Cancelled, old[0], "REPLACED")
                self._leave(old[0])
            self._new(new)

    def _deleverage(self, command: Deleverage) -> None:
        if self.state != "TRADING" or command.price <= 0:
            return
        sign = 1 if command.side == "BUY" else -1
        wanted = command.quantity
        for giver in command.counterparties:
            against, own = sign * self.positions.get(giver, 0), -sign * self.positions.get(command.user_id, 0)
            lots = min(wanted, against, own)
            if lots > 0:
                wanted -= lots
                self.positions[command.user_id] += sign * lots
                self.positions[giver] -= sign * lots
                self.events.append(
                    Deleveraged(
                        at=self.at,
                        trade_id=(self.event_seq + len(self.events) + 1) * 1024 + self.instrument.number,
                        price=command.price,
                        quantity=lots,
                        side=command.side,
                        user_id=command.user_id,
                        counterparty_user_id=giver,
                    )
                )
                self._position_changed(giver)
                self._position_changed(command.user_id)

    def _amend(self, command: Amend) -> None:
        who = {"order_id": command.order_id, "user_id": command.user_id, "amendment_id": command.amendment_id}
        own = [order for order in self._live(command.order_id) if order.new.user_id == command.user_id]
        if not own:
            self.events.append(AmendRejected(at=self.at, reason="ORDER_NOT_FOUND", **who))
        for order in own:
            price = order.price if command.price is None else command.price
            quantity = order.filled + order.remaining if command.quantity is None else command.quantity
            reason = self._amend_refusal(order, price, quantity)
            if reason:
                self.events.append(AmendRejected(at=self.at, reason=reason, **who))
            else:
                self._amend_to(order, price, quantity - order.filled, command.amendment_id)

    def _amend_refusal(self, order: Live, price: int, quantity: int) -> str:
        if self.state != "TRADING":
            return "INSTRUMENT_NOT_TRADING"
        if price <= 0 or quantity <= 0:
            return "INVALID_ORDER"
        if quantity <= order.filled:
            return "QUANTITY_ALREADY_FILLED"
        if order.new.post_only and order in self.resting and self._would_cross(order.new.side, price):
            return "POST_ONLY_WOULD_CROSS"
        return ""

    def _amend_to(self, order: Live, price: int, quantity: int, amendment_id: int) -> None:
        rests = any(other is order for other in self.resting)
        if rests and order.new.reduce_only:
            others = sum(other.remaining for other in self._reducing(order.new.user_id)) - order.remaining
            quantity = min(quantity, self._reducible(order) - others)
        keeps_place = rests and price == order.price and quantity <= order.remaining
        old_price, old_quantity = order.price, order.remaining
        order.price, order.remaining = price, quantity
        self._amended(
            order,
            old_price,
            old_quantity,
            "USER_REQUEST",
            was_resting=rests,
            resting=keeps_place,
            amendment_id=amendment_id,
        )
        if rests and not keeps_place:
            self._leave(order)
            self._enter(order, triggered=True)

    def _amended(
        self,
        order: Live,
        old_price: int,
        old_quantity: int,
        reason: str,
        *,
        was_resting: bool,
        resting: bool,
        amendment_id: int = 0,
    ) -> None:
        self.events.append(
            Amended(
                at=self.at,
                **order.terms,
                old_price=old_price,
                old_quantity=old_quantity,
                reason=reason,
                was_resting=was_resting,
                resting=resting,
                amendment_id=amendment_id,
            )
        )

    # Triggers

    def _is_reached(self, order: Live, price: int) -> bool:
        if price == 0:
            return False
        return price >= order.new.stop_price if _rising(order.new) else price <= order.new.stop_price

    def _reached(self, kind: WorkingType) -> None:
        if self.state != "TRADING":
            return
        price = self.prices[kind]
        reached = [order for order in self.waiting if order.new.working_type == kind and self._is_reached(order, price)]
        rising = sorted((o for o in reached if _rising(o.new)), key=lambda order: order.new.stop_price)
        falling = sorted((o for o in reached if not _rising(o.new)), key=lambda order: -order.new.stop_price)
        for order in rising + falling:
            self._leave(order)
            self.due.append(order)

    # Entry

    def _enter(self, order: Live, triggered: bool = False) -> None:
        new, refused = order.new, Expired if triggered else Rejected
        opposite: Side = "SELL" if new.side == "BUY" else "BUY"
        if new.post_only and self._would_cross(new.side, order.price):
            self._end(refused, order, "POST_ONLY_WOULD_CROSS")
            return
        if new.reduce_only:
            if self._reducible(order) == 0:
                self._end(refused, order, "REDUCE_ONLY" if triggered else "REDUCE_ONLY_REJECTED")
                return
            self._cut(order, self._reducible(order), rests=False)
        if new.time_in_force == "FOK" and not self._would_fill(order):
            self._end(Expired, order, "FOK_NOT_FILLABLE")
            return
        first = len(self.events)
        self_trade = self._match(order)
        if order.remaining == 0:
            self.events.append(Filled(at=self.at, order_id=new.order_id, user_id=new.user_id))
        elif self_trade:
            self._end(Expired, order, "SELF_TRADE")
        elif new.type.endswith("MARKET"):
            self._end(Expired, order, "PROTECTION_PRICE" if self.queue(opposite) else "NO_LIQUIDITY")
        elif new.time_in_force != "GTC":
            self._end(Expired, order, "IOC")
        else:
            self._rest(order)
        for event in self.events[first:]:
            if isinstance(event, Trade):
                self.prices["LAST"] = event.price
                self._reached("LAST")

    def _rest(self, order: Live) -> None:
        if order.new.reduce_only:
            room = self._reducible(order) - sum(other.remaining for other in self._reducing(order.new.user_id))
            if room <= 0:
                self._end(Expired, order, "REDUCE_ONLY")
                return
            self._cut(order, room, rests=False)
        self.resting.append(order)
        self.events.append(Placed(at=self.at, **order.terms))

    def _would_cross(self, side: Side, price: int) -> bool:
        if side == "BUY":
            return any(order.price <= price for order in self.queue("SELL"))
        return any(order.price >= price for order in self.queue("BUY"))

    def _would_fill(self, order: Live) -> bool:
        """A fill-or-kill order is filled if an immediate-or-cancel order in its place would be, in full."""
        trial, trial_order = copy.deepcopy((self, order))
        trial._match(trial_order)
        return trial_order.remaining == 0

    # Matching

    def _match(self, taker: Live) -> bool:
        side, user_id = taker.new.side, taker.new.user_id
        while taker.remaining and self._would_cross(side, taker.price):
            maker = self.queue("SELL" if side == "BUY" else "BUY")[0]
            if maker.new.user_id != user_id:
                self._trade(taker, maker)
                self._position_changed(maker.new.user_id)
                self._position_changed(user_id)
                continue
            if taker.new.stp_mode in ("EXPIRE_MAKER", "EXPIRE_BOTH"):
                self._end(Expired, maker, "SELF_TRADE")
                self._leave(maker)
            if taker.new.stp_mode in ("EXPIRE_TAKER", "EXPIRE_BOTH"):
                return True
        return False

    def _trade(self, taker: Live, maker: Live) -> None:
        quantity = min(taker.remaining, maker.remaining)
        taker.remaining -= quantity
        maker.remaining -= quantity
        for order in (taker, maker):
            order.filled += quantity
            change = quantity if order.new.side == "BUY" else -quantity
            self.positions[order.new.user_id] = self.positions.get(order.new.user_id, 0) + change
        instrument = self.instrument
        # Quote, exact.
        notional = maker.price * Fraction(instrument.tick_size) * quantity * Fraction(instrument.lot_size)
        self.events.append(
            Trade(
                at=self.at,
                trade_id=(self.event_seq + len(self.events) + 1) * 1024 + instrument.number,
                price=maker.price,
                quantity=quantity,
                taker_side=taker.new.side,
                maker_order_id=maker.new.order_id,
                maker_user_id=maker.new.user_id,
                maker_remaining=maker.remaining,
                maker_fee=ceil(notional * Fraction(instrument.maker_fee_rate) * 10**8),
                taker_order_id=taker.new.order_id,
                taker_user_id=taker.new.user_id,
                taker_remaining=taker.remaining,
                taker_fee=ceil(notional * Fraction(instrument.taker_fee_rate) * 10**8),
                taker_price=taker.price,
                taker_liquidation=taker.new.liquidation,
                maker_reduce_only=maker.new.reduce_only,
                taker_reduce_only=taker.new.reduce_only,
            )
        )
        if maker.remaining == 0:
            self._leave(maker)
            self.events.append(Filled(at=self.at, order_id=maker.new.order_id, user_id=maker.new.user_id))

    # Reduce-only

    def _reducing(self, user_id: int) -> list[Live]:
        return [order for order in self.resting if order.new.reduce_only and order.new.user_id == user_id]

    def _reducible(self, order: Live) -> int:
        position = self.positions.get(order.new.user_id, 0)
        return max(0, -position if order.new.side == "BUY" else position)

    def _position_changed(self, user_id: int) -> None:
        """The newest give way until the rest fits the position."""
        for order in reversed(self._reducing(user_id)):
            excess = sum(other.remaining for other in self._reducing(user_id)) - self._reducible(order)
            if excess >= order.remaining:
                self._end(Expired, order, "REDUCE_ONLY")
                self._leave(order)
            elif excess > 0:
                self._cut(order, order.remaining - excess, rests=True)

    def _cut(self, order: Live, room: int, *, rests: bool) -> None:
        old = order.remaining
        if old > room:
            order.remaining = room
            self._amended(order, order.price, old, "REDUCE_ONLY", was_resting=rests, resting=rests)


def _rising(new: New) -> bool:
    return (new.type in ("STOP_LIMIT", "STOP_MARKET")) == (new.side == "BUY")


def _sensible(new: New) -> bool:
    if new.post_only and (new.type.endswith("MARKET") or new.time_in_force != "GTC"):
        return False
    is_stop = new.type not in ("LIMIT", "MARKET")
    return new.price > 0 and new.quantity > 0 and (new.stop_price > 0 or not is_stop)

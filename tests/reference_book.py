"""The oracle of the engine: the matching rules said as plainly as can be. Lists, linear scans, exact fractions."""

import copy

from msgspec.structs import replace

from domain.instruments import Instrument
from domain.matching import (
    Amend,
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
    Triggered,
    WorkingType,
)
from tests.reference_fillable import would_fill
from tests.reference_guards import ReferenceGuards
from tests.reference_openings import ReferenceOpenings
from tests.reference_orders import Live, amended, is_rising, is_sensible, trade, trade_id


class ReferenceMatcher:
    """Same commands in, same events out as `engine.matcher.Matcher`, slowly."""

    def __init__(self, instrument: Instrument) -> None:
        self.instrument = instrument
        self.resting: list[Live] = []
        self.waiting: list[Live] = []
        self.due: list[Live] = []
        # The order that enters just now, which stands nowhere else.
        self.entering: list[Live] = []
        self.guards = ReferenceGuards(instrument)
        self.openings = ReferenceOpenings(self.guards)
        self.last_price = 0
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
                    self.guards.hear_mark(command)
                    self._reached("MARK")
            case SetTerms():
                is_new = not self.guards.holders[command.user_id].leverage
                self.guards.set_terms(command)
                if is_new:
                    self.openings.begin(command.user_id, self.open())
            case SetCover():
                self.guards.set_cover(command)
            case MoveMargin():
                self.guards.move_margin(command)
        while self.due:
            order = self.due[0]
            self.events.append(Triggered(at=self.at, **order.terms))
            self._protect(order)
            self._enter(order, triggered=True)
        self.event_seq += len(self.events)
        return self.events

    @property
    def positions(self) -> dict[int, int]:
        """Lots by user, above zero for long."""
        return {user_id: holder.position for user_id, holder in self.guards.holders.items()}

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

    def open(self) -> list[Live]:
        """Every order that has not ended."""
        return self.resting + self.waiting + self.due + self.entering

    def _end(self, kind: type[Cancelled | Expired | Rejected], order: Live, reason: str) -> None:
        self.events.append(kind(at=self.at, **order.terms, **order.held, reason=reason))
        self._put(order)
        self.openings.fit(self.open())

    def _put(self, order: Live, where: list[Live] | None = None) -> None:
        """Let an order stand there only, or nowhere."""
        for orders in (self.resting, self.waiting, self.due, self.entering):
            # By identity: equal orders are not the same order.
            orders[:] = [other for other in orders if other is not order]
        if where is not None:
            where.append(order)

    # Commands

    def _new(self, new: New) -> None:
        if self._live(new.order_id):
            return
        order = self._admitted(new)
        if self.state != "TRADING":
            self._end(Rejected, order, "INSTRUMENT_NOT_TRADING")
        elif not is_sensible(new):
            self._end(Rejected, order, "INVALID_ORDER")
        elif new.type in ("LIMIT", "MARKET"):
            self._enter(order)
        elif self._is_reached(order, new.working_type):
            self._put(order, self.due)
        else:
            self._put(order, self.waiting)
            placed = StopPlaced(at=self.at, **order.terms, stop_price=new.stop_price, working_type=new.working_type)
            self.events.append(placed)

    def _admitted(self, new: New) -> Live:
        order = Live(new, new.price, new.quantity)
        self._put(order, self.entering)
        self.openings.back(order, order.remaining, new.backed, self.open())
        return order

    def _cancel(self, command: Cancel | CancelAll) -> None:
        for order in self.resting + self.waiting:
            is_meant = isinstance(command, CancelAll) or order.new.order_id == command.order_id
            if is_meant and order.new.user_id == command.user_id:
                self._end(Cancelled, order, command.reason)

    def _cancel_replace(self, command: CancelReplace) -> None:
        new = command.order
        if self._live(new.order_id):
            return
        old = [order for order in self._live(command.cancel_order_id) if order.new.user_id == new.user_id]
        if not old:
            self._end(Rejected, self._admitted(new), "REPLACED_ORDER_NOT_FOUND")
        else:
            if self.state == "TRADING" and is_sensible(new):
                self._end(Cancelled, old[0], "REPLACED")
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
                seq = self.event_seq + len(self.events) + 1
                self.guards.fill(command.user_id, sign * lots, command.price, seq)
                self.guards.fill(giver, -sign * lots, command.price, seq)
                self.openings.fit(self.open())
                self.events.append(
                    Deleveraged(
                        at=self.at,
                        trade_id=trade_id(seq, self.instrument),
                        price=command.price,
                        quantity=lots,
                        side=command.side,
                        user_id=command.user_id,
                        counterparty_user_id=giver,
                    )
                )
                self.position_changed(giver)
                self.position_changed(command.user_id)

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
                self._amend_to(order, price, quantity - order.filled, command)

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

    def _amend_to(self, order: Live, price: int, quantity: int, command: Amend) -> None:
        rests = any(other is order for other in self.resting)
        if rests and order.new.reduce_only:
            others = sum(other.remaining for other in self.reducing(order.new.user_id)) - order.remaining
            quantity = min(quantity, self._reducible(order) - others)
        keeps_place = rests and price == order.price and quantity <= order.remaining
        old = copy.copy(order)
        order.new = replace(order.new, price=price, basis=command.basis, loss=command.loss)
        order.price, order.remaining = price, quantity
        self.events.append(amended(self.at, order, old, rests, keeps_place, "USER_REQUEST", command.amendment_id))
        self.openings.back(order, order.remaining - old.remaining, command.backed, self.open())
        if rests and not keeps_place:
            self._enter(order, triggered=True)

    # Triggers

    def _is_reached(self, order: Live, kind: WorkingType) -> bool:
        """A mark between two ticks has risen to the lower and fallen to the upper one only."""
        low, high = (self.guards.low, self.guards.high) if kind == "MARK" else (self.last_price, self.last_price)
        return low >= order.new.stop_price if is_rising(order.new) else 0 < high <= order.new.stop_price

    def _reached(self, kind: WorkingType) -> None:
        if self.state != "TRADING":
            return
        reached = [order for order in self.waiting if order.new.working_type == kind and self._is_reached(order, kind)]
        rising = sorted((o for o in reached if is_rising(o.new)), key=lambda order: order.new.stop_price)
        falling = sorted((o for o in reached if not is_rising(o.new)), key=lambda order: -order.new.stop_price)
        for order in rising + falling:
            self._put(order, self.due)

    def _protect(self, order: Live) -> None:
        """A triggered order without a limit is bound by the mark of now; initial margin stays held where it was."""
        if order.new.protection and self.guards.low:
            order.new = replace(order.new, basis=order.new.basis or order.price)
            order.price = self.guards.protection_price(order.new)

    # Entry

    def _enter(self, order: Live, triggered: bool = False) -> None:
        self._put(order, self.entering)
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
        elif self._is_guarded(order) and order.remaining > self._reducible(order) and not self.guards.is_live(self.at):
            # Part of it would open.
            self._end(refused, order, "MARK_PRICE_UNAVAILABLE")
            return
        if new.time_in_force == "FOK" and not would_fill(self, order):
            self._end(Expired, order, "FOK_NOT_FILLABLE")
            return
        first = len(self.events)
        stopped_by = self._match(order)
        if order.remaining == 0:
            self._put(order)
            self.events.append(Filled(at=self.at, order_id=new.order_id, user_id=new.user_id))
        elif stopped_by:
            self._end(Expired, order, stopped_by)
        elif new.type.endswith("MARKET"):
            self._end(Expired, order, "PROTECTION_PRICE" if self.queue(opposite) else "NO_LIQUIDITY")
        elif new.time_in_force != "GTC":
            self._end(Expired, order, "IOC")
        else:
            self._rest(order)
        for event in self.events[first:]:
            if isinstance(event, Trade):
                self.last_price = event.price
                self._reached("LAST")

    def _rest(self, order: Live) -> None:
        if order.new.reduce_only:
            room = self._reducible(order) - sum(other.remaining for other in self.reducing(order.new.user_id))
            if room <= 0:
                self._end(Expired, order, "REDUCE_ONLY")
                return
            self._cut(order, room, rests=False)
        self._put(order, self.resting)
        self.events.append(Placed(at=self.at, **order.terms))

    def _would_cross(self, side: Side, price: int) -> bool:
        if side == "BUY":
            return any(order.price <= price for order in self.queue("SELL"))
        return any(order.price >= price for order in self.queue("BUY"))

    # Matching

    def _is_guarded(self, order: Live) -> bool:
        return self.guards.holders[order.new.user_id].leverage > 0

    def _match(self, taker: Live) -> str:
        """Why the order ends before its limit; empty if it does not."""
        side, user_id, guards = taker.new.side, taker.new.user_id, self.guards
        while taker.remaining and self._would_cross(side, taker.price):
            maker = self.queue("SELL" if side == "BUY" else "BUY")[0]
            lots = taker.remaining if taker.new.liquidation else guards.lots(taker.new, maker.price, taker.remaining)
            if not lots:
                return "MARGIN_AT_MARK"
            if maker.new.user_id != user_id:
                lots = guards.lots(maker.new, maker.price, min(lots, maker.remaining))
                if lots:
                    self.trade(taker, maker, lots)
                    self.position_changed(maker.new.user_id)
                    self.position_changed(user_id)
                else:
                    self._end(Cancelled, maker, "MARGIN_AT_MARK")
                continue
            if taker.new.stp_mode in ("EXPIRE_MAKER", "EXPIRE_BOTH"):
                self._end(Expired, maker, "SELF_TRADE")
            if taker.new.stp_mode in ("EXPIRE_TAKER", "EXPIRE_BOTH"):
                return "SELF_TRADE"
        return ""

    def trade(self, taker: Live, maker: Live, quantity: int) -> None:
        told = self._guards_told(taker, maker, quantity)
        seq = self.event_seq + len(self.events) + 1
        for order in (taker, maker):
            order.remaining -= quantity
            order.filled += quantity
            bought = quantity if order.new.side == "BUY" else -quantity
            open_loss = told.get("taker_open_loss" if order is taker else "maker_open_loss", 0)
            self.guards.fill(order.new.user_id, bought, maker.price, seq, order, open_loss)
        self.openings.fit(self.open())
        self.events.append(trade(self.at, seq, self.instrument, taker, maker, quantity, told))
        if maker.remaining == 0:
            self._put(maker)
            self.events.append(Filled(at=self.at, order_id=maker.new.order_id, user_id=maker.new.user_id))

    def _guards_told(self, taker: Live, maker: Live, quantity: int) -> dict[str, int]:
        """What a trade says of the guards, before it is one; nothing if neither side has any."""
        if not self._is_guarded(taker) and not self._is_guarded(maker):
            return {}
        told = {"mark": self.guards.low}
        for name, order in (("taker", taker), ("maker", maker)):
            told[name + "_basis"], told[name + "_loss"] = order.new.basis, order.new.loss
            told[name + "_open_loss"] = self.guards.open_loss(order.new, maker.price, quantity)
            told[name + "_leverage"] = self.guards.holders[order.new.user_id].leverage
        return told

    # Reduce-only

    def reducing(self, user_id: int) -> list[Live]:
        return [order for order in self.resting if order.new.reduce_only and order.new.user_id == user_id]

    def _reducible(self, order: Live) -> int:
        return self.guards.holders[order.new.user_id].can_close(order.new.side)

    def position_changed(self, user_id: int) -> None:
        """The newest give way until the rest fits the position."""
        for order in reversed(self.reducing(user_id)):
            excess = sum(other.remaining for other in self.reducing(user_id)) - self._reducible(order)
            if excess >= order.remaining:
                self._end(Expired, order, "REDUCE_ONLY")
            elif excess > 0:
                self._cut(order, order.remaining - excess, rests=True)

    def _cut(self, order: Live, room: int, *, rests: bool) -> None:
        if order.remaining > room:
            old = copy.copy(order)
            order.remaining = room
            self.events.append(amended(self.at, order, old, rests, rests, "REDUCE_ONLY"))

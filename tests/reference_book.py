"""The oracle of the engine: the matching rules said as plainly as can be. One list, linear scans, exact fractions."""

import copy
from dataclasses import dataclass
from fractions import Fraction
from math import ceil

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
    Side,
    Trade,
)


@dataclass
class Resting:
    """An order in the book; `entry` numbers orders by time of entry."""

    entry: int
    order_id: int
    user_id: int
    side: Side
    price: int
    remaining: int


class ReferenceMatcher:
    """Same commands in, same events out as `engine.matcher.Matcher`, slowly."""

    def __init__(self, instrument: Instrument) -> None:
        self.instrument = instrument
        self.resting: list[Resting] = []
        self.event_seq = 0
        self.entries = 0

    def apply(self, command: AnyCommand) -> list[AnyEvent]:
        events: list[AnyEvent] = []
        if isinstance(command, New):
            self._enter(command, events)
        else:
            for order in [order for order in self.resting if _is_meant(command, order)]:
                self.resting.remove(order)
                events.append(_end(Cancelled, command.at, order, command.reason))
        self.event_seq += len(events)
        return events

    def queue(self, side: Side) -> list[Resting]:
        """The orders of one side, best price first, then first come."""
        orders = [order for order in self.resting if order.side == side]
        return sorted(orders, key=lambda order: (-order.price if side == "BUY" else order.price, order.entry))

    def _enter(self, new: New, events: list[AnyEvent]) -> None:
        if any(order.order_id == new.order_id for order in self.resting):
            return
        self.entries += 1
        taker = Resting(self.entries, new.order_id, new.user_id, new.side, new.price, new.quantity)
        if new.price <= 0 or new.quantity <= 0:
            events.append(_end(Rejected, new.at, taker, "INVALID_ORDER"))
            return
        if new.time_in_force == "FOK" and not self._would_fill(new, taker):
            events.append(_end(Expired, new.at, taker, "FOK_NOT_FILLABLE"))
            return
        self_trade = self._match(new, taker, events)
        opposite_is_empty = not self.queue("SELL" if new.side == "BUY" else "BUY")
        if taker.remaining == 0:
            events.append(Filled(at=new.at, order_id=new.order_id, user_id=new.user_id))
        elif self_trade:
            events.append(_end(Expired, new.at, taker, "SELF_TRADE"))
        elif new.type == "MARKET":
            events.append(_end(Expired, new.at, taker, "NO_LIQUIDITY" if opposite_is_empty else "PROTECTION_PRICE"))
        elif new.time_in_force == "GTC":
            self.resting.append(taker)
            events.append(
                Placed(
                    at=new.at,
                    order_id=new.order_id,
                    user_id=new.user_id,
                    side=new.side,
                    price=new.price,
                    quantity=taker.remaining,
                )
            )
        else:
            events.append(_end(Expired, new.at, taker, "IOC"))

    def _would_fill(self, new: New, taker: Resting) -> bool:
        """A fill-or-kill order is filled if an immediate-or-cancel order in its place would be, in full."""
        trial, trial_taker = copy.deepcopy((self, taker))
        trial._match(new, trial_taker, [])
        return trial_taker.remaining == 0

    def _match(self, new: New, taker: Resting, events: list[AnyEvent]) -> bool:
        for maker in self.queue("SELL" if new.side == "BUY" else "BUY"):
            crosses = maker.price <= new.price if new.side == "BUY" else maker.price >= new.price
            if not crosses or taker.remaining == 0:
                return False
            if maker.user_id == new.user_id:
                if new.stp_mode in ("EXPIRE_MAKER", "EXPIRE_BOTH"):
                    self.resting.remove(maker)
                    events.append(_end(Expired, new.at, maker, "SELF_TRADE"))
                if new.stp_mode in ("EXPIRE_TAKER", "EXPIRE_BOTH"):
                    return True
            else:
                self._trade(new, taker, maker, events)
        return False

    def _trade(self, new: New, taker: Resting, maker: Resting, events: list[AnyEvent]) -> None:
        quantity = min(taker.remaining, maker.remaining)
        taker.remaining -= quantity
        maker.remaining -= quantity
        instrument = self.instrument
        notional = (
            maker.price * Fraction(instrument.tick_size) * quantity * Fraction(instrument.lot_size)
        )  # quote, exact
        events.append(
            Trade(
                at=new.at,
                trade_id=(self.event_seq + len(events) + 1) * 1024 + instrument.number,
                price=maker.price,
                quantity=quantity,
                taker_side=new.side,
                maker_order_id=maker.order_id,
                maker_user_id=maker.user_id,
                maker_remaining=maker.remaining,
                maker_fee=ceil(notional * Fraction(instrument.maker_fee_rate) * 10**8),
                taker_order_id=taker.order_id,
                taker_user_id=taker.user_id,
                taker_remaining=taker.remaining,
                taker_fee=ceil(notional * Fraction(instrument.taker_fee_rate) * 10**8),
                taker_price=new.price,
                taker_liquidation=new.liquidation,
            )
        )
        if maker.remaining == 0:
            self.resting.remove(maker)
            events.append(Filled(at=new.at, order_id=maker.order_id, user_id=maker.user_id))


def _is_meant(command: Cancel | CancelAll, order: Resting) -> bool:
    if order.user_id != command.user_id:
        return False
    return isinstance(command, CancelAll) or order.order_id == command.order_id


def _end(
    kind: type[Cancelled | Expired | Rejected], at: int, order: Resting, reason: str
) -> Cancelled | Expired | Rejected:
    return kind(
        at=at,
        order_id=order.order_id,
        user_id=order.user_id,
        side=order.side,
        price=order.price,
        quantity=order.remaining,
        reason=reason,
    )

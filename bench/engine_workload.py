"""The commands that matching engines are compared with: ours and, through `bench/engine_peers.py`, those of others."""

import random
from dataclasses import dataclass

from domain.instruments import SHIPPED
from domain.matching import AnyCommand, Cancel, Cancelled, Expired, Filled, New, Placed, Side, Trade
from engine.matcher import Matcher

OPERATIONS = 200_000
USERS = 1_000
MID = 100_000
SPREAD = 100.0
AT = 1_700_000_000_000


@dataclass(frozen=True)
class Workload:
    """Commands to be timed, and those that fill the book before; the lots that then trade, and those left resting."""

    name: str
    before: list[New]
    commands: list[AnyCommand]
    traded_lots: int
    resting_lots: int


def workload(name: str, resting: int) -> Workload:
    """60 % limit orders around the mid, half of them crossing it, 30 % cancels of random live orders, 10 % market."""
    dice = random.Random(23)
    before = [passive(dice, order_id) for order_id in range(1, resting + 1)]
    matcher = Matcher(SHIPPED[0])
    live = _Live()
    for order in before:
        live.follow(matcher, order)
    commands: list[AnyCommand] = []
    traded_lots = 0
    for order_id in range(resting + 1, resting + OPERATIONS + 1):
        command = _operation(dice, order_id, live)
        traded_lots += live.follow(matcher, command)
        commands.append(command)
    resting_lots = sum(order.remaining for order in matcher.book.orders.values())
    return Workload(name, before, commands, traded_lots, resting_lots)


class _Live:
    """The orders in the book, one of which can be drawn in constant time."""

    def __init__(self) -> None:
        self.orders: list[tuple[int, int]] = []
        self.places: dict[int, int] = {}

    def follow(self, matcher: Matcher, command: AnyCommand) -> int:
        """Apply the command; the lots it traded."""
        lots = 0
        for event in matcher.apply(command):
            if isinstance(event, Placed):
                self.places[event.order_id] = len(self.orders)
                self.orders.append((event.order_id, event.user_id))
            elif isinstance(event, Filled | Cancelled | Expired) and event.order_id in self.places:
                place, last = self.places.pop(event.order_id), self.orders.pop()
                if last[0] != event.order_id:
                    self.orders[place] = last
                    self.places[last[0]] = place
            if isinstance(event, Trade):
                lots += event.quantity
        return lots


def _operation(dice: random.Random, order_id: int, live: _Live) -> AnyCommand:
    kind = dice.random()
    if kind < 0.3 and live.orders:
        gone, user_id = dice.choice(live.orders)
        return Cancel(at=AT, order_id=gone, user_id=user_id)
    side: Side
    if kind < 0.4:
        side = "BUY" if dice.random() < 0.5 else "SELL"
        return random_order(dice, order_id, side, MID * 2 if side == "BUY" else 1, market=True)
    side = "BUY" if dice.random() < 0.5 else "SELL"
    return random_order(dice, order_id, side, round(dice.gauss(MID, SPREAD)))


def passive(dice: random.Random, order_id: int) -> New:
    """A limit order that crosses no other of its kind."""
    away = 1 + abs(round(dice.gauss(0, SPREAD)))
    if dice.random() < 0.5:
        return random_order(dice, order_id, "BUY", MID - away)
    return random_order(dice, order_id, "SELL", MID + away)


def random_order(dice: random.Random, order_id: int, side: Side, price: int, *, market: bool = False) -> New:
    """An order over 1 to 100 lots."""
    return New(
        at=AT,
        order_id=order_id,
        # Buyers and sellers are different people: not every engine has self-trade prevention.
        user_id=dice.randint(1, USERS) * 2 + (side == "BUY"),
        side=side,
        type="MARKET" if market else "LIMIT",
        time_in_force="IOC" if market else "GTC",
        price=price,
        quantity=dice.randint(1, 100),
    )

"""The matcher alone: operations per second with full events, and how the cost grows with the book.

`python -m bench.engine_core`. One thread, no I/O. The commands are made beforehand; a matcher's time is that of
`apply` and of nothing else. Peers that are installed (extras group `bench`) run the same commands in the same run.
"""

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from bench.engine_peers import peers
from domain.instruments import SHIPPED
from domain.matching import AnyCommand, Cancel, Cancelled, Expired, Filled, New, Placed, Side, Trade
from engine.matcher import Matcher

RUNS = 5
OPERATIONS = 200_000
DEEP_ORDERS = 20_000
SIZES = (1_000, 1_000_000)
QUEUE = 100_000
USERS = 1_000
MID = 100_000
SPREAD = 100.0
AT = 1_700_000_000_000


@dataclass(frozen=True)
class Workload:
    """Commands to be timed, and those that fill the book before."""

    name: str
    before: list[New]
    commands: list[AnyCommand]
    lots: int


def main() -> None:
    """Entry: prints operations per second, medians of five runs."""
    for name, resting in (("mixed", 0), ("deep", DEEP_ORDERS)):
        load = workload(name, resting)
        print(f"{name}: {len(load.commands):,} operations on {len(load.before):,} resting orders, {load.lots:,} lots")
        _report("Saga Exchange", _median(partial(_run, load)))
        for peer_name, peer in peers().items():
            _report(peer_name, _median(partial(peer, load.before, load.commands, load.lots)))
    print("flat: the same small operations on books of different size")
    rates = [_median(partial(_run_steady, size), runs=3) for size in SIZES]
    for size, rate in zip(SIZES, rates, strict=True):
        _report(f"{size:,} resting", rate)
    print(f"  cost at {SIZES[1]:,} is {rates[0] / rates[1]:.2f} x that at {SIZES[0]:,}")
    print(f"one level: {QUEUE:,} orders at one price, all cancelled")
    for place, order_ids in _queue_orders().items():
        _report(place, _run_queue(order_ids))


def workload(name: str, resting: int) -> Workload:
    """60 % limit orders around the mid, half of them crossing it, 30 % cancels of random live orders, 10 % market."""
    dice = random.Random(23)
    before = [_passive(dice, order_id) for order_id in range(1, resting + 1)]
    matcher = Matcher(SHIPPED[0])
    live = _Live()
    for order in before:
        live.follow(matcher, order)
    commands: list[AnyCommand] = []
    lots = 0
    for order_id in range(resting + 1, resting + OPERATIONS + 1):
        command = _operation(dice, order_id, live)
        lots += live.follow(matcher, command)
        commands.append(command)
    return Workload(name, before, commands, lots)


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
    if kind < 0.4:
        side: Side = "BUY" if dice.random() < 0.5 else "SELL"
        return _order(dice, order_id, side, MID * 2 if side == "BUY" else 1, market=True)
    return _order(dice, order_id, "BUY" if dice.random() < 0.5 else "SELL", round(dice.gauss(MID, SPREAD)))


def _passive(dice: random.Random, order_id: int) -> New:
    away = 1 + abs(round(dice.gauss(0, SPREAD)))
    if dice.random() < 0.5:
        return _order(dice, order_id, "BUY", MID - away)
    return _order(dice, order_id, "SELL", MID + away)


def _order(dice: random.Random, order_id: int, side: Side, price: int, *, market: bool = False) -> New:
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


def _run(load: Workload) -> float:
    return _timed(_filled(load.before), load.commands)


def _filled(orders: list[New]) -> Matcher:
    matcher = Matcher(SHIPPED[0])
    for order in orders:
        matcher.apply(order)
    return matcher


def _run_steady(resting: int) -> float:
    """A passive order, a market order of one lot, a cancel, and again: the book stays as large as it is."""
    dice = random.Random(resting)
    matcher = _filled([_passive(dice, order_id) for order_id in range(1, resting + 1)])
    commands: list[AnyCommand] = []
    for order_id in range(resting + 1, resting + 60_001, 2):
        order = _passive(dice, order_id)
        commands += (
            order,
            New(
                at=AT,
                order_id=order_id + 1,
                user_id=1,
                side=order.side,
                type="MARKET",
                time_in_force="IOC",
                price=MID * 2 if order.side == "BUY" else 1,
                quantity=1,
            ),
            Cancel(at=AT, order_id=order_id, user_id=order.user_id),
        )
    return _timed(matcher, commands)


def _queue_orders() -> dict[str, list[int]]:
    order_ids = list(range(1, QUEUE + 1))
    middle = QUEUE // 2
    return {"front": order_ids, "back": order_ids[::-1], "middle": order_ids[middle:] + order_ids[:middle][::-1]}


def _run_queue(order_ids: list[int]) -> float:
    matcher = _filled([_order(random.Random(order_id), order_id, "BUY", MID) for order_id in sorted(order_ids)])
    users = {order_id: order.new.user_id for order_id, order in matcher.book.orders.items()}
    rate = _timed(matcher, [Cancel(at=AT, order_id=order_id, user_id=users[order_id]) for order_id in order_ids])
    assert not matcher.book.orders
    return rate


def _timed(matcher: Matcher, commands: list[AnyCommand]) -> float:
    started = time.perf_counter()
    for command in commands:
        matcher.apply(command)
    return len(commands) / (time.perf_counter() - started)


def _median(run: Callable[[], float], runs: int = RUNS) -> float:
    return statistics.median(_rates(run, runs))


def _rates(run: Callable[[], float], runs: int) -> Iterator[float]:
    for _ in range(runs):
        gc.collect()
        yield run()


def _report(name: str, rate: float) -> None:
    print(f"  {name:<24} {rate:>12,.0f} /s")


if __name__ == "__main__":
    main()

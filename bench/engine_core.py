"""The matcher alone: operations per second with full events, and how the cost grows with the book.

`python -m bench.engine_core`. One thread, no I/O. The commands are made beforehand; a matcher's time is that of
`apply` and of nothing else. Peers that are installed (extras group `bench`) run the same commands in the same run.
"""

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial

from bench.engine_peers import peers
from bench.engine_workload import AT, MID, Workload, passive, random_order, workload
from domain.instruments import SHIPPED
from domain.matching import AnyCommand, Cancel, New
from engine.matcher import Matcher

RUNS = 5
DEEP_ORDERS = 20_000
SIZES = (1_000, 1_000_000)
QUEUE = 100_000


def main() -> None:
    """Entry: prints operations per second, medians of five runs."""
    for name, resting in (("mixed", 0), ("deep", DEEP_ORDERS)):
        load = workload(name, resting)
        print(
            f"{name}: {len(load.commands):,} operations on {len(load.before):,} resting orders,"
            f" {load.traded_lots:,} lots traded"
        )
        for engine, rate in _medians({"Saga Exchange": _run, **peers()}, load).items():
            _report(engine, rate)
    print("flat: the same small operations on books of different size")
    rates = [_median(partial(_run_steady, size), runs=3) for size in SIZES]
    for size, rate in zip(SIZES, rates, strict=True):
        _report(f"{size:,} resting", rate)
    print(f"  cost at {SIZES[1]:,} is {rates[0] / rates[1]:.2f} x that at {SIZES[0]:,}")
    print(f"one level: {QUEUE:,} orders at one price, all cancelled")
    for place, order_ids in _queue_orders().items():
        _report(place, _run_queue(order_ids))


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
    matcher = _filled([passive(dice, order_id) for order_id in range(1, resting + 1)])
    commands: list[AnyCommand] = []
    for order_id in range(resting + 1, resting + 60_001, 2):
        order = passive(dice, order_id)
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
    matcher = _filled([random_order(random.Random(order_id), order_id, "BUY", MID) for order_id in sorted(order_ids)])
    users = {order_id: order.new.user_id for order_id, order in matcher.book.orders.items()}
    rate = _timed(matcher, [Cancel(at=AT, order_id=order_id, user_id=users[order_id]) for order_id in order_ids])
    assert not matcher.book.orders
    return rate


def _timed(matcher: Matcher, commands: list[AnyCommand]) -> float:
    started = time.perf_counter()
    for command in commands:
        matcher.apply(command)
    return len(commands) / (time.perf_counter() - started)


def _medians(engines: dict[str, Callable[[Workload], float]], load: Workload) -> dict[str, float]:
    """Each in turn, and again: what else the machine does is spread over all."""
    rates: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(RUNS):
        for name, engine in engines.items():
            gc.collect()
            rates[name].append(engine(load))
    return {name: statistics.median(runs) for name, runs in rates.items()}


def _median(run: Callable[[], float], runs: int = RUNS) -> float:
    return statistics.median(_rates(run, runs))


def _rates(run: Callable[[], float], runs: int) -> Iterator[float]:
    for _ in range(runs):
        gc.collect()
        yield run()


def _report(name: str, rate: float) -> None:
    print(f"  {name:<40} {rate:>12,.0f} /s")


if __name__ == "__main__":
    main()

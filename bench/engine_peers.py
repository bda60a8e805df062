"""Matching engines of others that install from PyPI, each driven with the same commands as ours.

A peer's run ends with an error if it traded other quantities than ours did: then it did not do the same work.
"""

import importlib
import importlib.util
import time
from collections.abc import Callable
from typing import Any

from domain.matching import AnyCommand, Cancel, New

# Orders that fill the book, commands to time, and the lots that these trade; the result is operations per second.
Peer = Callable[[list[New], list[AnyCommand], int], float]
INSTRUMENT = "BTC"


def peers() -> dict[str, Peer]:
    """Those that are installed (extras group `bench`)."""
    found = importlib.util.find_spec("lightmatchingengine")
    return {"lightmatchingengine": _light_matching_engine} if found else {}


def _light_matching_engine(before: list[New], commands: list[AnyCommand], traded_lots: int) -> float:
    library: Any = importlib.import_module("lightmatchingengine.lightmatchingengine")
    engine = library.LightMatchingEngine()
    # It numbers orders itself, from 1 on.
    numbers: dict[int, int] = {}
    steps: list[tuple[int, int, int, int, bool]] = []
    for command in (*before, *commands):
        if isinstance(command, New):
            numbers[command.order_id] = len(numbers) + 1
            side = 1 if command.side == "BUY" else 2
            steps.append((0, side, command.price, command.quantity, command.type == "MARKET"))
        elif isinstance(command, Cancel):
            steps.append((numbers[command.order_id], 0, 0, 0, False))
    for _, side, price, quantity, _ in steps[: len(before)]:
        engine.add_order(INSTRUMENT, price, quantity, side)

    timed, reports = steps[len(before) :], []
    started = time.perf_counter()
    for number, side, price, quantity, is_market in timed:
        if number:
            engine.cancel_order(number, INSTRUMENT)
            continue
        order, trades = engine.add_order(INSTRUMENT, price, quantity, side)
        reports.append(trades)
        if is_market and order.leaves_qty:
            engine.cancel_order(order.order_id, INSTRUMENT)
    seconds = time.perf_counter() - started
    # Every lot is reported twice: for the taker and for a maker.
    lots = sum(trade.trade_qty for trades in reports for trade in trades) // 2
    if lots != traded_lots:
        raise RuntimeError(f"lightmatchingengine: expected {traded_lots} lots traded, was {lots}")
    return len(commands) / seconds

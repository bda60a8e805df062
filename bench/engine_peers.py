"""Matching engines of others that install from PyPI, each driven with the same commands as ours.

A peer's run ends with an error if it traded other quantities than ours did: then it did not do the same work.
A call is made with its arguments beforehand, so that the time is the engine's and that of its own Python binding.
"""

import importlib
import importlib.util
import time
from collections.abc import Callable
from typing import Any

from bench.engine_workload import Workload
from domain.matching import AnyCommand, Cancel, New

# The result is operations per second.
Peer = Callable[[Workload], float]
# A function of the engine and what it is called with.
Call = tuple[Callable[..., Any], tuple[Any, ...]]
INSTRUMENT = "BTC"


def peers() -> dict[str, Peer]:
    """Those that are installed (extras group `bench`), by a name that tells how each is built."""
    known: dict[str, tuple[str, Peer]] = {
        "lightmatchingengine": ("lightmatchingengine (pure Python)", _light_matching_engine),
        "matching_engine": ("matching-engine (pure Python)", _matching_engine),
        "orderly_chaos": ("orderly-chaos (C++)", _orderly_chaos),
        "liquibook": ("liquibook (C++)", _liquibook),
        "obook": ("obook (C ABI)", _obook),
        "limit_order_book": ("limit-order-book (C++, reports no fills)", _limit_order_book),
    }
    return {name: peer for module, (name, peer) in known.items() if importlib.util.find_spec(module)}


def _light_matching_engine(load: Workload) -> float:
    library: Any = importlib.import_module("lightmatchingengine.lightmatchingengine")
    engine = library.LightMatchingEngine()
    numbers = _Numbers()

    def market(price: int, quantity: int, side: int) -> Any:
        order, trades = engine.add_order(INSTRUMENT, price, quantity, side)
        if order.leaves_qty:
            engine.cancel_order(order.order_id, INSTRUMENT)
        return order, trades

    def call(command: AnyCommand) -> Call:
        if isinstance(command, Cancel):
            return engine.cancel_order, (numbers.of[command.order_id], INSTRUMENT)
        assert isinstance(command, New)
        numbers.give(command)
        side = 1 if command.side == "BUY" else 2
        if command.type == "MARKET":
            return market, (command.price, command.quantity, side)
        return engine.add_order, (INSTRUMENT, command.price, command.quantity, side)

    results, rate = _run(load, call)
    # A cancel answers with the order alone. Every lot is reported twice: for the taker and for a maker.
    trades = (trade for result in results if isinstance(result, tuple) for trade in result[1])
    return _checked("lightmatchingengine", sum(trade.trade_qty for trade in trades) // 2, load.traded_lots, rate)


def _matching_engine(load: Workload) -> float:
    library: Any = importlib.import_module("matching_engine")
    engine = importlib.import_module("matching_engine.engine").MatchingEngine()
    sequence = 0

    def call(command: AnyCommand) -> Call:
        nonlocal sequence
        sequence += 1
        if isinstance(command, Cancel):
            theirs = library.CancelOrder(command.order_id, command.user_id)
        else:
            assert isinstance(command, New)
            market = command.type == "MARKET"
            theirs = library.NewOrder(
                order_id=command.order_id,
                account=command.user_id,
                side=library.Side.BUY if command.side == "BUY" else library.Side.SELL,
                price=0 if market else command.price,
                qty=command.quantity,
                order_type=library.OrderType.MARKET if market else library.OrderType.LIMIT,
                tif=library.TimeInForce.IOC if market else library.TimeInForce.GTC,
            )
        return engine.process, (library.SequencedCommand(sequence, command.at, theirs),)

    results, rate = _run(load, call)
    trade = importlib.import_module("matching_engine.events").Trade
    lots = sum(event.qty for events in results for event in events if isinstance(event, trade))
    return _checked("matching-engine", lots, load.traded_lots, rate)


def _orderly_chaos(load: Workload) -> float:
    library: Any = importlib.import_module("orderly_chaos")
    trades: list[Any] = []
    book = library.LimitOrderBook(on_trade=trades.append)

    def call(command: AnyCommand) -> Call:
        if isinstance(command, Cancel):
            return book.cancel, (command.order_id,)
        assert isinstance(command, New)
        side = library.Side.BUY if command.side == "BUY" else library.Side.SELL
        if command.type == "MARKET":
            return book.market, (side, command.order_id, command.quantity)
        return book.limit, (side, command.order_id, command.quantity, command.price)

    rate = _run(load, call)[1]
    return _checked("orderly-chaos", sum(trade.quantity for trade in trades), load.traded_lots, rate)


def _liquibook(load: Workload) -> float:
    library: Any = importlib.import_module("liquibook")
    fills: list[tuple[int, ...]] = []
    others: list[tuple[int, ...]] = []

    class Listener(library.OrderListener):  # type: ignore[misc]  # the library has no types
        """Writes down what our events say, too: who traded what with whom, and what remains of both."""

        def on_fill(self, taker: Any, maker: Any, quantity: int, price: int) -> None:
            # The book leaves it to the listener to keep the orders up to date.
            maker.fill(quantity, quantity * price, 0)
            taker.fill(quantity, quantity * price, 0)
            fills.append((price, quantity, maker.order_id_, maker.open_qty(), taker.order_id_, taker.open_qty()))

        def on_accept(self, order: Any) -> None:
            others.append((order.order_id_,))

        def on_cancel(self, order: Any) -> None:
            others.append((order.order_id_, order.open_qty()))

    listener, book = Listener(), library.DepthOrderBook()
    book.set_order_listener(listener)
    orders: dict[int, Any] = {}

    def add(order_id: int, is_buy: bool, price: int, quantity: int, terms: int) -> None:
        order = orders[order_id] = library.SimpleOrder(is_buy, price, quantity)
        book.add(order, terms)

    def cancel(order_id: int) -> None:
        # It does not find orders by their ids.
        book.cancel(orders[order_id])

    def call(command: AnyCommand) -> Call:
        if isinstance(command, Cancel):
            return cancel, (command.order_id,)
        assert isinstance(command, New)
        terms = library.oc_immediate_or_cancel if command.type == "MARKET" else library.oc_no_conditions
        return add, (command.order_id, command.side == "BUY", command.price, command.quantity, terms)

    rate = _run(load, call)[1]
    return _checked("liquibook", sum(fill[1] for fill in fills), load.traded_lots, rate)


def _obook(load: Workload) -> float:
    library: Any = importlib.import_module("obook")
    book = library.Book(len(load.before) + len(load.commands))
    numbers = _Numbers()

    def cancel(number: int, user_id: int) -> Any:
        book.cancel(number, user_id)
        # Its events wait to be fetched, and the oldest are lost if they wait for long.
        return book.events()

    def submit(*order: int) -> Any:
        book.submit(*order)
        return book.events()

    def call(command: AnyCommand) -> Call:
        if isinstance(command, Cancel):
            return cancel, (numbers.of[command.order_id], command.user_id)
        assert isinstance(command, New)
        numbers.give(command)
        side = library.BUY if command.side == "BUY" else library.SELL
        if command.type == "MARKET":
            return submit, (command.user_id, side, 0, command.quantity, library.MARKET)
        return submit, (command.user_id, side, command.price, command.quantity)

    results, rate = _run(load, call)
    lots = sum(event.qty for events in results for event in events if event.kind == library.EventKind.TRADE)
    book.close()
    return _checked("obook", lots, load.traded_lots, rate)


def _limit_order_book(load: Workload) -> float:
    library: Any = importlib.import_module("limit_order_book.limit_order_book")
    book = library.LimitOrderBook()

    def call(command: AnyCommand) -> Call:
        if isinstance(command, Cancel):
            return book.cancel, (command.order_id,)
        assert isinstance(command, New)
        # Its sides are booleans, true for buy.
        side = command.side == "BUY"
        if command.type == "MARKET":
            return book.market, (side, command.order_id, command.quantity)
        return book.limit, (side, command.order_id, command.quantity, command.price)

    rate = _run(load, call)[1]
    # Without fills, what it traded shows in what is left only.
    return _checked("limit-order-book", book.volume(), load.resting_lots, rate)


class _Numbers:
    """For engines that number orders themselves, from 1 on."""

    def __init__(self) -> None:
        self.of: dict[int, int] = {}

    def give(self, order: New) -> None:
        """The next number is this order's."""
        self.of[order.order_id] = len(self.of) + 1


def _run(load: Workload, call: Callable[[AnyCommand], Call]) -> tuple[list[Any], float]:
    """What the engine answered to each command to be timed, and operations per second."""
    for function, arguments in map(call, load.before):
        function(*arguments)
    calls = [call(command) for command in load.commands]
    started = time.perf_counter()
    results = [function(*arguments) for function, arguments in calls]
    return results, len(load.commands) / (time.perf_counter() - started)


def _checked(name: str, lots: int, expected: int, rate: float) -> float:
    if lots != expected:
        raise RuntimeError(f"{name}: expected {expected} lots, was {lots}")
    return rate

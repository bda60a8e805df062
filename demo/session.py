"""One run: the replayed market becomes quotes and taker orders on the exchange, until its time is over."""

import asyncio
import math
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

import client
from client.models import Audit
from demo.messages import Message, Side, Steps, Trade
from demo.own_orders import OwnOrders
from demo.quoting import plan_refresh, target_levels
from demo.replay import Replay
from demo.takers import LOTS_MAX, capped, limit_price, taker_orders, with_backlog
from demo.tally import Market, Tally
from demo.traders import INSTRUMENT, Traders

CADENCE_SECONDS = 0.2
ACTIONS_MAX = 120
MARK_SECONDS = 1.0
TICKER_SECONDS = 0.5
FIRST_QUOTES_SECONDS = 15.0
TAKERS_SECONDS = 2.0
LEAVING_SECONDS = 1.0
# The rest of the takers' orders gets so many more refreshes of the book.
EXTRA_TURNS = 5
SETTLING_SECONDS = 30.0


class DemoError(Exception):
    """The demo cannot go on; the message says why in one line."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast and long: recorded seconds per second, recorded seconds to play (0: all), levels per side to quote."""

    speed: float
    seconds: float
    levels: int

    def played(self, elapsed: float) -> float:
        """Recorded seconds to have played after `elapsed` seconds."""
        return min(elapsed * self.speed, self.seconds or math.inf)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended."""

    audit: Audit
    open_orders: int

    @property
    def is_clean(self) -> bool:
        """Whether every check of the audit holds."""
        return self.audit.ok


async def read_steps(exchange: client.Exchange) -> Steps:
    """The steps of the instrument. Raises DemoError when it cannot be traded."""
    found = next((item for item in await exchange.instruments() if item.instrument_id == INSTRUMENT), None)
    if found is None or found.state != "TRADING":
        raise DemoError(f"{INSTRUMENT} is not traded there now")
    return Steps(found.tick_size, found.lot_size)


class Session:
    """Runs against `exchange`; `tally` always shows where it stands."""

    def __init__(
        self,
        exchange: client.Exchange,
        operator: client.Operator,
        steps: Steps,
        messages: Iterator[Message],
        tally: Tally,
    ) -> None:
        self._exchange = exchange
        self._operator = operator
        self._steps = steps
        self._replay = Replay(messages)
        self._tally = tally
        self._orders = OwnOrders(tally, steps)
        self._traders = Traders(exchange, self._orders, steps, tally)
        self._backlog: dict[Side, int] = {"BUY": 0, "SELL": 0}

    async def run(self, pace: Pace, stop: asyncio.Event) -> Outcome:
        """Play until the end or until `stop` is set; withdraw and audit. Raises DemoError."""
        await self._traders.create(self._operator)
        async with asyncio.TaskGroup() as tasks:
            helpers = [tasks.create_task(self._traders.listen()), tasks.create_task(self._watch_ticker())]
            await self._traders.until_listening()
            await self._hold_mark()
            helpers.append(tasks.create_task(self._keep_mark()))
            try:
                await self._refresh(pace.levels)
                await self._orders.until(self._is_quoted, FIRST_QUOTES_SECONDS)
                await self._play(pace, stop)
            finally:
                still_open = await self._withdraw()
                for helper in helpers:
                    helper.cancel()
        await self._read_ticker()
        return Outcome(await self._operator.audit(), still_open)

    async def _play(self, pace: Pace, stop: asyncio.Event) -> None:
        start = time.monotonic()
        while not stop.is_set() and not self._replay.is_over:
            turn_start = time.monotonic()
            now = pace.played(turn_start - start)
            await self._turn(self._replay.advance(now), pace.levels)
            self._tally.seconds = self._replay.seconds
            if pace.seconds and now >= pace.seconds:
                break
            # After a turn that took longer the next one follows at once, and plays all that happened meanwhile.
            with suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), turn_start + CADENCE_SECONDS - time.monotonic())
        for _ in range(EXTRA_TURNS):
            if any(self._backlog.values()) and not stop.is_set():
                await asyncio.sleep(CADENCE_SECONDS)
                await self._turn([], pace.levels)

    async def _turn(self, trades: list[Trade], levels: int) -> None:
        self._tally.turns += 1
        await self._take(trades)
        await self._refresh(levels)

    async def _take(self, trades: list[Trade]) -> None:
        """Send what the trades' takers sent, and once more what was left of it; wait for what becomes of it."""
        self._show_theirs(trades)
        book = self._replay.book
        best: dict[Side, int] = {"BUY": book.best_ask, "SELL": book.best_bid} if book.ready else {}
        fresh = taker_orders(trades)
        wanted = capped(with_backlog(fresh, self._backlog, best) if book.ready else fresh)
        orders = await self._traders.take((order.side, limit_price(order), order.lots) for order in wanted)
        await self._orders.until(lambda: all(order.is_done for order in orders), TAKERS_SECONDS)
        for trade in trades:
            self._backlog[trade.side] += trade.lots
        for order in orders:
            # What may still trade is not asked for again.
            self._backlog[order.side] -= order.filled if order.is_done else order.lots

    async def _refresh(self, levels: int) -> None:
        """Bring the quotes to the replayed book; where its sides moved, the new ones wait until the old are gone."""
        if await self._send_refresh(levels):
            await self._orders.until(lambda: not any(quote.leaving for quote in self._orders.quotes()), LEAVING_SECONDS)
            await self._send_refresh(levels)
        self._tally.open_quotes = len(self._orders.quotes())

    async def _send_refresh(self, levels: int) -> int:
        refresh = plan_refresh(
            self._orders.quotes(), target_levels(self._replay.book, levels, self._wanted()), ACTIONS_MAX
        )
        self._tally.amended += refresh.amended
        await asyncio.gather(
            self._traders.cancel(refresh.cancels),
            self._traders.quote((quote.side, quote.price, quote.lots) for quote in refresh.places),
        )
        return refresh.deferred

    def _wanted(self) -> dict[Side, int]:
        return {side: min(lots, LOTS_MAX) for side, lots in self._backlog.items()}

    def _is_quoted(self) -> bool:
        return all(self._is_heard(quote.client_id) for quote in self._orders.quotes())

    def _is_heard(self, client_id: str) -> bool:
        order = self._orders.get(client_id)
        return order is None or order.is_heard

    def _show_theirs(self, trades: list[Trade]) -> None:
        theirs, book = self._tally.theirs, self._replay.book
        theirs.volume += sum(trade.lots for trade in trades)
        if trades:
            theirs.last = trades[-1].price
        theirs.bid, theirs.ask = (book.best_bid, book.best_ask) if book.ready else (None, None)

    async def _keep_mark(self) -> None:
        while True:
            await asyncio.sleep(MARK_SECONDS)
            await self._hold_mark()

    async def _hold_mark(self) -> None:
        """Bring the mark price to the middle of the replayed book, so that margins and price bands are its."""
        book = self._replay.book
        if book.ready:
            price = (book.best_bid + book.best_ask) // 2 * self._steps.tick
            try:
                await self._operator.hold_index(INSTRUMENT, price)
            except client.Refused as refusal:
                raise DemoError(f"The mark price cannot be set to the replayed market's: {refusal}") from None

    async def _watch_ticker(self) -> None:
        while True:
            await self._read_ticker()
            await asyncio.sleep(TICKER_SECONDS)

    async def _read_ticker(self) -> None:
        ticker = await self._exchange.ticker(INSTRUMENT)
        market: Market = self._tally.ours
        market.bid, market.ask, market.last = (
            None if price is None else self._steps.ticks(price)
            for price in (ticker.best_bid, ticker.best_ask, ticker.last_price)
        )

    async def _withdraw(self) -> int:
        """Cancel all quotes, let the mark price go, wait until all is settled; the number of orders still open."""
        await self._traders.cancel_all()
        await self._operator.release_index(INSTRUMENT)
        end = time.monotonic() + SETTLING_SECONDS
        await self._orders.until(lambda: not self._orders.quotes(), SETTLING_SECONDS)
        while still_open := await self._traders.count_open():
            if time.monotonic() > end:
                break
            await asyncio.sleep(CADENCE_SECONDS)
        self._tally.open_quotes = still_open
        return still_open

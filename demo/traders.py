"""The makers and takers, and what they send."""

import asyncio
import itertools
import secrets
import time
from collections.abc import Iterable
from decimal import Decimal

import client
from client.models import OPEN_STATUSES, TimeInForce
from demo.messages import Side, Steps
from demo.own_orders import Order, OwnOrders, Role
from demo.tally import Tally

INSTRUMENT = "BTC-USDT-PERP"
ASSET = "USDT"
MAKERS = 4
TAKERS = 8
DEPOSIT = Decimal(100_000_000)
# Any answer to a cancellation but these is worth a second try.
CANNOT_CANCEL = ("ORDER_NOT_CANCELLABLE", "ORDER_NOT_FOUND")


class Traders:
    """Accounts 0 to MAKERS - 1 quote, the rest take."""

    def __init__(self, exchange: client.Exchange, orders: OwnOrders, steps: Steps, tally: Tally) -> None:
        self._exchange = exchange
        self._orders = orders
        self._steps = steps
        self._tally = tally
        self._run = secrets.token_hex(4)
        self._numbers = itertools.count(1)
        self._sessions: list[client.Session] = []
        self._makers = itertools.cycle(range(MAKERS))
        self._takers = itertools.cycle(range(MAKERS, MAKERS + TAKERS))
        self._deaf = set(range(MAKERS + TAKERS))
        self._all_listen = asyncio.Event()

    async def create(self, operator: client.Operator) -> None:
        """Register all and fund them."""
        for number in range(MAKERS + TAKERS):
            email = self._email(number)
            session = await client.register(self._exchange, email, secrets.token_urlsafe(18))
            await operator.deposit((await session.me()).user_id, ASSET, DEPOSIT, reference=email)
            self._sessions.append(session)

    async def listen(self) -> None:
        """Take in all traders' messages until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for number in range(len(self._sessions)):
                tasks.create_task(self._listen(number))

    async def until_listening(self) -> None:
        """Returns when messages of all traders arrive."""
        await self._all_listen.wait()

    async def quote(self, quotes: Iterable[tuple[Side, int, int]]) -> None:
        """Let the next maker place orders of (side, ticks, lots) that rest."""
        self._tally.quotes += len(await self._place(next(self._makers), "MAKER", "GTC", quotes))

    async def take(self, wanted: Iterable[tuple[Side, int, int]]) -> list[Order]:
        """Let the next taker send orders of (side, worst ticks, lots), in this order, that trade at once or not."""
        orders = await self._place(next(self._takers), "TAKER", "IOC", wanted)
        self._tally.takers += len(orders)
        return orders

    async def cancel(self, client_ids: Iterable[str]) -> None:
        """Ask for the end of orders; those that are over meanwhile are let be."""
        await asyncio.gather(*(self._cancel(order) for order in map(self._orders.get, client_ids) if order is not None))

    async def cancel_all(self) -> None:
        """Ask for the end of all orders of the makers."""
        await asyncio.gather(*(session.cancel_all(INSTRUMENT) for session in self._sessions[:MAKERS]))

    async def count_open(self) -> int:
        """Orders that are open, as the exchange lists them."""
        listed = [session.orders(status=status) for session in self._sessions for status in OPEN_STATUSES]
        return sum([1 for orders in listed async for _ in orders])

    def _email(self, number: int) -> str:
        name = f"maker-{number + 1}" if number < MAKERS else f"taker-{number - MAKERS + 1}"
        return f"demo-{self._run}-{name}@demo.example"

    async def _place(
        self, number: int, role: Role, time_in_force: TimeInForce, wanted: Iterable[tuple[Side, int, int]]
    ) -> list[Order]:
        sent_at = time.monotonic()
        orders = [Order(f"{self._run}-{next(self._numbers)}", number, role, *order, sent_at) for order in wanted]
        if not orders:
            return orders
        for order in orders:
            self._orders.send(order)
        results = await self._sessions[number].place_all([self._new_order(order, time_in_force) for order in orders])
        self._tally.answered.add(time.monotonic() - sent_at)
        for order, result in zip(orders, results, strict=True):
            self._orders.answer(order.client_id, result)
        return orders

    async def _cancel(self, order: Order) -> None:
        if order.order_id is None or order.is_leaving:
            return
        order.is_leaving = True
        self._tally.cancels += 1
        try:
            await self._sessions[order.account].cancel(order.order_id)
        except client.Refused as refusal:
            if refusal.code not in CANNOT_CANCEL:
                raise

    def _new_order(self, order: Order, time_in_force: TimeInForce) -> client.NewOrder:
        return client.NewOrder(
            instrument_id=INSTRUMENT,
            side=order.side,
            type="LIMIT",
            price=order.price * self._steps.tick,
            quantity=order.lots * self._steps.lot,
            time_in_force=time_in_force,
            client_order_id=order.client_id,
        )

    async def _listen(self, number: int) -> None:
        async for message in client.user_messages(self._sessions[number]):
            if message.channel == "order":
                self._orders.hear(message.as_order(), time.monotonic())
            elif message.channel == "fill":
                self._tally.trades += message.as_fill().role == "TAKER"
            elif message.channel == "auth":
                self._deaf.discard(number)
                if not self._deaf:
                    self._all_listen.set()
                await self._catch_up(number)

    async def _catch_up(self, number: int) -> None:
        """Look up what the socket may have missed while it was away."""
        for order in self._orders.of_account(number):
            if order.order_id is not None:
                view = await self._sessions[number].order(order.order_id)
                self._orders.hear(view, time.monotonic())

"""The makers and takers, and what they send."""

import asyncio
import itertools
import secrets
import time
from collections.abc import Iterable
from decimal import Decimal
from typing import Any

from demo.exchange import Account, Exchange, Refused
from demo.messages import Side, Steps
from demo.own_orders import Order, OwnOrders, Role
from demo.tally import Tally

INSTRUMENT = "BTC-USDT-PERP"
ASSET = "USDT"
MAKERS = 4
TAKERS = 8
DEPOSIT = Decimal(100_000_000)
OPEN_STATUSES = ("PENDING", "ACCEPTED", "PLACED", "PARTIALLY_FILLED", "CANCEL_REQUESTED")
# Any answer to a cancellation but these is worth a second try.
CANNOT_CANCEL = ("ORDER_NOT_CANCELLABLE", "ORDER_NOT_FOUND")


class Traders:
    """Accounts 0 to MAKERS - 1 quote, the rest take."""

    def __init__(self, exchange: Exchange, orders: OwnOrders, steps: Steps, tally: Tally) -> None:
        self._exchange = exchange
        self._orders = orders
        self._steps = steps
        self._tally = tally
        self._run = secrets.token_hex(4)
        self._numbers = itertools.count(1)
        self._accounts = [Account(self._email(number), secrets.token_urlsafe(18)) for number in range(MAKERS + TAKERS)]
        self._makers = itertools.cycle(range(MAKERS))
        self._takers = itertools.cycle(range(MAKERS, MAKERS + TAKERS))
        self._deaf = set(range(MAKERS + TAKERS))
        self._all_listen = asyncio.Event()

    async def create(self, admin: Account) -> None:
        """Register all and fund them."""
        for account in self._accounts:
            await self._exchange.register(account)
            deposit = {"userId": account.user_id, "asset": ASSET, "amount": f"{DEPOSIT:f}", "reference": account.email}
            await self._exchange.call("POST", "/api/ledger/deposits", admin, json=deposit)

    async def listen(self) -> None:
        """Take in all traders' messages until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for number in range(len(self._accounts)):
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
        path = f"/api/orders?instrumentId={INSTRUMENT}"
        await asyncio.gather(*(self._exchange.call("DELETE", path, account) for account in self._accounts[:MAKERS]))

    async def count_open(self) -> int:
        """Orders that are open, as the exchange lists them (up to 500 per trader and status)."""
        queries = [
            self._exchange.call("GET", "/api/orders", account, params={"status": status, "limit": "500"})
            for account in self._accounts
            for status in OPEN_STATUSES
        ]
        return sum([len((await query)["items"]) for query in queries])

    def _email(self, number: int) -> str:
        name = f"maker-{number + 1}" if number < MAKERS else f"taker-{number - MAKERS + 1}"
        return f"demo-{self._run}-{name}@demo.example"

    async def _place(
        self, number: int, role: Role, time_in_force: str, wanted: Iterable[tuple[Side, int, int]]
    ) -> list[Order]:
        sent_at = time.monotonic()
        orders = [Order(f"{self._run}-{next(self._numbers)}", number, role, *order, sent_at) for order in wanted]
        if not orders:
            return orders
        for order in orders:
            self._orders.send(order)
        body = {"orders": [self._document(order, time_in_force) for order in orders]}
        results = await self._exchange.call("POST", "/api/orders/batch", self._accounts[number], json=body)
        self._tally.answered.add(time.monotonic() - sent_at)
        for order, result in zip(orders, results["results"], strict=True):
            self._orders.answer(order.client_id, result)
        return orders

    async def _cancel(self, order: Order) -> None:
        if order.order_id is None or order.is_leaving:
            return
        order.is_leaving = True
        self._tally.cancels += 1
        try:
            await self._exchange.call("DELETE", f"/api/orders/{order.order_id}", self._accounts[order.account])
        except Refused as refusal:
            if refusal.code not in CANNOT_CANCEL:
                raise

    def _document(self, order: Order, time_in_force: str) -> dict[str, str]:
        return {
            "instrumentId": INSTRUMENT,
            "side": order.side,
            "type": "LIMIT",
            "price": f"{order.price * self._steps.tick:f}",
            "quantity": f"{order.lots * self._steps.lot:f}",
            "timeInForce": time_in_force,
            "stpMode": "EXPIRE_TAKER",
            "clientOrderId": order.client_id,
        }

    async def _listen(self, number: int) -> None:
        async for message in self._exchange.user_messages(self._accounts[number]):
            data: dict[str, Any] = message["data"]
            if message["channel"] == "order":
                self._orders.hear(data, time.monotonic())
            elif message["channel"] == "fill" and data["role"] == "TAKER":
                self._tally.trades += 1
            elif message["channel"] == "auth":
                self._deaf.discard(number)
                if not self._deaf:
                    self._all_listen.set()
                await self._catch_up(number)

    async def _catch_up(self, number: int) -> None:
        """Look up what the socket may have missed while it was away."""
        for order in self._orders.of_account(number):
            if order.order_id is not None:
                view = await self._exchange.call("GET", f"/api/orders/{order.order_id}", self._accounts[number])
                self._orders.hear(view, time.monotonic())

"""What the exchange has made of our orders, as its answers and messages say."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import client
from demo.messages import Side, Steps
from demo.quoting import Quote
from demo.tally import Tally

Role = Literal["MAKER", "TAKER"]
REFUSED_STATUSES = frozenset({"FAILED", "REJECTED"})


@dataclass(slots=True)
class Order:
    """One of our orders, in ticks and lots; `account` is the index of its trader. Times by a monotonic clock, in s."""

    client_id: str
    account: int
    role: Role
    side: Side
    price: int
    lots: int
    sent_at: float
    order_id: int | None = None
    filled: int = 0
    is_heard: bool = False
    is_done: bool = False
    is_leaving: bool = False


class OwnOrders:
    """Our orders that are not over yet, by client id, and the counting of what happens to them."""

    def __init__(self, tally: Tally, steps: Steps) -> None:
        self._tally = tally
        self._steps = steps
        self._open: dict[str, Order] = {}
        self._changed = asyncio.Event()

    def send(self, order: Order) -> None:
        """Remember an order that is about to be sent."""
        self._open[order.client_id] = order

    def answer(self, client_id: str, result: client.Order | client.Refused) -> None:
        """Take in the answer to an order: an order, or why not; a repeated order is the first one."""
        order = self._open.get(client_id)
        view = result.order if isinstance(result, client.Refused) else result
        if order is None:
            return
        if view is not None:
            order.order_id = view.order_id
        elif isinstance(result, client.Refused):
            self._tally.refusals[result.code] += 1
            self._end(order)

    def hear(self, view: client.Order, now: float) -> None:
        """Take in the state of an order. Orders that are over or not ours change nothing."""
        order = self._open.get(view.client_order_id or "")
        if order is None:
            return
        order.order_id = view.order_id
        filled = self._steps.lots(view.filled_quantity)
        if order.role == "TAKER":
            self._tally.ours.volume += filled - order.filled
        order.filled = filled
        if view.status in REFUSED_STATUSES:
            self._tally.refusals[str(view.failure_reason)] += 1
        elif not order.is_heard and view.status in ("PLACED", "PARTIALLY_FILLED", "FILLED"):
            order.is_heard = True
            (self._tally.placed if order.role == "MAKER" else self._tally.filled).add(now - order.sent_at)
        if view.is_final:
            self._end(order)
        self._changed.set()

    def get(self, client_id: str) -> Order | None:
        """The order while it is not over."""
        return self._open.get(client_id)

    def of_account(self, account: int) -> list[Order]:
        """A trader's orders that are not over."""
        return [order for order in self._open.values() if order.account == account]

    def quotes(self) -> list[Quote]:
        """The makers' orders that are not over, oldest first."""
        return [
            Quote(order.client_id, order.side, order.price, order.lots - order.filled, order.is_leaving)
            for order in self._open.values()
            if order.role == "MAKER"
        ]

    async def until(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Wait until `condition` holds, for at most `seconds`; whether it does. Looks after every message."""
        try:
            async with asyncio.timeout(seconds):
                while not condition():
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            return condition()
        return True

    def _end(self, order: Order) -> None:
        order.is_done = True
        del self._open[order.client_id]
        self._changed.set()

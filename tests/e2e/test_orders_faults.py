"""kill -9 while orders flow: no answered order is lost, none is doubled, all come to rest, the books are clean."""

import asyncio
import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from clients import connect_temporal
from domain.contracts.margin import MARGIN_CHANGE
from tests.exchange import BTC, MOVING, Exchange, Trader
from tests.waiting import until

SETTLED_SECONDS = 40
CLIENTS = 4
ROUNDS = 2


@dataclass
class Client:
    """One trader who sends orders until told to stop, and repeats each until it is answered."""

    trader: Trader
    dice: random.Random
    names: Iterator[int]
    # Order id by clientOrderId, as answered.
    answered: dict[str, int] = field(default_factory=dict)
    repeats: int = 0

    async def trade(self, stop: asyncio.Event) -> None:
        """Mostly orders around one price, some batches and cancellations."""
        while not stop.is_set():
            action = self.dice.random()
            if action < 0.1:
                await self._request("DELETE", "/api/orders", None)
            elif action < 0.25 and self.answered:
                order_id = self.dice.choice(list(self.answered.values()))
                await self._request("DELETE", f"/api/orders/{order_id}", None)
            elif action < 0.4:
                await self._batch([self._order() for _ in range(5)])
            else:
                order = self._order()
                self._note(order, (await self._request("POST", "/api/orders", order)).json())
            await asyncio.sleep(0.01)

    def _order(self) -> dict[str, Any]:
        return {
            "instrumentId": BTC,
            "side": self.dice.choice(["BUY", "SELL"]),
            "type": "LIMIT",
            "price": str(60_000 + self.dice.randint(-5, 5)),
            "quantity": f"0.00{self.dice.randint(1, 9)}",
            "clientOrderId": f"{self.trader.user_id}-{next(self.names)}",
        }

    async def _batch(self, orders: list[dict[str, Any]]) -> None:
        results = (await self._request("POST", "/api/orders/batch", {"orders": orders})).json()["results"]
        for order, result in zip(orders, results, strict=True):
            self._note(order, result)

    def _note(self, order: dict[str, Any], answer: dict[str, Any]) -> None:
        # A repeat whose first try was taken is answered with the first order.
        view = answer.get("order", answer)
        assert view["clientOrderId"] == order["clientOrderId"]
        self.answered[order["clientOrderId"]] = view["orderId"]

    async def _request(self, method: str, path: str, body: dict[str, Any] | None) -> httpx.Response:
        """The answer, asked for until there is one: a broken connection or 503 says nothing about the request."""
        while True:
            try:
                answer = await self.trader.client.request(method, path, json=body)
                if answer.status_code < 500:
                    assert answer.status_code in (200, 400, 409), answer.text
                    return answer
                assert answer.status_code == 503, answer.text
            except httpx.TransportError:
                await asyncio.sleep(0.05)
            self.repeats += 1
            await asyncio.sleep(0.05)


@pytest.mark.parametrize(
    "victims",
    [["api"], ["worker"], ["engine"], ["temporal"], ["temporal", "valkey", "engine", "worker", "market", "api"]],
    ids="+".join,
)
async def test_orders_survive_kill_9_of(exchange: Exchange, admin: Trader, victims: list[str]) -> None:
    dice = random.Random("+".join(victims))
    names = itertools.count()
    clients = [
        Client(await exchange.trader(admin, "100000"), random.Random(dice.random()), names) for _ in range(CLIENTS)
    ]
    stop = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        for client in clients:
            tasks.create_task(client.trade(stop))
        for _ in range(ROUNDS):
            await asyncio.sleep(dice.uniform(0.3, 1))
            for victim in victims:
                exchange.kill(victim)
            await asyncio.sleep(dice.uniform(0, 0.5))
            exchange.start(*victims)
            await exchange.until_ready()
        await asyncio.sleep(0.3)
        stop.set()
    await exchange.until_settled(SETTLED_SECONDS)

    for client in clients:
        assert client.answered
        found = {order["clientOrderId"]: order for order in await client.trader.pages("/api/orders", 500)}
        assert {name: order["orderId"] for name, order in found.items()} == client.answered
        assert not {order["status"] for order in found.values()} & MOVING
        known = await client.trader.order(next(iter(client.answered.values())))
        assert known == found[known["clientOrderId"]]
    if victims == ["api"]:
        assert sum(client.repeats for client in clients) > 0
    await assert_logs_are_whole(exchange)
    await exchange.audit(admin)


async def test_a_change_of_leverage_that_an_operator_ends_is_answered_with_503(
    exchange: Exchange, admin: Trader
) -> None:
    trader = await exchange.trader(admin)
    temporal = await connect_temporal(exchange.settings)
    exchange.kill("worker")
    request = asyncio.create_task(trader.client.put(f"/api/positions/{BTC}/leverage", json={"leverage": 5}))

    async def running() -> list[str]:
        query = f"WorkflowType = '{MARGIN_CHANGE}' AND ExecutionStatus = 'Running'"
        return [found.id async for found in temporal.list_workflows(query)]

    async def has_begun() -> bool:
        return bool(await running())

    try:
        await until(has_begun, 5, "the change to begin")
        (change_id,) = await running()
        await temporal.get_workflow_handle(change_id).terminate()
        answer = await request
    finally:
        exchange.start("worker")
    assert (answer.status_code, answer.json()["code"]) == (503, "OVERLOADED")
    assert change_id in answer.json()["detail"]
    await exchange.until_ready()
    await exchange.audit(admin)


async def assert_logs_are_whole(exchange: Exchange) -> None:
    """Commands and events are gapless, and every order that left PENDING for the engine was entered once."""
    for table in ("commands", "events"):
        rows = await exchange.pool.fetch(
            f"SELECT instrument_id FROM matching.{table} GROUP BY instrument_id"
            " HAVING count(*) <> max(seq) OR min(seq) <> 1"
        )
        assert rows == [], table
    entered = await exchange.pool.fetch(
        "SELECT o.order_id FROM orders.orders o LEFT JOIN (SELECT (payload::json ->> 'order_id')::bigint AS order_id"
        "   FROM matching.commands WHERE payload::json ->> 'kind' = 'NEW') c USING (order_id)"
        " WHERE o.status <> 'FAILED' GROUP BY o.order_id HAVING count(c.order_id) <> 1"
    )
    assert entered == []

"""SIGTERM while orders flow: what was answered is in the engine when the api has ended, without the sweeper's help."""

import asyncio
import signal

import httpx

from tests.exchange import BTC, Exchange, Trader
from tests.waiting import until

ORDER = {"instrumentId": BTC, "side": "BUY", "type": "LIMIT", "price": "50000", "quantity": "0.001"}


async def test_the_api_answers_and_hands_over_all_it_took_in_before_it_ends(exchange: Exchange, admin: Trader) -> None:
    # Several: each may have so many open orders only.
    traders = [await exchange.trader(admin, "1000000000") for _ in range(8)]
    # Its sweeper would bring up what the api left lying, and its pollers would help.
    exchange.kill("worker")
    answered: list[int] = []

    async def send(trader: Trader) -> None:
        try:
            while True:
                answer = await trader.client.post("/api/orders/batch", json={"orders": [ORDER] * 250})
                assert answer.status_code == 200, answer.text
                answered.extend(result["orderId"] for result in answer.json()["results"])
        except httpx.TransportError:
            return

    senders = [asyncio.create_task(send(trader)) for trader in traders]
    await until(lambda: _many(answered), 20, "orders to be answered")
    exchange.signal("api", signal.SIGTERM)
    await asyncio.wait_for(asyncio.gather(*senders), 30)
    await until(lambda: _ended(exchange), 25, "the api to end")
    assert await exchange.pool.fetchval("SELECT count(*) FROM orders.sagas WHERE NOT done") == 0
    # Settlement, which makes them PLACED, is the worker's.
    statuses = await exchange.pool.fetch("SELECT status FROM orders.orders WHERE order_id = ANY($1)", answered)
    assert [row["status"] for row in statuses] == ["ACCEPTED"] * len(answered)
    exchange.start("worker", "api")
    await exchange.until_ready()
    await exchange.until_settled(60)
    for trader in traders:
        assert (await trader.client.delete("/api/orders")).status_code == 200
    await exchange.until_settled(60)
    await exchange.audit(admin)


async def _many(answered: list[int]) -> bool:
    return len(answered) >= 4_000


async def _ended(exchange: Exchange) -> bool:
    return not exchange.is_running("api")

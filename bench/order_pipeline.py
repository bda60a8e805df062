"""Orders per second from the public API to settled positions, against bare Temporal in the same run.

`python -m bench.order_pipeline`: prints the figures, and the ratios that are the claim.
"""

import argparse
import asyncio
import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

from bench.bare_temporal import bare_rate
from bench.exchange import Addresses, Api, Trader, open_api, percentile, running_exchange, wait_settled

INSTRUMENT = "BTC-USDT-PERP"
PRICE = "60000"
BATCH = 500
BATCH_SENDERS = 4
TRADERS = 8
DEPOSIT = "100000000"
# Nobody is refused, also where 500 requests wait for each other on a slow machine (bench/edge.py tries that).
PATIENT = {"EXCHANGE_REQUEST_WAIT_SECONDS_MAX": "60"}


@dataclass(frozen=True)
class Latency:
    """Milliseconds from sending to the answer."""

    p50: float
    p99: float


def order(side: str) -> dict[str, str]:
    """One lot at the agreed price: every buy meets a sell."""
    return {"instrumentId": INSTRUMENT, "side": side, "type": "LIMIT", "price": PRICE, "quantity": "0.001"}


async def batch_rate(api: Api, addresses: Addresses, traders: Sequence[Trader], orders: int) -> tuple[float, float]:
    """Orders per second through the batch endpoint until all are settled, and until all were answered."""
    first = await _next_order_id(api, traders[0])
    pairs = [(traders[2 * n], traders[2 * n + 1]) for n in range(BATCH_SENDERS)]
    rounds = math.ceil(orders / (BATCH * 2 * BATCH_SENDERS))

    async def send(buyer: Trader, seller: Trader) -> None:
        for _ in range(rounds):
            # A trader keeps to one side, so that nobody meets an order of their own.
            for trader, side in ((buyer, "BUY"), (seller, "SELL")):
                answer = await api.call("POST", "/api/orders/batch", trader.headers, {"orders": [order(side)] * BATCH})
                assert all("orderId" in result for result in answer["results"])

    started = time.perf_counter()
    await asyncio.gather(*(send(*pair) for pair in pairs))
    answered = time.perf_counter() - started
    filled = await wait_settled(addresses.database, first)
    settled = time.perf_counter() - started
    sent = rounds * BATCH * 2 * BATCH_SENDERS
    assert filled == sent, f"Expected {sent} orders filled, was {filled}"
    return sent / settled, sent / answered


async def single_rate(
    api: Api, addresses: Addresses, traders: Sequence[Trader], connections: int, seconds: float
) -> tuple[float, Latency]:
    """Orders per second, one per request, until all are settled; and how long the PENDING answers took."""
    first = await _next_order_id(api, traders[0])
    deadline = time.perf_counter() + seconds
    answers: list[float] = []
    sides = itertools.cycle(("BUY", "SELL"))

    async def send(trader: Trader, side: str) -> None:
        while time.perf_counter() < deadline:
            sent = time.perf_counter()
            await api.call("POST", "/api/orders", trader.headers, order(side))
            answers.append(time.perf_counter() - sent)

    started = time.perf_counter()
    await asyncio.gather(*(send(traders[n % len(traders)], next(sides)) for n in range(connections)))
    await wait_settled(addresses.database, first)
    return len(answers) / (time.perf_counter() - started), _latency(answers)


async def placed_latency(api: Api, traders: Sequence[Trader], in_flight: int, seconds: float) -> Latency:
    """How long `?wait=placed` answers take."""
    deadline = time.perf_counter() + seconds
    answers: list[float] = []

    async def send(trader: Trader, side: str) -> None:
        while time.perf_counter() < deadline:
            sent = time.perf_counter()
            answer = await api.call("POST", "/api/orders?wait=placed", trader.headers, order(side))
            assert answer["status"] in ("PLACED", "FILLED"), answer
            answers.append(time.perf_counter() - sent)

    sides = itertools.cycle(("BUY", "SELL"))
    await asyncio.gather(*(send(traders[n % len(traders)], next(sides)) for n in range(in_flight)))
    return _latency(answers)


def _latency(seconds: Sequence[float]) -> Latency:
    return Latency(percentile(seconds, 0.5) * 1000, percentile(seconds, 0.99) * 1000)


async def _next_order_id(api: Api, trader: Trader) -> int:
    """An id that every later order exceeds: that of an order of our own, which is cancelled at once."""
    body = {**order("BUY"), "price": "45000"}
    placed = await api.call("POST", "/api/orders?wait=placed", trader.headers, body)
    await api.call("DELETE", f"/api/orders/{placed['orderId']}", trader.headers)
    return int(placed["orderId"]) + 1


async def measure(seconds: float, batch_orders: int) -> bool:
    """Run everything once and print it; whether the audit was clean."""
    with running_exchange(PATIENT) as addresses:
        async with open_api(addresses, 600) as api:
            traders = await api.traders(TRADERS, DEPOSIT)
            admin = await api.admin()
            await api.call("POST", f"/api/admin/mark-price/{INSTRUMENT}", admin, {"price": PRICE})
            bare = await bare_rate(addresses.temporal, seconds)
            print(f"bare Temporal, one workflow per order   {bare:9.0f} orders/s")
            settled, answered = await batch_rate(api, addresses, traders, batch_orders)
            print(f"batches of {BATCH}, answered                 {answered:9.0f} orders/s")
            print(
                f"batches of {BATCH}, settled                  {settled:9.0f} orders/s   {settled / bare:6.1f} x bare"
            )
            for in_flight in (1, 50, 500):
                rate, pending = await single_rate(api, addresses, traders, in_flight, seconds)
                placed = await placed_latency(api, traders, in_flight, seconds)
                print(
                    f"single orders, {in_flight:3} in flight, settled     {rate:9.0f} orders/s"
                    f"   {rate / bare:6.1f} x bare"
                    f"   PENDING p50 {pending.p50:6.1f} p99 {pending.p99:6.1f} ms"
                    f"   placed p50 {placed.p50:6.1f} p99 {placed.p99:6.1f} ms"
                )
            await wait_settled(addresses.database, 0)
            clean = await api.audit_is_clean()
            print(f"audit {'clean' if clean else 'NOT CLEAN'}")
            return clean


def main(seconds: float = 10, batch_orders: int = 40_000) -> None:
    """Measure; `seconds` is the length of each timed part."""
    if not asyncio.run(measure(seconds, batch_orders)):
        raise SystemExit(1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=10, help="length of each timed part")
    parser.add_argument(
        "--batch-orders",
        type=int,
        default=40_000,
        help=f"orders through the batch endpoint, rounded up to {BATCH * 2 * BATCH_SENDERS}",
    )
    main(**vars(parser.parse_args()))

"""How long an order takes that relies on what the answer before it said.

`python -m bench own_writes`: pairs of orders with `?wait=placed`. The first opens a position; the second, sent as soon
as the first is FILLED, closes it and is reduce-only, so that it waits until settlement has got there. The claim is that
it takes at most 1.5 times as long.
"""

import argparse
import asyncio
import itertools
import time

from bench.exchange import Addresses, Api, Trader, open_api, percentile, running_exchange, wait_settled
from bench.order_pipeline import INSTRUMENT, PRICE, order

CLAIM_RATIO = 1.5
WARM_UP = 20
# What takers pay, a little to each side of the mark: the maker's quotes of a pair are there before it.
PRICES = {"BUY": "60010", "SELL": "59990"}
OTHER = {"BUY": "SELL", "SELL": "BUY"}


async def place(api: Api, trader: Trader, side: str, price: str, status: str, *, reduce_only: bool = False) -> float:
    """Milliseconds from sending an order to the answer that it has this status."""
    body = order(side) | {"price": price, "reduceOnly": reduce_only}
    sent = time.perf_counter()
    answer = await api.call("POST", "/api/orders?wait=placed", trader.headers, body)
    taken = 1000 * (time.perf_counter() - sent)
    assert answer["status"] == status, answer
    return taken


async def pair(api: Api, addresses: Addresses, maker: Trader, trader: Trader, side: str) -> tuple[float, float]:
    """How long it took to open a position, and to close it, with nothing else going on."""
    for taken, price in PRICES.items():
        await place(api, maker, OTHER[taken], price, "PLACED")
    await wait_settled(addresses.database, 0)
    opened = await place(api, trader, side, PRICES[side], "FILLED")
    return opened, await place(api, trader, OTHER[side], PRICES[OTHER[side]], "FILLED", reduce_only=True)


async def measure(addresses: Addresses, count: int) -> bool:
    """Print the figures; whether the claim holds and the audit is clean."""
    async with open_api(addresses, 10) as api:
        maker, trader = await api.traders(2, "1000000")
        await api.call("POST", f"/api/admin/mark-price/{INSTRUMENT}", await api.admin(), {"price": PRICE})
        sides = itertools.islice(itertools.cycle(OTHER), WARM_UP + count)
        pairs = [await pair(api, addresses, maker, trader, side) for side in sides][WARM_UP:]
        p50 = [percentile(times, 0.5) for times in zip(*pairs, strict=True)]
        for name, times in zip(("opens", "closes at once"), zip(*pairs, strict=True), strict=True):
            print(f"{name:15} p50 {percentile(times, 0.5):6.1f} p99 {percentile(times, 0.99):6.1f} ms")
        print(f"{count} pairs; the second takes {p50[1] / p50[0]:.2f} x the first (p50)")
        await wait_settled(addresses.database, 0)
        return await api.audit_is_clean() and p50[1] <= CLAIM_RATIO * p50[0]


def main(pairs: int = 200) -> None:
    """Print the figures."""
    with running_exchange() as addresses:
        holds = asyncio.run(measure(addresses, pairs))
    if not holds:
        raise SystemExit(f"Expected the second order within {CLAIM_RATIO} x the first, and a clean audit")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=200)
    main(**vars(parser.parse_args()))

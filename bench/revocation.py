"""How soon a session that was ended is refused by every api process, and its sockets are closed.

`python -m bench revocation`: two api processes of one exchange, sockets and calls at both, idle and beside a load of
orders. The claim is that the slowest of all takes less than a second.
"""

import argparse
import asyncio
import contextlib
import itertools
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace

import aiohttp
import psutil
from websockets.asyncio.client import ClientConnection, connect

from bench.exchange import PASSWORD, READY_SECONDS, ROOT, Addresses, Api, Trader, percentile, running_exchange
from bench.order_pipeline import order
from stack.ports import free_port

EMAIL = "alice@bench.local"
CLAIM_SECONDS = 1.0
LOADING = 20
UNAUTHENTICATED_CLOSE = 4401


def first_api(addresses: Addresses) -> psutil.Process:
    """The stack's own."""
    children = psutil.Process(addresses.stack_pid).children(recursive=True)
    return next(child for child in children if child.cmdline()[-2:] == ["-m", "api"])


@contextmanager
def second_api(addresses: Addresses) -> Iterator[Addresses]:
    """Another api process of the same exchange, stopped in the end."""
    port = free_port()
    own = {"EXCHANGE_API_PORT": str(port), "EXCHANGE_TEMPORAL_METRICS_PORT": str(free_port())}
    environment = first_api(addresses).environ() | own
    process = subprocess.Popen(
        [sys.executable, "-m", "api"], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        yield replace(addresses, api=f"http://127.0.0.1:{port}")
    finally:
        process.terminate()
        process.wait(60)


async def until_ready(session: aiohttp.ClientSession, addresses: Addresses) -> None:
    """Returns when the api serves."""
    async with asyncio.timeout(READY_SECONDS):
        while True:
            with contextlib.suppress(aiohttp.ClientConnectionError):
                async with session.get(f"{addresses.api}/health/ready") as answer:
                    if answer.status == 200:
                        return
            await asyncio.sleep(0.1)


@asynccontextmanager
async def socket_of(addresses: Addresses, token: str) -> AsyncIterator[ClientConnection]:
    """An open socket of the session."""
    async with connect(f"{addresses.api.replace('http', 'ws', 1)}/ws/user", proxy=None) as socket:
        await socket.send(f'{{"op":"auth","token":"{token}"}}')
        assert '"auth"' in str(await socket.recv())
        yield socket


async def closed(socket: ClientConnection) -> float:
    """When the socket was closed for want of a session."""
    await socket.wait_closed()
    assert socket.close_code == UNAUTHENTICATED_CLOSE, socket.close_code
    return time.perf_counter()


async def refused(session: aiohttp.ClientSession, addresses: Addresses, headers: dict[str, str]) -> float:
    """When the api began to refuse the session's token."""
    while True:
        asked = time.perf_counter()
        async with session.get(f"{addresses.api}/api/users/me", headers=headers) as answer:
            if answer.status == 401:
                return asked
            assert answer.status in (200, 503), answer.status
        await asyncio.sleep(0.005)


async def revoke(session: aiohttp.ClientSession, apis: Sequence[Addresses]) -> float:
    """Sign in, use the session everywhere, end it at the first api: seconds until the last place knew."""
    api = Api(session, apis[0])
    signed_in = await api.call("POST", "/api/auth/login", body={"email": EMAIL, "password": PASSWORD})
    headers = {"Authorization": f"Bearer {signed_in['accessToken']}"}
    async with contextlib.AsyncExitStack() as stack:
        sockets = [await stack.enter_async_context(socket_of(each, signed_in["accessToken"])) for each in apis]
        for each in apis:
            await Api(session, each).call("GET", "/api/users/me", headers)
        noticed = [asyncio.create_task(closed(socket)) for socket in sockets]
        begun = time.perf_counter()
        await api.call("POST", "/api/auth/logout", headers)
        noticed += [asyncio.create_task(refused(session, each, headers)) for each in apis]
        return max(await asyncio.gather(*noticed)) - begun


async def place_orders(api: Api, trader: Trader, side: str) -> None:
    """Orders until cancelled, each after the answer to the last. On one side: nobody meets an order of their own."""
    while True:
        await api.call("POST", "/api/orders", trader.headers, order(side))


async def measure(addresses: Addresses, second: Addresses, count: int) -> bool:
    """Print the figures; whether the claim holds."""
    holds = True
    async with aiohttp.ClientSession() as session:
        api = Api(session, addresses)
        await until_ready(session, second)
        traders = await api.traders(LOADING, "100000000")
        await api.call("POST", "/api/users", body={"email": EMAIL, "password": PASSWORD})
        for what, loading in (("idle", 0), (f"beside {LOADING} who place orders", LOADING)):
            placing = zip(traders[:loading], itertools.cycle(("BUY", "SELL")), strict=False)
            load = [asyncio.create_task(place_orders(api, trader, side)) for trader, side in placing]
            seconds = [await revoke(session, [addresses, second]) for _ in range(count)]
            for task in load:
                assert not task.done(), task
                task.cancel()
            p50, p99, most = (1000 * percentile(seconds, share) for share in (0.5, 0.99, 1))
            print(f"{what}: {count} sessions ended; p50 {p50:.1f} ms, p99 {p99:.1f} ms, max {most:.1f} ms")
            holds = holds and max(seconds) < CLAIM_SECONDS
        return await api.audit_is_clean() and holds


def main(sessions: int = 200) -> None:
    """Print the figures."""
    with running_exchange() as addresses, second_api(addresses) as second:
        holds = asyncio.run(measure(addresses, second, sessions))
    if not holds:
        raise SystemExit("Expected every revocation within a second, and a clean audit")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sessions", type=int, default=200)
    main(**vars(parser.parse_args()))

"""The market process in this process, and an engine's log to feed it, for the tests of market data and sockets."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TypeVar

from redis.asyncio import Redis

from domain.instruments import SHIPPED
from domain.matching import AnyEvent, Placed, Side, Trade, encode
from market.main import serve
from settings import Settings
from storage.db import Pool

BTC, ETH, SOL = (instrument.instrument_id for instrument in SHIPPED)
WAIT_SECONDS = 10.0
Value = TypeVar("Value")


class EngineLog:
    """Does what the engine does with its events: the log and its position in one transaction, then the hint."""

    def __init__(self, pool: Pool, redis: Redis) -> None:
        self._pool = pool
        self._redis = redis

    async def append(self, instrument_id: str, events: Sequence[AnyEvent], *, hint: bool = True) -> None:
        """Write `events`; without the hint they can be found in the log only."""
        payloads = [encode(event) for event in events]
        async with self._pool.acquire() as conn, conn.transaction():
            last = await conn.fetchval(
                "UPDATE matching.cursors SET event_seq = event_seq + $2 WHERE instrument_id = $1 RETURNING event_seq",
                instrument_id,
                len(events),
            )
            first = last - len(events) + 1
            await conn.execute(
                "INSERT INTO matching.events (instrument_id, seq, command_seq, payload)"
                " SELECT $1, $2 + n - 1, n, payload::json FROM unnest($3::text[]) WITH ORDINALITY AS e (payload, n)",
                instrument_id,
                first,
                [payload.decode() for payload in payloads],
            )
        if hint:
            head = f'{{"instrumentId":"{instrument_id}","firstSeq":{first},"lastSeq":{last},"events":['
            await self._redis.publish(f"engine:{instrument_id}", head.encode() + b",".join(payloads) + b"]}")


def placed(order_id: int, side: Side, price: int, quantity: int) -> Placed:
    """An order of `quantity` lots that rests at `price` ticks."""
    return Placed(at=now_ms(), order_id=order_id, user_id=1, side=side, price=price, quantity=quantity)


def trade(trade_id: int, maker_order_id: int, price: int, quantity: int, maker_remaining: int) -> Trade:
    """A sale of `quantity` lots to a resting buyer, now."""
    return Trade(
        at=now_ms(),
        trade_id=trade_id,
        price=price,
        quantity=quantity,
        taker_side="SELL",
        maker_order_id=maker_order_id,
        maker_user_id=1,
        maker_remaining=maker_remaining,
        maker_fee=0,
        taker_order_id=9_999,
        taker_user_id=2,
        taker_remaining=0,
        taker_fee=0,
        taker_price=price,
        taker_liquidation=False,
    )


def now_ms() -> int:
    """Unix milliseconds."""
    return time.time_ns() // 1_000_000


@asynccontextmanager
async def running_market(pool: Pool, redis: Redis, settings: Settings) -> AsyncIterator[None]:
    """The market process, stopped at the end."""
    stop = asyncio.Event()
    task = asyncio.create_task(serve(pool, redis, settings, stop))
    try:
        yield
    finally:
        stop.set()
        await task


async def eventually(read: Callable[[], Awaitable[Value | None]]) -> Value:
    """The first value of `read` that is neither None nor false. Raises TimeoutError."""
    async with asyncio.timeout(WAIT_SECONDS):
        while True:
            value = await read()
            if value:
                return value
            await asyncio.sleep(0.02)

"""The market process in this process, and an engine's log to feed it, for the tests of market data and sockets."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TypeVar

from redis.asyncio import Redis

from domain.clock import from_ms
from domain.instruments import SHIPPED
from domain.matching import AnyEvent, Placed, Side, Trade, encode
from market.main import serve
from settings import Settings
from storage.db import Connection, Pool

INSTRUMENTS = {instrument.instrument_id: instrument for instrument in SHIPPED}
BTC, ETH, SOL = INSTRUMENTS
WAIT_SECONDS = 60.0
Value = TypeVar("Value")


class EngineLog:
    """Does what the engine does with its events: log, tape and position in one transaction, then the hint."""

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
            await self._write_tape(conn, instrument_id, first, events)
        if hint:
            head = f'{{"instrumentId":"{instrument_id}","firstSeq":{first},"lastSeq":{last},"events":['
            await self._redis.publish(f"engine:{instrument_id}", head.encode() + b",".join(payloads) + b"]}")

    async def _write_tape(
        self, conn: Connection, instrument_id: str, first_seq: int, events: Sequence[AnyEvent]
    ) -> None:
        instrument = INSTRUMENTS[instrument_id]
        trades = [
            # The log's number stands for the trade's: tests do not care to keep theirs apart.
            (
                instrument.number * 10**12 + seq,
                instrument_id,
                seq,
                instrument.ticks_to_price(event.price),
                instrument.lots_to_quantity(event.quantity),
                event.taker_side,
                from_ms(event.at),
            )
            for seq, event in enumerate(events, first_seq)
            if isinstance(event, Trade)
        ]
        await conn.executemany(
            "INSERT INTO matching.trade_tickers (trade_id, instrument_id, seq, price, quantity, taker_side,"
            " buy_order_id, sell_order_id, buyer_user_id, seller_user_id, maker_fee, taker_fee, executed_at)"
            " VALUES ($1, $2, $3, $4, $5, $6, 1, 2, 1, 2, 0, 0, $7)",
            trades,
        )


def placed(order_id: int, side: Side, price: int, quantity: int) -> Placed:
    """An order of `quantity` lots that rests at `price` ticks."""
    return Placed(at=now_ms(), order_id=order_id, user_id=1, side=side, price=price, quantity=quantity)


def trade(
    trade_id: int, maker_order_id: int, price: int, quantity: int, maker_remaining: int, at: int | None = None
) -> Trade:
    """A sale of `quantity` lots to a resting buyer, now, or when `at` says."""
    return Trade(
        at=at or now_ms(),
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

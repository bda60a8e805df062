"""A market's checkpoints, its restart, and the deletion of old events, on a Postgres of its own.

Only taking a checkpoint holds up publishing; it is written beside it.
"""

import argparse
import asyncio
import hashlib
import statistics
import time
from collections.abc import Iterator

from bench.engine_process import own_postgres
from domain.instruments import SHIPPED
from domain.matching import AnyEvent, New, Trade, encode
from engine.lease import Lease
from engine.matcher import Matcher
from engine.outgoing import TradeRow, trade_row
from engine.retention import SNAPSHOTS_KEPT, prune
from market.checkpoints import restore, save
from market.feed import EngineFeed
from market.instrument_market import InstrumentMarket
from storage.db import Connection, Pool, open_pool

BTC = SHIPPED[0]
ID = BTC.instrument_id
MID = 600_000
LEVELS = 500
DAY_SECONDS = 24 * 3600
DUMPS = 9


def _commands(orders: int) -> Iterator[New]:
    """Orders that rest on LEVELS prices a side, then a trade in every second of the last day."""
    begin = time.time_ns() // 1_000_000 - 1000 * DAY_SECONDS
    for number in range(orders + DAY_SECONDS):
        rests, buys = number < orders, number % 2 == 0
        offset = 1 + number % LEVELS if rests else -1 - LEVELS
        yield New(
            at=begin + 1000 * max(0, number - orders),
            order_id=number + 1,
            user_id=number + 1,
            side="BUY" if buys else "SELL",
            type="LIMIT",
            time_in_force="GTC" if rests else "IOC",
            price=MID - offset if buys else MID + offset,
            quantity=1_000 if rests else 1,
        )


async def _write_log(conn: Connection, events: list[AnyEvent]) -> None:
    rows = [(ID, seq, 1, encode(event).decode()) for seq, event in enumerate(events, 1)]
    await conn.copy_records_to_table(
        "events", schema_name="matching", columns=["instrument_id", "seq", "command_seq", "payload"], records=rows
    )
    trades = [trade_row(BTC, seq, event) for seq, event in enumerate(events, 1) if isinstance(event, Trade)]
    await conn.copy_records_to_table("trade_tickers", schema_name="matching", columns=TradeRow._fields, records=trades)
    await conn.execute("UPDATE matching.cursors SET event_seq = $2 WHERE instrument_id = $1", ID, len(events))


async def _caught_up(pool: Pool, market: InstrumentMarket) -> int:
    await EngineFeed(pool, {ID: market}, asyncio.Event()).catch_up()
    return market.seq


async def _needless(conn: Connection, seq: int) -> None:
    """Everybody has applied the log up to `seq`, and the engine restarts there."""
    for service in ("risk", "ledger", "orders", "positions"):
        await conn.execute(f"UPDATE {service}.cursors SET applied_seq = $1", seq)
    await conn.execute("UPDATE positions.cursors SET confirmed_seq = $1", seq)
    await conn.execute("INSERT INTO matching.consumers VALUES ($1, 'settlement', $2)", ID, seq)
    checksum = hashlib.sha256(b"").digest()
    for number in range(SNAPSHOTS_KEPT):
        await conn.execute("INSERT INTO matching.snapshots VALUES ($1, $2, $3, 1, $4, '')", ID, number, seq, checksum)


async def _measure(database_url: str, orders: int) -> None:
    matcher = Matcher(BTC)
    events = [event for command in _commands(orders) for event in matcher.apply(command)]
    market = InstrumentMarket(BTC)
    market.apply(1, events[:-1])
    times = []
    for _ in range(DUMPS):
        begun = time.perf_counter()
        payload = market.dump()
        times.append(1000 * (time.perf_counter() - begun))
    print(
        f"{len(market.book.orders):,} resting orders and a day of trades: {len(payload) / 1e6:.1f} MB, taken in"
        f" {statistics.median(times):.1f} ms (median of {DUMPS}, worst {max(times):.1f}), while publishing stands still"
    )
    async with await open_pool(database_url, name="bench") as pool, pool.acquire() as conn:
        await _write_log(conn, events)
        begun = time.perf_counter()
        seq = await _caught_up(pool, InstrumentMarket(BTC))
        print(f"start from the whole log: {time.perf_counter() - begun:.2f} s for {seq:,} events")
        begun = time.perf_counter()
        await save(conn, market)
        print(f"checkpoint taken and written: {time.perf_counter() - begun:.2f} s")
        begun = time.perf_counter()
        assert await _caught_up(pool, await restore(pool, BTC)) == seq
        print(f"start from the checkpoint: {time.perf_counter() - begun:.2f} s")
        await _caught_up(pool, market)
        await save(conn, market)
        await _needless(conn, seq)
        begun = time.perf_counter()
        await prune(conn, Lease(ID, 0, 0, 0), events_kept=0)
        seconds = time.perf_counter() - begun
    print(f"deleting {seq - 1:,} events and the trades among them: {(seq - 1) / seconds:,.0f} events/s")


def main(orders: int = 100_000) -> None:
    """Measure and print."""
    with own_postgres() as database_url:
        asyncio.run(_measure(database_url, orders))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--orders", type=int, default=100_000, help="resting orders")
    main(**vars(parser.parse_args()))

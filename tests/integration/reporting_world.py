"""The reports' read model in tests: what it holds, the same computed slowly, and a reader that dies at will."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from redis.asyncio import Redis

from domain.money import ZERO
from monitors.relay import _ADD_ROWS, move_batch
from reporting.build import Build, read_build, read_positions
from reporting.consumer import apply
from reporting.counting import TOPICS, Entry
from reporting.streams import acknowledge, place_group, read_entries
from storage.db import Connection, Pool

Sums = dict[tuple[Any, ...], tuple[Any, ...]]
MODEL = {
    "trade_days": (
        "user_id, day, instrument_id",
        "maker_volume, taker_volume, maker_fees, taker_fees, maker_trades, taker_trades, net_quantity",
    ),
    # A day that changed nothing may have a row.
    "open_interest_days": ("instrument_id, day", "change"),
    "pnl_days": (
        "user_id, day, instrument_id, asset",
        "realized_pnl, fees, funding, liquidation, insurance",
    ),
    "liquidations": ("liquidation_id", "user_id, instrument_id, position_id, reason, triggered_at"),
}
RESULTS = ("REALIZED_PNL", "FEE", "FUNDING", "LIQUIDATION_FEE", "LIQUIDATION_SURPLUS", "INSURANCE_FUND")


async def read_model(pool: Pool) -> dict[str, Sums]:
    """All of the read model, by key."""
    found: dict[str, Sums] = {}
    for table, (key, values) in MODEL.items():
        width = len(key.split(", "))
        rows = await pool.fetch(f"SELECT {key}, {values} FROM reporting.{table}")
        found[table] = {tuple(row)[:width]: tuple(row)[width:] for row in rows}
    found["open_interest_days"] = {key: sums for key, sums in found["open_interest_days"].items() if any(sums)}
    return found


async def recompute(pool: Pool) -> dict[str, Sums]:
    """The read model from the tape, the deleveragings and the ledger, row by row; nothing of them must be pruned."""
    trades: defaultdict[tuple[Any, ...], list[Any]] = defaultdict(lambda: [ZERO, ZERO, ZERO, ZERO, 0, 0, ZERO])
    for trade in await pool.fetch("SELECT * FROM matching.trade_tickers"):
        for user_id, side, sign in ((trade["buyer_user_id"], "BUY", 1), (trade["seller_user_id"], "SELL", -1)):
            sums = trades[user_id, trade["executed_at"].date(), trade["instrument_id"]]
            is_taker = side == trade["taker_side"]
            sums[is_taker] += trade["price"] * trade["quantity"]
            sums[2 + is_taker] += trade["taker_fee"] if is_taker else trade["maker_fee"]
            sums[4 + is_taker] += 1
            sums[6] += sign * trade["quantity"]
    for forced in await pool.fetch("SELECT * FROM matching.deleveragings"):
        bought = forced["quantity"] if forced["side"] == "BUY" else -forced["quantity"]
        for user_id, quantity in ((forced["user_id"], bought), (forced["counterparty_user_id"], -bought)):
            trades[user_id, forced["executed_at"].date(), forced["instrument_id"]][6] += quantity
    results: defaultdict[tuple[Any, ...], Counter[str]] = defaultdict(Counter)
    for entry in await pool.fetch("SELECT * FROM ledger.ledger_entries WHERE user_id IS NOT NULL"):
        amount = entry["delta_available"] + entry["delta_reserved"]
        if entry["entry_type"] in RESULTS and amount:
            key = entry["user_id"], entry["created_at"].date(), entry["instrument_id"], entry["asset"]
            results[key][entry["entry_type"]] += amount
    liquidations: Sums = {}
    for row in await pool.fetch("SELECT * FROM risk.liquidation_queue"):
        at = row["created_at"].replace(microsecond=row["created_at"].microsecond // 1000 * 1000)
        names = row["user_id"], row["instrument_id"], row["position_id"]
        liquidations[(row["liquidation_id"],)] = (*names, row["reason"], at)
    return {
        "trade_days": {key: tuple(sums) for key, sums in trades.items()},
        "open_interest_days": _open_interest(trades),
        "pnl_days": {key: _by_kind(sums) for key, sums in results.items()},
        "liquidations": liquidations,
    }


def _open_interest(trades: Mapping[tuple[Any, ...], Sequence[Any]]) -> Sums:
    """Day by day: everybody's position after it, and the sum of the long ones less that of the day before."""
    held: defaultdict[tuple[str, int], Decimal] = defaultdict(lambda: ZERO)
    changes: Sums = {}
    for day in sorted({key[1] for key in trades}):
        before = _longs(held)
        for (user_id, of_day, instrument_id), sums in trades.items():
            if of_day == day:
                held[instrument_id, user_id] += sums[6]
        after = _longs(held)
        changes |= {(name, day): (after[name] - before[name],) for name in after if after[name] != before[name]}
    return changes


def _longs(held: Mapping[tuple[str, int], Decimal]) -> Counter[str]:
    longs: Counter[str] = Counter()
    for (instrument_id, _), quantity in held.items():
        longs[instrument_id] += max(quantity, ZERO)  # type: ignore[assignment]  # a Counter adds Decimals, too
    return longs


def _by_kind(sums: Counter[str]) -> tuple[Decimal, ...]:
    pnl, fee, funding, liquidation_fee, surplus, insurance = (Decimal(sums[kind]) for kind in RESULTS)
    return pnl, fee, funding, liquidation_fee + surplus, insurance


async def relay(pool: Pool, redis: Redis) -> None:
    """All that is in the outbox goes to the streams."""
    script = redis.register_script(_ADD_ROWS)
    async with pool.acquire() as conn:
        while await move_batch(conn, script):
            pass


async def repeat_entries(redis: Redis, topic: str, number: int) -> None:
    """The relay dies before it deletes, and the next one sends the last `number` entries once more."""
    found: Any = await redis.xrevrange(topic, count=number)
    for _, fields in reversed(found):
        await redis.xadd(topic, fields)


class Reader:
    """The reader of the streams, one act at a time; a new one takes over from one that died."""

    def __init__(self, conn: Connection, redis: Redis, build: Build) -> None:
        self.conn, self.redis, self.build = conn, redis, build

    @classmethod
    async def start(cls, conn: Connection, redis: Redis) -> "Reader":
        build = await read_build(conn)
        assert build is not None
        await place_group(redis, await read_positions(conn))
        return cls(conn, redis, build)

    async def read(self) -> list[Entry]:
        return await read_entries(self.redis)

    async def apply(self, entries: Sequence[Entry]) -> None:
        await apply(self.conn, self.build, entries)

    async def finish(self) -> None:
        """Read and count until there is nothing more."""
        while entries := await self.read():
            await self.apply(entries)
            await acknowledge(self.redis, entries)


async def pending(redis: Redis) -> int:
    """Entries that were read and not acknowledged."""
    return sum([(await redis.xpending(topic, "reporting"))["pending"] for topic in TOPICS])

"""Klines, several times a second: the trades since the last round are counted, stored, and what changed is pushed.

The table is the state: it knows how far it has counted, the trades after that are in the engine's tape. What is kept
in memory is what the table said last, and is thrown away with every failure.
"""

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence

import msgspec
from redis.asyncio import Redis
from redis.exceptions import RedisError

from domain.clock import from_ms, iso
from domain.money import plain
from domain.periods import PERIODS_MS
from market.kline_store import KEPT_MS, Series, delete_old, read_newest, read_positions, read_since, read_trades, write
from market.klines import Kline, Traded, advance, merge, oldest_touched
from storage.db import OUTAGES, Connection, Pool
from storage.market_keys import kline_channel, snapshot_key, update_channel
from storage.waiting import pause

log = logging.getLogger(__name__)

ROUND_SECONDS = 0.25
ROUND_SECONDS_MAX = 30.0
RETRY_SECONDS = 1.0
PAGE_TRADES_MAX = 10_000
# As many are in a channel's snapshot, and at hand for what is still to be traded.
RECENT_KLINES = 60
PRUNE_SECONDS = 3_600.0

_encode = msgspec.json.Encoder().encode
_MESSAGE = b'{"type":"%b","channel":"kline","instrumentId":"%b","period":"%b","seq":%d,"prevSeq":%d,"data":[%b]}'


class PublicKline(msgspec.Struct, rename="camel"):
    """One kline as published; `volume` in base."""

    open_time: str
    close_time: str
    open: str
    high: str
    low: str
    close: str
    volume: str
    trade_count: int
    closed: bool


class KlineFeed:
    """Klines of `instrument_ids` in the table, on the event bus and on the `kline` channels."""

    def __init__(self, pool: Pool, redis: Redis, instrument_ids: Sequence[str]) -> None:
        self._pool = pool
        self._redis = redis
        self._series: list[Series] = [(name, period) for name in instrument_ids for period in PERIODS_MS]
        self._instrument_ids = list(instrument_ids)
        self._positions: dict[str, int] = {}
        self._recent: dict[Series, list[Kline]] = {}
        # As they are published, by the time they open.
        self._documents: dict[Series, dict[int, bytes]] = {}
        self._published: dict[Series, int] = {}

    async def run(self) -> None:
        """Work until cancelled; an outage of a server is waited out."""
        loop = asyncio.get_running_loop()
        prune_at = loop.time()
        while True:
            seconds = ROUND_SECONDS
            try:
                async with asyncio.timeout(ROUND_SECONDS_MAX):
                    is_behind = await self.update(_now_ms())
                    if loop.time() >= prune_at and not is_behind:
                        await self._prune()
                        prune_at = loop.time() + PRUNE_SECONDS
                if is_behind:
                    seconds = 0
            except (RedisError, *OUTAGES) as error:
                log.warning("Klines are late: %r", error)
                self._forget()
                seconds = RETRY_SECONDS
            await pause(seconds)

    def break_chains(self) -> None:
        """What was published last may not have arrived: publish everything again, as new chains."""
        self._published.clear()

    async def update(self, now_ms: int) -> bool:
        """One round, of at most PAGE_TRADES_MAX trades an instrument; whether there may be more of them."""
        async with self._pool.acquire() as conn:
            if not self._recent:
                await self._load(conn)
            trades = await read_trades(conn, self._positions, PAGE_TRADES_MAX)
            changed = await self._changes(conn, trades, now_ms)
            if changed:
                async with conn.transaction():
                    await write(conn, changed)
        self._positions |= {name: page[-1].seq for name, page in trades.items()}
        for series, klines in changed.items():
            self._remember(series, klines)
        await self._publish(changed)
        return any(len(page) == PAGE_TRADES_MAX for page in trades.values())

    async def _load(self, conn: Connection) -> None:
        self._positions = await read_positions(conn, self._instrument_ids)
        for series, klines in (await read_newest(conn, self._series, RECENT_KLINES)).items():
            self._remember(series, klines)

    def _remember(self, series: Series, changed: Sequence[Kline]) -> None:
        period_ms = PERIODS_MS[series[1]]
        recent = merge(self._recent.get(series, ()), changed)[-RECENT_KLINES:]
        documents = self._documents.get(series, {}) | {k.open_ms: _encode(_public(k, period_ms)) for k in changed}
        self._recent[series] = recent
        self._documents[series] = {kline.open_ms: documents[kline.open_ms] for kline in recent}

    def _forget(self) -> None:
        self._recent.clear()
        self._documents.clear()
        self._published.clear()

    async def _changes(
        self, conn: Connection, trades: Mapping[str, Sequence[Traded]], now_ms: int
    ) -> dict[Series, list[Kline]]:
        changes = {}
        for series in self._series:
            instrument_id, period = series
            page = trades.get(instrument_id, ())
            known = self._recent[series]
            oldest = oldest_touched(known, page, PERIODS_MS[period])
            if known and oldest is not None:
                known = await read_since(conn, series, oldest)
            horizon_ms = now_ms - KEPT_MS[period] if period in KEPT_MS else 0
            klines = advance(known, page, PERIODS_MS[period], _seen_up_to(page, now_ms), horizon_ms)
            if klines:
                changes[series] = klines
        return changes

    async def _publish(self, changed: Mapping[Series, Sequence[Kline]]) -> None:
        """Send what changed, and everything of a chain that is broken. A snapshot and its update appear together."""
        due = [series for series in self._series if series in changed or series not in self._published]
        if not due:
            return
        async with self._redis.pipeline(transaction=True) as pipe:
            for series in due:
                self._queue(pipe, series, changed.get(series, ()))
            await pipe.execute()
        self._published |= {series: self._positions[series[0]] for series in due}

    def _queue(self, pipe: Redis, series: Series, changed: Sequence[Kline]) -> None:
        instrument_id, period = series
        head = (instrument_id.encode(), period.encode(), self._positions[instrument_id])
        previous = self._published.get(series, head[2])
        # A new chain, and one with more in it than a snapshot holds, goes on from the snapshot.
        if series not in self._published or len(changed) > RECENT_KLINES:
            previous, changed = head[2], ()
        channel = kline_channel(period)
        snapshot = _MESSAGE % (b"snapshot", *head, head[2], b",".join(self._documents[series].values()))
        update = _MESSAGE % (b"update", *head, previous, b",".join(self._document(series, kline) for kline in changed))
        pipe.set(snapshot_key(channel, instrument_id), snapshot)
        pipe.publish(update_channel(channel, instrument_id), update)

    def _document(self, series: Series, kline: Kline) -> bytes:
        # One that is no longer recent was amended by a late trade.
        return self._documents[series].get(kline.open_ms) or _encode(_public(kline, PERIODS_MS[series[1]]))

    async def _prune(self) -> None:
        async with self._pool.acquire() as conn:
            deleted = await delete_old(conn, self._instrument_ids, _now_ms())
        if deleted:
            log.info("Deleted %d old klines", deleted)


def _seen_up_to(page: Sequence[Traded], now_ms: int) -> int:
    """Nothing closes before all trades are read that were there when it ended."""
    return min(now_ms, max(trade.at_ms for trade in page)) if len(page) == PAGE_TRADES_MAX else now_ms


def _public(kline: Kline, period_ms: int) -> PublicKline:
    return PublicKline(
        open_time=iso(from_ms(kline.open_ms)),
        close_time=iso(from_ms(kline.open_ms + period_ms)),
        open=plain(kline.open),
        high=plain(kline.high),
        low=plain(kline.low),
        close=plain(kline.close),
        volume=plain(kline.volume),
        trade_count=kline.trade_count,
        closed=kline.closed,
    )


def _now_ms() -> int:
    return time.time_ns() // 1_000_000

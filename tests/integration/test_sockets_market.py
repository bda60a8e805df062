"""Public sockets on a running server: a snapshot, then updates without a hole, whatever happens in between."""

import asyncio
import itertools
import random
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
from redis.asyncio import Redis
from websockets.asyncio.client import ClientConnection, connect

from api.routes import sockets
from domain.instruments import SHIPPED
from domain.matching import AnyEvent
from market.instrument_market import InstrumentMarket
from settings import Settings
from storage.db import Pool
from tests.engine_commands import random_commands
from tests.integration.market_app import BTC, ETH, EngineLog, eventually, placed, running_market, trade
from tests.integration.socket_app import Api, connect_slow_reader, running_api
from tests.reference_book import ReferenceMatcher

Document = dict[str, Any]


@pytest.fixture
def engine(pool: Pool, redis: Redis) -> EngineLog:
    return EngineLog(pool, redis)


@pytest.fixture
async def api(pool: Pool, redis: Redis, settings: Settings) -> AsyncIterator[Api]:
    async with running_market(pool, redis, settings), running_api(settings) as api:
        await eventually(lambda: redis.get(f"market:depth:{BTC}"))
        yield api


async def receive(socket: ClientConnection) -> Document:
    async with asyncio.timeout(10):
        decoded: Document = msgspec.json.decode(await socket.recv())
        return decoded


async def subscribe(socket: ClientConnection, channel: str, instrument_id: str = BTC) -> Document:
    """Subscribe; the snapshot, or the error. Updates of other subscriptions may come first."""
    await socket.send(msgspec.json.encode({"op": "subscribe", "channel": channel, "instrumentId": instrument_id}))
    answer = await receive(socket)
    while answer["type"] == "update":
        answer = await receive(socket)
    return answer


class ClientBook:
    """What a client makes of the messages of the depth channel."""

    def __init__(self) -> None:
        self.seq: int | None = None
        self.sides: dict[str, dict[str, str]] = {}
        self.snapshots = 0

    def take(self, message: Document) -> None:
        if message["type"] == "snapshot":
            self.sides = {side: dict(message["data"][side]) for side in ("bids", "asks")}
            self.snapshots += 1
        else:
            assert message["prevSeq"] == self.seq, f"Expected an update of {self.seq}, was {message}"
            for side, levels in self.sides.items():
                levels.update(message["data"][side])
                self.sides[side] = {price: quantity for price, quantity in levels.items() if quantity != "0"}
        self.seq = message["seq"]

    async def follow(self, socket: ClientConnection, seq: int) -> None:
        """Take messages until the book includes event `seq`."""
        while self.seq is None or self.seq < seq:
            self.take(await receive(socket))


def recomputed(events: list[AnyEvent]) -> dict[str, dict[str, str]]:
    """The book that follows from all events."""
    market = InstrumentMarket(SHIPPED[0])
    market.apply(1, events)
    depth = msgspec.json.decode(market.take_publication(0).keys[f"market:depth:{BTC}"])["data"]
    return {side: dict(depth[side]) for side in ("bids", "asks")}


def engine_batches(seed: int) -> list[list[AnyEvent]]:
    matcher, dice = ReferenceMatcher(SHIPPED[0]), random.Random(seed)
    events = [event for command in random_commands(600, seed) for event in matcher.apply(command)]
    # The last event of a test must change the depth, so that every client hears of it.
    events.append(placed(10_000, "BUY", 1, 1))
    batches = []
    while events:
        size = dice.randint(1, 12)
        batches.append(events[:size])
        events = events[size:]
    return batches


@pytest.mark.parametrize("seed", [1, 2])
async def test_snapshot_and_updates_give_the_book_that_the_events_give(api: Api, engine: EngineLog, seed: int) -> None:
    batches = engine_batches(seed)
    count = sum(len(batch) for batch in batches)

    async def follow_from(delay: float) -> ClientBook:
        await asyncio.sleep(delay)
        book = ClientBook()
        async with connect(f"{api.ws}/ws/market/depth?instrumentId={BTC}") as socket:
            await book.follow(socket, count)
        return book

    followers = [asyncio.create_task(follow_from(0.15 * number)) for number in range(8)]
    for batch in batches:
        await engine.append(BTC, batch)
        await asyncio.sleep(0.012)
    expected = recomputed([event for batch in batches for event in batch])
    for book in await asyncio.gather(*followers):
        assert book.sides == expected
        assert book.snapshots == 1


async def test_a_restart_of_the_market_process_gives_a_new_snapshot(
    pool: Pool, redis: Redis, settings: Settings, engine: EngineLog
) -> None:
    async with running_api(settings) as api, connect(f"{api.ws}/ws/market") as socket:
        book = ClientBook()
        async with running_market(pool, redis, settings):
            book.take(await subscribe(socket, "depth"))
            await engine.append(BTC, [placed(1, "BUY", 600_000, 5)])
            await book.follow(socket, 1)
        await engine.append(BTC, [placed(2, "BUY", 599_990, 5), placed(3, "SELL", 600_010, 5)])
        async with running_market(pool, redis, settings):
            await book.follow(socket, 3)
            assert book.sides == {"bids": {"60000": "0.005", "59999": "0.005"}, "asks": {"60001": "0.005"}}


async def test_losing_the_redis_connections_gives_a_new_snapshot(api: Api, redis: Redis, engine: EngineLog) -> None:
    async with connect(f"{api.ws}/ws/market") as socket:
        book = ClientBook()
        book.take(await subscribe(socket, "depth"))
        await redis.client_kill_filter(_type="pubsub")
        await engine.append(BTC, [placed(1, "BUY", 600_000, 5)])
        await book.follow(socket, 1)
        await engine.append(BTC, [placed(2, "BUY", 600_000, 5)])
        await book.follow(socket, 2)
        assert book.sides["bids"] == {"60000": "0.01"}


async def test_trades_come_after_those_of_the_snapshot(api: Api, engine: EngineLog) -> None:
    await engine.append(BTC, [placed(1, "BUY", 600_000, 9), trade(11, 1, 600_000, 2, maker_remaining=7)])
    async with connect(f"{api.ws}/ws/market") as socket:
        trades = (await subscribe(socket, "trades"))["data"]
        await engine.append(BTC, [trade(12, 1, 600_000, 3, maker_remaining=4)])
        while len(trades) < 2:
            trades += (await receive(socket))["data"]
    assert [item["tradeId"] for item in trades] == [11, 12]
    assert trades[1]["price"] == "60000"


async def test_tickers_follow_trades_and_the_mark_price(api: Api, engine: EngineLog) -> None:
    async with connect(f"{api.ws}/ws/market/tickers?instrumentId={ETH}") as socket:
        first = await receive(socket)
        assert (first["type"], first["channel"], first["instrumentId"]) == ("snapshot", "tickers", ETH)
        await engine.append(ETH, [placed(1, "BUY", 300_000, 9), trade(11, 1, 300_000, 2, maker_remaining=7)])
        while (ticker := (await receive(socket))["data"])["lastPrice"] is None:
            assert ticker["instrumentId"] == ETH
        assert (ticker["lastPrice"], ticker["bestBid"]) == ("3000", "3000")
        while (await receive(socket))["data"]["markPrice"] == ticker["markPrice"]:
            assert ticker["markPrice"] is not None


async def test_an_unsubscribed_channel_is_silent(api: Api, engine: EngineLog) -> None:
    async with connect(f"{api.ws}/ws/market") as socket:
        await subscribe(socket, "depth")
        await socket.send(msgspec.json.encode({"op": "unsubscribe", "channel": "depth", "instrument_id": BTC}))
        await subscribe(socket, "trades")
        await engine.append(BTC, [placed(1, "BUY", 600_000, 9), trade(11, 1, 600_000, 2, maker_remaining=7)])
        assert (await receive(socket))["channel"] == "trades"


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        ("not json", "VALIDATION_FAILED"),
        ("[]", "VALIDATION_FAILED"),
        ('{"op": 1}', "VALIDATION_FAILED"),
        ('{"op": "shout", "channel": "depth", "instrumentId": "BTC-USDT-PERP"}', "VALIDATION_FAILED"),
        ('{"op": "subscribe", "channel": "gossip", "instrumentId": "BTC-USDT-PERP"}', "VALIDATION_FAILED"),
        ('{"op": "subscribe", "channel": "depth", "instrumentId": "DOGE"}', "INSTRUMENT_NOT_FOUND"),
        ('{"op": "subscribe", "channel": "depth"}', "INSTRUMENT_NOT_FOUND"),
    ],
)
async def test_a_wrong_message_is_answered_and_the_socket_stays_open(api: Api, sent: str, code: str) -> None:
    async with connect(f"{api.ws}/ws/market") as socket:
        await socket.send(sent)
        answer = await receive(socket)
        assert (answer["type"], answer["code"]) == ("error", code)
        assert answer["detail"]
        assert (await subscribe(socket, "depth"))["type"] == "snapshot"


async def test_a_socket_of_one_channel_serves_that_channel_only(api: Api) -> None:
    async with connect(f"{api.ws}/ws/market/depth?instrumentId={BTC}") as socket:
        assert (await receive(socket))["type"] == "snapshot"
        assert (await subscribe(socket, "trades"))["code"] == "VALIDATION_FAILED"
        assert (await subscribe(socket, "depth", ETH))["instrumentId"] == ETH


async def test_a_reader_that_stands_still_slows_nobody_and_gets_the_latest_book_when_it_goes_on(
    api: Api, engine: EngineLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sockets, "MARKET_QUEUE_MAX", 5)
    order_ids = itertools.count(1)
    seq = 0
    slow_book, quick_book = ClientBook(), ClientBook()
    async with connect_slow_reader(api, "/ws/market") as slow, connect(f"{api.ws}/ws/market") as quick:
        slow_book.take(await subscribe(slow, "depth"))
        quick_book.take(await subscribe(quick, "depth"))
        for _ in range(40):
            # Updates of many levels, so that a few of them fill the buffers on the way.
            levels = [placed(next(order_ids), "BUY", 500_000 + level, 1) for level in range(1000)]
            await engine.append(BTC, levels)
            seq += len(levels)
            async with asyncio.timeout(10):
                await quick_book.follow(quick, seq)
        await slow_book.follow(slow, seq)
    assert slow_book.sides == quick_book.sides
    assert slow_book.snapshots > 1
    assert quick_book.snapshots == 1

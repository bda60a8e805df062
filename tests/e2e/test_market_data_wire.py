"""Books and trades that clients of two api processes keep are the engine's, through restarts of market and api."""

import asyncio
import subprocess
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake

from domain.instruments import SHIPPED
from domain.matching import AnyCommand, SetState, Trade, decode_command
from domain.money import plain
from engine.book import BookSide
from engine.matcher import Matcher
from settings import Settings
from stack.ports import free_port
from stack.processes import SERVICES
from storage.db import Pool
from tests.engine_commands import AT, any_commands, new
from tests.engine_log import append, until_matched
from tests.exchange import environment_of
from tests.integration.identity_app import complete
from tests.servers import ROOT
from tests.waiting import until

BTC = SHIPPED[0]
ID = BTC.instrument_id
COMMANDS = {process.name: process.command for process in SERVICES}
COUNT = 1200
BATCH = 6
PAUSE_SECONDS = 0.02
Document = dict[str, Any]
Book = dict[str, dict[str, str]]


class Client:
    """Follows depth and trades of one api; resubscribes after a gap and reconnects when the api is away."""

    def __init__(self, port: int) -> None:
        self.book: Book = {}
        self.seq: int | None = None
        self.books: dict[int, Book] = {}
        self.trade_ids: list[int] = []
        self.snapshots = 0
        self.connections = 0
        self._trades_seq: int | None = None
        self._url = f"ws://127.0.0.1:{port}/ws/market"

    async def follow(self) -> None:
        """Until cancelled."""
        while True:
            with suppress(OSError, InvalidHandshake, ConnectionClosed):
                async with connect(self._url, proxy=None) as socket:
                    self.connections += 1
                    await self._subscribe(socket, "depth")
                    await self._subscribe(socket, "trades")
                    async for message in socket:
                        await self._take(socket, msgspec.json.decode(message))
            await asyncio.sleep(0.05)

    async def _subscribe(self, socket: ClientConnection, channel: str) -> None:
        await socket.send(msgspec.json.encode({"op": "subscribe", "channel": channel, "instrumentId": ID}))

    async def _take(self, socket: ClientConnection, message: Document) -> None:
        take, seq = (
            (self._take_depth, self.seq) if message["channel"] == "depth" else (self._take_trades, self._trades_seq)
        )
        if message["type"] == "update" and message["prevSeq"] != seq:
            await self._subscribe(socket, message["channel"])
        else:
            take(message)

    def _take_depth(self, message: Document) -> None:
        if message["type"] == "snapshot":
            self.snapshots += 1
            self.book = {side: dict(message["data"][side]) for side in ("bids", "asks")}
        else:
            self.book = {side: _changed(self.book[side], message["data"][side]) for side in ("bids", "asks")}
        self.seq = message["seq"]
        self.books[message["seq"]] = self.book

    def _take_trades(self, message: Document) -> None:
        ids = [trade["tradeId"] for trade in message["data"]]
        if message["type"] == "snapshot":
            last = self.trade_ids[-1] if self.trade_ids else 0
            ids = [trade_id for trade_id in ids if trade_id > last]
        self.trade_ids += ids
        self._trades_seq = message["seq"]


def _changed(side: dict[str, str], levels: Sequence[tuple[str, str]]) -> dict[str, str]:
    return {price: quantity for price, quantity in (side | dict(levels)).items() if quantity != "0"}


class Processes:
    """Real processes by name, killed at the end."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, settings: Settings) -> None:
        """`name` is that of a service, with a number behind a dash when there are several."""
        with (self._logs / f"{name}.log").open("ab") as log:
            command = COMMANDS[name.partition("-")[0]]
            self._running[name] = subprocess.Popen(
                command, cwd=ROOT, env=environment_of(settings), stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )

    def kill(self, name: str) -> None:
        """kill -9."""
        process = self._running.pop(name)
        process.kill()
        process.wait()

    def kill_all(self) -> None:
        """What is left of them."""
        for name in list(self._running):
            self.kill(name)


@contextmanager
def processes_in(logs: Path) -> Iterator[Processes]:
    processes = Processes(logs)
    try:
        yield processes
    finally:
        processes.kill_all()


@asynccontextmanager
async def following(clients: Sequence[Client]) -> AsyncIterator[None]:
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(client.follow()) for client in clients]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()


async def rest_depth(port: int) -> Document | None:
    """What REST says of the book; None while it says nothing."""
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as http:
        try:
            answer = await http.get(f"/api/market/depth/{ID}", params={"limit": 5000})
        except httpx.TransportError:
            return None
    document: Document = answer.json()
    return document if answer.is_success else None


async def feed(pool: Pool, commands: Sequence[AnyCommand]) -> None:
    """Into the engine, a few at a time."""
    for begin in range(0, len(commands), BATCH):
        await append(pool, commands[begin : begin + BATCH])
        await asyncio.sleep(PAUSE_SECONDS)


async def reference(pool: Pool) -> tuple[dict[int, Book], list[int]]:
    """The matcher's book after every command by the seq of its last event, and all trades, from the log of commands."""
    matcher = Matcher(BTC)
    books: dict[int, Book] = {0: {"bids": {}, "asks": {}}}
    trade_ids: list[int] = []
    rows = await pool.fetch("SELECT payload FROM matching.commands WHERE instrument_id = $1 ORDER BY seq", ID)
    for row in rows:
        trade_ids += [e.trade_id for e in matcher.apply(decode_command(row["payload"])) if isinstance(e, Trade)]
        books[matcher.event_seq] = {
            "bids": _levels(matcher, matcher.book.bids),
            "asks": _levels(matcher, matcher.book.asks),
        }
    return books, trade_ids


def _levels(matcher: Matcher, side: BookSide) -> dict[str, str]:
    depth = matcher.book.depth(side)
    return {plain(BTC.ticks_to_price(price)): plain(BTC.lots_to_quantity(lots)) for price, lots in depth}


def all_commands(seed: int) -> list[AnyCommand]:
    """Of every kind; the last one changes the depth, so that every client hears of the end."""
    last = new(COUNT + 1, "BUY", 1, 1, at=AT + COUNT + 1)
    return [*any_commands(COUNT, seed), SetState(at=AT + COUNT + 1, state="TRADING"), last]


@pytest.mark.parametrize("seed", [7])
async def test_books_and_trades_of_all_clients_are_the_engines_across_restarts_of_market_and_api(
    pool: Pool, settings: Settings, tmp_path: Path, seed: int
) -> None:
    ports = [free_port(), free_port()]
    own = complete(settings, tmp_path)
    apis = {f"api-{number}": own.model_copy(update={"api_port": port}) for number, port in enumerate(ports)}
    clients = [Client(port) for port in ports]
    commands = all_commands(seed)
    with processes_in(tmp_path) as processes:
        for name, each in {"engine": own, "market": own, **apis}.items():
            processes.start(name, each)
        for port in ports:
            await until(lambda port=port: _answers(port), 60, "an api that serves the depth")  # type: ignore[misc]  # a default binds the loop's value
        async with following(clients):
            await until(lambda: _all_stand(clients, 0), 30, "the first snapshots")
            feeding = asyncio.create_task(feed(pool, commands))
            await until_matched(pool, COUNT // 4, 60)
            processes.kill("market")
            await asyncio.sleep(0.3)
            processes.start("market", own)
            await until_matched(pool, COUNT // 2, 60)
            processes.kill("api-0")
            await asyncio.sleep(0.3)
            processes.start("api-0", apis["api-0"])
            await feeding
            await until_matched(pool, len(commands), 60)
            head, answers = await at_rest(pool, clients, ports)
    books, trade_ids = await reference(pool)
    assert len(trade_ids) > 100
    for client, answer in zip(clients, answers, strict=True):
        assert answer is not None
        assert client.book == books[head]
        assert answer["seq"] == head
        assert {side: dict(answer[side]) for side in ("bids", "asks")} == client.book
        # Not only in the end: at every position that a client was told of. How many that are, the machine decides.
        assert len(client.books) > 3
        assert {seq: book for seq, book in client.books.items() if books[seq] != book} == {}
        assert client.trade_ids == trade_ids
    assert clients[0].connections >= 2
    assert clients[1].connections == 1
    assert clients[1].snapshots >= 2


async def at_rest(pool: Pool, clients: Sequence[Client], ports: Sequence[int]) -> tuple[int, list[Document | None]]:
    """The last event, once every client stands there, and what REST says then.

    A mark price that the market process tells the engine may still trigger an order: then there is another last event.
    Each look begins with one more order that changes the depth, so that every client hears of the end.
    """
    for number in range(2, 12):
        await append(pool, [new(COUNT + number, "BUY", 1, 1, at=AT + COUNT + number)])
        await until_matched(pool, await _last_command(pool), 60)
        head = await _head(pool)
        with suppress(AssertionError):
            await until(lambda head=head: _all_stand(clients, head), 10, "all clients")  # type: ignore[misc]  # a default binds the loop's value
        answers = [await rest_depth(port) for port in ports]
        if await _head(pool) == head and await _all_stand(clients, head):
            return head, answers
    raise AssertionError(f"Expected every client to stand at {head}, was {[client.seq for client in clients]}")


async def _last_command(pool: Pool) -> int:
    last: int = await pool.fetchval("SELECT last_seq FROM matching.sequencers WHERE instrument_id = $1", ID)
    return last


async def _head(pool: Pool) -> int:
    head: int = await pool.fetchval("SELECT event_seq FROM matching.cursors WHERE instrument_id = $1", ID)
    return head


async def _answers(port: int) -> bool:
    return await rest_depth(port) is not None


async def _all_stand(clients: Sequence[Client], seq: int) -> bool:
    return all(client.seq == seq for client in clients)

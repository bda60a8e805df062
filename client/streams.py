"""What the exchange pushes: market data without gaps, and a user's own events."""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal

import msgspec
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake

from client.account import Account
from client.errors import Refused, UnavailableError
from client.exchange import PAUSE_SECONDS, Exchange
from client.models import Book, Level, MarketMessage, UserMessage

UNAUTHENTICATED, FORBIDDEN = 4401, 4403
USER_PATH = "/ws/user"
_LOST = (OSError, InvalidHandshake, ConnectionClosed)


@dataclass(frozen=True, slots=True)
class Topic:
    """A channel (`depth`, `trades`, `tickers`, `kline` with its `period`) of an instrument."""

    channel: str
    instrument_id: str
    period: str = ""


async def market_messages(exchange: Exchange, topics: Sequence[Topic]) -> AsyncIterator[MarketMessage]:
    """Snapshots and the updates that follow on them, until closed; every gap is bridged with a new snapshot.

    A lost connection is opened again. Raises UnavailableError when that fails for the exchange's `patience`.
    """
    address = _address(exchange, "/ws/market")
    retry = _Retry(exchange)
    while True:
        try:
            async with connect(address, proxy=None, max_size=None) as socket:
                chain = Chain()
                for topic in topics:
                    await _subscribe(socket, topic)
                async for frame in socket:
                    retry.succeeded()
                    message = _market_message(frame)
                    if message is None:
                        continue
                    if chain.follows(message):
                        yield message
                    elif chain.is_broken_by(message):
                        await _subscribe(socket, topic_of(message))
        except _LOST as error:
            await retry.wait(error)


async def books(exchange: Exchange, instrument_id: str) -> AsyncIterator["LocalBook"]:
    """The whole order book of an instrument after every message: always the same object, always consistent."""
    book = LocalBook()
    async for message in market_messages(exchange, [Topic("depth", instrument_id)]):
        book.apply(message)
        yield book


async def user_messages(account: Account) -> AsyncIterator[UserMessage]:
    """The user's events until closed. `auth` comes first, and again after every new connection: what happened in
    between is not repeated, so look it up then. Raises UnavailableError as above, and Refused when the caller has no
    better proof than one that is no longer good (an API key that was revoked)."""
    caller, exchange = account.caller, account.exchange
    retry = _Retry(exchange)
    while True:
        proof: Mapping[str, str] = {}
        try:
            async with connect(_address(exchange, USER_PATH), proxy=None) as socket:
                proof = caller.headers("GET", USER_PATH, b"")
                await socket.send(_auth_message(proof))
                async for frame in socket:
                    retry.succeeded()
                    yield msgspec.json.decode(frame, type=UserMessage)
        except _LOST as error:
            refusal = _refusal(error)
            if refusal is not None and not (refusal.status == 401 and await caller.renew(proof)):
                raise refusal from error
            await retry.wait(error)


class Chain:
    """Where every topic stands, to tell whether a message follows on what came before."""

    def __init__(self) -> None:
        self._seqs: dict[Topic, int | None] = {}

    def follows(self, message: MarketMessage) -> bool:
        """Whether `message` may be used; takes it in if so. Snapshots always may."""
        topic = topic_of(message)
        if message.type == "update" and self._seqs.get(topic) != message.prev_seq:
            return False
        self._seqs[topic] = message.seq
        return True

    def is_broken_by(self, message: MarketMessage) -> bool:
        """Whether a message that does not follow needs a new snapshot: said once, until that has come."""
        topic = topic_of(message)
        was_whole = self._seqs.get(topic) is not None
        self._seqs[topic] = None
        return was_whole


def topic_of(message: MarketMessage) -> Topic:
    """What a message is about."""
    return Topic(message.channel, message.instrument_id, message.period)


@dataclass(slots=True)
class LocalBook:
    """An order book kept up to date: quantity by price."""

    seq: int = 0
    bids: dict[Decimal, Decimal] = field(default_factory=dict)
    asks: dict[Decimal, Decimal] = field(default_factory=dict)

    def apply(self, message: MarketMessage) -> None:
        """Take in the next message of `depth`."""
        levels = msgspec.json.decode(message.data, type=Book)
        if message.type == "snapshot":
            self.bids.clear()
            self.asks.clear()
        _set_levels(self.bids, levels.bids)
        _set_levels(self.asks, levels.asks)
        self.seq = message.seq

    @property
    def best_bid(self) -> Decimal | None:
        """None while nobody buys."""
        return max(self.bids, default=None)

    @property
    def best_ask(self) -> Decimal | None:
        """None while nobody sells."""
        return min(self.asks, default=None)


def _set_levels(side: dict[Decimal, Decimal], levels: Sequence[Level]) -> None:
    for price, quantity in levels:
        if quantity:
            side[price] = quantity
        else:
            side.pop(price, None)


class _Retry:
    """Pauses between connections, and an end to patience."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._lost_at: float | None = None

    def succeeded(self) -> None:
        self._lost_at = None

    async def wait(self, error: BaseException) -> None:
        now = time.monotonic()
        self._lost_at = self._lost_at or now
        self._exchange.on_busy("CONNECTION_LOST")
        if now - self._lost_at >= self._exchange.patience:
            raise UnavailableError(f"{self._exchange.url} accepts no sockets: {error}") from error
        await asyncio.sleep(PAUSE_SECONDS)


def _address(exchange: Exchange, path: str) -> str:
    return "ws" + exchange.url.removeprefix("http") + path


def _auth_message(proof: Mapping[str, str]) -> str:
    """The headers that prove who sends a GET, in the form in which the socket takes them."""
    if "X-Api-Key" not in proof:
        return _text({"op": "auth", "token": proof["Authorization"].removeprefix("Bearer ")})
    message = {
        "op": "auth",
        "apiKey": proof["X-Api-Key"],
        "timestamp": int(proof["X-Api-Timestamp"]),
        "recvWindow": int(proof["X-Api-Recv-Window"]),
        "nonce": proof["X-Api-Nonce"],
        "signature": proof["X-Api-Signature"],
    }
    return _text(message)


def _refusal(error: BaseException) -> Refused | None:
    """What the exchange said when it closed a socket for want of a good proof."""
    if not isinstance(error, ConnectionClosed) or error.rcvd is None:
        return None
    if error.rcvd.code == FORBIDDEN:
        return Refused(403, "FORBIDDEN", error.rcvd.reason, {})
    if error.rcvd.code == UNAUTHENTICATED:
        return Refused(401, "UNAUTHENTICATED", error.rcvd.reason, {})
    return None


def _text(message: object) -> str:
    return msgspec.json.encode(message).decode()


async def _subscribe(socket: ClientConnection, topic: Topic) -> None:
    request = {"op": "subscribe", "channel": topic.channel, "instrumentId": topic.instrument_id}
    if topic.period:
        request["period"] = topic.period
    await socket.send(_text(request))


def _market_message(frame: str | bytes) -> MarketMessage | None:
    """None for a pong. Raises Refused when the exchange does not serve a topic."""
    kind = msgspec.json.decode(frame, type=_Kind)
    if kind.type == "error":
        raise Refused(400, kind.code, kind.detail, {})
    return msgspec.json.decode(frame, type=MarketMessage) if kind.type in ("snapshot", "update") else None


class _Kind(msgspec.Struct):
    type: str
    code: str = ""
    detail: str = ""

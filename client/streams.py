"""What the exchange pushes: market data without gaps, and a user's own events."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal

import msgspec
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake

from client.errors import Refused, UnavailableError
from client.exchange import PAUSE_SECONDS, Exchange
from client.models import Book, Level, MarketMessage, UserMessage
from client.session import Login, Session

UNAUTHENTICATED = 4401
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


async def user_messages(session: Session) -> AsyncIterator[UserMessage]:
    """The user's events until closed. `auth` comes first, and again after every new connection: what happened in
    between is not repeated, so look it up then. Needs a session of `sign_in`. Raises UnavailableError as above."""
    login, exchange = session.caller, session.exchange
    if not isinstance(login, Login):
        raise TypeError("Expected a session that was signed in with a password")
    retry = _Retry(exchange)
    while True:
        token = login.access_token
        try:
            async with connect(_address(exchange, "/ws/user"), proxy=None) as socket:
                await socket.send(msgspec.json.encode({"op": "auth", "token": token}).decode())
                async for frame in socket:
                    retry.succeeded()
                    yield msgspec.json.decode(frame, type=UserMessage)
        except _LOST as error:
            await retry.wait(error)
            if isinstance(error, ConnectionClosed) and error.rcvd is not None and error.rcvd.code == UNAUTHENTICATED:
                await login.renew({"Authorization": f"Bearer {token}"})


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


async def _subscribe(socket: ClientConnection, topic: Topic) -> None:
    request = {"op": "subscribe", "channel": topic.channel, "instrumentId": topic.instrument_id}
    if topic.period:
        request["period"] = topic.period
    await socket.send(msgspec.json.encode(request).decode())


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

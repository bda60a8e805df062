"""WebSockets: `/ws/market` for public channels, `/ws/user` for a user's own messages."""

import asyncio
import logging
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Annotated

import msgspec
from fastapi import APIRouter, WebSocket
from redis.exceptions import RedisError
from starlette.websockets import WebSocketDisconnect

from api.edge.gateway import authenticate
from api.identity.addresses import client_address
from api.identity.signatures import RECV_WINDOW_MS, SignedRequest
from api.schema.problems import problem_response
from api.schema.strictness import loads_once, require_known, spellings
from api.sockets.client import (
    FORBIDDEN_CLOSE,
    TRY_AGAIN_LATER_CLOSE,
    UNAUTHENTICATED_CLOSE,
    SocketClient,
    close_socket,
    error_message,
    receive,
)
from api.sockets.market_feed import MarketFeed
from api.sockets.user_feed import user_message
from api.state import AppState, State
from domain.identity import Identity
from domain.periods import PERIODS_MS
from domain.problems import Problem
from storage.db import OUTAGES
from storage.market_keys import CHANNELS, kline_channel

log = logging.getLogger(__name__)

router = APIRouter()

AUTH_SECONDS = 5.0
JOIN_SECONDS = 5.0
MARKET_QUEUE_MAX = 512
# One batch of orders may push thousands of messages to its user at once.
USER_QUEUE_MAX = 10_000
USER_PATH = "/ws/user"
SOCKET_CHANNELS = (*CHANNELS, "kline")
PONG = b'{"type":"pong"}'


# No more digits than `api.identity.signatures` takes; a longer number would be costly to write out.
_Milliseconds = Annotated[int, msgspec.Meta(ge=0, lt=10**15)]


class _Request(msgspec.Struct, rename="camel", forbid_unknown_fields=True):
    op: str
    channel: str = ""
    instrument_id: str = ""
    period: str = ""
    token: str = ""
    api_key: str = ""
    timestamp: _Milliseconds = 0
    recv_window: _Milliseconds = RECV_WINDOW_MS
    nonce: str = ""
    signature: str = ""


_SPELLINGS = spellings(*(field.encode_name for field in msgspec.structs.fields(_Request)))


@router.websocket("/ws/market")
async def market_socket(websocket: WebSocket, state: State) -> None:
    """Subscribe and unsubscribe to any public channel."""
    if await _knows_query(websocket):
        await _serve_market(websocket, state, SOCKET_CHANNELS)


@router.websocket("/ws/market/{channel}")
async def market_channel_socket(websocket: WebSocket, state: State, channel: str) -> None:
    """One channel; `?instrumentId=` (and `&period=` of klines) is subscribed at once."""
    if not await _knows_query(websocket, "instrumentId", "period"):
        return
    query = websocket.query_params
    instrument_id, period = query.get("instrumentId", ""), query.get("period", "")
    first = _Request(op="subscribe", channel=channel, instrument_id=instrument_id, period=period)
    await _serve_market(websocket, state, (channel,), first)


@router.websocket(USER_PATH)
async def user_socket(websocket: WebSocket, state: State) -> None:
    """A user's own messages, after `{"op":"auth",…}` with an access token, or signed with an API key that may READ;
    closed with 4401 or 4403 when that fails, or when the session or key ends."""
    if not await _knows_query(websocket):
        return
    async with _accepted(websocket, state) as accepted:
        if accepted:
            await _serve_new_user(websocket, state)


async def _serve_new_user(websocket: WebSocket, state: AppState) -> None:
    try:
        await _serve_user(websocket, state, await _first_request(websocket))
    except WebSocketDisconnect:
        return
    except Problem as problem:
        code = FORBIDDEN_CLOSE if problem.code == "FORBIDDEN" else UNAUTHENTICATED_CLOSE
        await close_socket(websocket, code, problem.detail)
    except (RedisError, *OUTAGES) as error:
        log.warning("A user socket cannot be served: %r", error)
        await close_socket(websocket, TRY_AGAIN_LATER_CLOSE, "Try again later")


async def _knows_query(websocket: WebSocket, *names: str) -> bool:
    """Whether the handshake has these parameters only; refused with HTTP 422 otherwise."""
    try:
        require_known(websocket.scope, spellings(*names))
    except Problem as problem:
        await websocket.send_denial_response(problem_response(problem))
        return False
    return True


@asynccontextmanager
async def _accepted(websocket: WebSocket, state: AppState) -> AsyncIterator[bool]:
    """The socket open, or refused with HTTP 429 when its address has too many of them here."""
    address = websocket.client.host if websocket.client is not None else ""
    sockets, sockets_max = state.feeds.sockets, state.settings.sockets_per_address
    if sockets[address] >= sockets_max:
        problem = Problem("RATE_LIMITED", f"An address may have {sockets_max} sockets open")
        await websocket.send_denial_response(problem_response(problem))
        yield False
        return
    sockets[address] += 1
    try:
        await websocket.accept()
        yield True
    finally:
        sockets[address] -= 1
        if not sockets[address]:
            del sockets[address]


async def _first_request(websocket: WebSocket) -> _Request:
    try:
        async with asyncio.timeout(AUTH_SECONDS):
            request = _parse(await receive(websocket))
    except TimeoutError:
        raise Problem("UNAUTHENTICATED", f"Nothing came within {AUTH_SECONDS:g} seconds") from None
    if request.op != "auth":
        raise Problem("UNAUTHENTICATED", f"Expected op auth first, was {request.op!r}")
    return request


async def _identify(websocket: WebSocket, state: AppState, request: _Request) -> Identity:
    if not request.api_key:
        return await authenticate(state, request.token)
    if request.token:
        raise Problem("UNAUTHENTICATED", "Expected an access token or an API key, was both")
    signed = SignedRequest(
        key_id=request.api_key,
        method="GET",
        target=USER_PATH,
        timestamp=str(request.timestamp),
        recv_window=str(request.recv_window),
        nonce=request.nonce,
        signature=request.signature,
        address=client_address(websocket.scope),
    )
    return await state.keys.authenticate(signed, datetime.now(UTC))


async def _serve_market(
    websocket: WebSocket, state: AppState, channels: Collection[str], first: _Request | None = None
) -> None:
    async with _accepted(websocket, state) as accepted:
        if accepted:
            await _serve_channels(websocket, state.feeds.market, channels, first)


async def _serve_channels(
    websocket: WebSocket, feed: MarketFeed, channels: Collection[str], first: _Request | None
) -> None:
    client = SocketClient(websocket, MARKET_QUEUE_MAX)

    def on_request(request: _Request) -> None:
        if request.op == "ping":
            client.offer(PONG)
        else:
            _change_subscription(feed, client, channels, request)

    def on_message(raw: bytes) -> None:
        try:
            on_request(_parse(raw))
        except Problem as problem:
            client.offer(error_message(problem))

    try:
        if first is not None:
            on_message(msgspec.json.encode(first))
        await client.serve(on_message)
    finally:
        feed.leave(client)


def _change_subscription(feed: MarketFeed, client: SocketClient, channels: Collection[str], request: _Request) -> None:
    change = {"subscribe": feed.subscribe, "unsubscribe": feed.unsubscribe}.get(request.op)
    if change is None:
        raise Problem("VALIDATION_FAILED", f"Expected op subscribe, unsubscribe or ping, was {request.op!r}")
    if request.channel in SOCKET_CHANNELS and request.channel not in channels:
        raise Problem("VALIDATION_FAILED", f"This socket serves {', '.join(channels)} only")
    change(client, _channel(request), request.instrument_id)


def _channel(request: _Request) -> str:
    """The channel as `MarketFeed` knows it: klines have one for each period."""
    if request.channel != "kline":
        return request.channel
    if request.period not in PERIODS_MS:
        raise Problem("VALIDATION_FAILED", f"Expected a period out of {', '.join(PERIODS_MS)}, was {request.period!r}")
    return kline_channel(request.period)


async def _serve_user(websocket: WebSocket, state: AppState, first: _Request) -> None:
    client = SocketClient(websocket, USER_QUEUE_MAX)
    feed = state.feeds.user

    def on_message(raw: bytes) -> None:
        try:
            request = _parse(raw)
            if request.op != "ping":
                raise Problem("VALIDATION_FAILED", f"This socket now takes op ping only, was {request.op!r}")
            client.offer(PONG)
        except Problem as problem:
            client.offer(error_message(problem))

    identity = await _identify(websocket, state, first)
    # Sent when it serves, and before all that is pushed from joining on.
    client.offer(user_message("auth", msgspec.json.encode({"userId": str(identity.user_id)})))
    try:
        async with asyncio.timeout(JOIN_SECONDS):
            await feed.join(client, identity)
        await client.serve(on_message)
    finally:
        feed.leave(client, identity)


def _object(document: object) -> dict[str, object]:
    if not isinstance(document, dict):
        raise ValueError(f"was {type(document).__name__}")
    return document


def _parse(raw: bytes) -> _Request:
    try:
        members = _object(loads_once(raw))
        known = {_SPELLINGS.get(name, name): value for name, value in members.items()}
        if len(known) < len(members):
            raise ValueError("a member is there in both spellings")
        return msgspec.convert(known, _Request)
    except (msgspec.ValidationError, ValueError, RecursionError) as error:
        raise Problem(
            "VALIDATION_FAILED", f"Expected a JSON object with op, channel and instrumentId: {error}"
        ) from None

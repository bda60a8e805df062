"""Public market data over REST, as the market process keeps it in Redis, and the operator's hold on the index."""

import asyncio
from collections.abc import Sequence
from decimal import Decimal
from typing import Annotated, cast

import msgspec
from fastapi import APIRouter, Depends, Path, Query, Response
from pydantic import AliasChoices, Field
from redis.asyncio import Redis

from activities.matching.instruments import read_instruments
from activities.matching.views import require_instrument
from api.edge.caching import CachedRoute
from api.edge.gateway import require_admin
from api.schema.models import Amount, ApiModel, Page, RequestModel, SafeText, Timestamp
from api.schema.openapi import problems
from api.state import AppState, State
from domain.instruments import Instrument
from domain.money import plain
from domain.problems import Problem
from storage.market_keys import HELD_PRICE_CHANNEL, held_price_key, mark_key, snapshot_key

router = APIRouter(prefix="/api/market", tags=["market"], route_class=CachedRoute)
admin_router = APIRouter(prefix="/api/admin", tags=["admin"], dependencies=[Depends(require_admin)])

DEPTH_LIMIT_MAX = 5000
TRADES_LIMIT_MAX = 500
HELD_PRICE_SECONDS_MAX = 3.0
HELD_PRICE_POLL_SECONDS = 0.02

InstrumentId = Annotated[SafeText, Path(alias="instrumentId", max_length=64)]


class InstrumentResponse(ApiModel):
    """What may be traded, in which steps, at which fees."""

    instrument_id: str
    base_asset: str
    quote_asset: str
    tick_size: Amount
    lot_size: Amount
    min_notional: Amount
    maker_fee_rate: Amount
    taker_fee_rate: Amount
    max_leverage: int
    default_leverage: int
    state: str


class TickerResponse(ApiModel):
    """The latest prices and the last 24 hours; null where there is nothing yet."""

    instrument_id: str
    last_price: Amount | None
    best_bid: Amount | None
    best_ask: Amount | None
    volume_24h: Amount = Field(alias="volume24h")
    high_24h: Amount | None = Field(alias="high24h")
    low_24h: Amount | None = Field(alias="low24h")
    price_change_24h: Amount | None = Field(alias="priceChange24h")
    mark_price: Amount | None
    index_price: Amount | None
    index_source: str | None
    is_frozen: bool
    funding_rate: Amount | None
    predicted_funding_rate: Amount | None
    next_funding_time: Timestamp | None


# As a list: many a generator of clients cannot read the schema of a tuple.
Level = Annotated[list[Amount], Field(min_length=2, max_length=2)]


class DepthResponse(ApiModel):
    """[price, quantity] per level, best first, up to engine event `seq`."""

    instrument_id: str
    seq: int
    bids: list[Level]
    asks: list[Level]


class TradeResponse(ApiModel):
    """One public trade; `side` is the taker's."""

    trade_id: int
    price: Amount
    quantity: Amount
    side: str
    executed_at: Timestamp


class MarkPriceResponse(ApiModel):
    """The mark price and what it was made of; `source` says where the index comes from.

    Frozen: there is no fresh index since then, and the mark is the last there was.
    `predictedFundingRate` is what the funding rate would be if the running interval ended now.
    """

    instrument_id: str
    mark_price: Amount
    index_price: Amount
    fair_price: Amount
    premium_index: Amount
    funding_basis: Amount
    calculated_at: Timestamp
    source: str
    is_frozen: bool
    frozen_since: Timestamp | None
    predicted_funding_rate: Amount | None


class HoldIndexRequest(RequestModel):
    """The price at which to hold an index."""

    price: Annotated[Decimal, Field(gt=0, lt=Decimal("1e12"), decimal_places=8)] = Field(
        validation_alias=AliasChoices("price", "markPrice", "mark_price", "indexPrice", "index_price")
    )


class _Snapshot(msgspec.Struct, rename="camel"):
    instrument_id: str
    seq: int
    data: msgspec.Raw


class _Sides(msgspec.Struct):
    bids: list[msgspec.Raw]
    asks: list[msgspec.Raw]


class _Mark(msgspec.Struct, rename="camel"):
    mark_price: Decimal
    index_price: Decimal


_decode_snapshot = msgspec.json.Decoder(_Snapshot).decode
_decode_sides = msgspec.json.Decoder(_Sides).decode
_decode_items = msgspec.json.Decoder(list[msgspec.Raw]).decode
_decode_mark = msgspec.json.Decoder(_Mark).decode


@router.get("/instruments")
async def list_instruments(state: State) -> Page[InstrumentResponse]:
    """All instruments with their trading state."""
    instruments = await read_instruments(state.pool)
    return Page(items=[_instrument(instrument) for instrument in instruments.values()])


@router.get("/tickers", response_model=Page[TickerResponse])
async def list_tickers(state: State) -> Response:
    """The tickers of all instruments that have one."""
    names = await read_instruments(state.pool)
    messages = await state.redis.mget([snapshot_key("tickers", name) for name in names])
    return _page([_decode_snapshot(message).data for message in messages if message is not None])


@router.get("/tickers/{instrumentId}", response_model=TickerResponse, responses=problems("INSTRUMENT_NOT_FOUND"))
async def get_ticker(state: State, instrument_id: InstrumentId) -> Response:
    """The latest prices and the last 24 hours."""
    snapshot = await _read(state, snapshot_key("tickers", instrument_id), instrument_id)
    return _json(bytes(_decode_snapshot(snapshot).data))


@router.get("/depth/{instrumentId}", response_model=DepthResponse, responses=problems("INSTRUMENT_NOT_FOUND"))
async def get_depth(
    state: State, instrument_id: InstrumentId, limit: Annotated[int, Query(ge=1, le=DEPTH_LIMIT_MAX)] = 100
) -> Response:
    """The best `limit` levels of each side of the book."""
    snapshot = _decode_snapshot(await _read(state, snapshot_key("depth", instrument_id), instrument_id))
    sides = _decode_sides(snapshot.data)
    depth = {
        "instrumentId": instrument_id,
        "seq": snapshot.seq,
        "bids": sides.bids[:limit],
        "asks": sides.asks[:limit],
    }
    return _json(msgspec.json.encode(depth))


@router.get("/trades/{instrumentId}", response_model=Page[TradeResponse], responses=problems("INSTRUMENT_NOT_FOUND"))
async def list_trades(
    state: State, instrument_id: InstrumentId, limit: Annotated[int, Query(ge=1, le=TRADES_LIMIT_MAX)] = 100
) -> Response:
    """The last public trades, newest first."""
    snapshot = _decode_snapshot(await _read(state, snapshot_key("trades", instrument_id), instrument_id))
    return _page(_decode_items(snapshot.data)[-limit:][::-1])


@router.get("/mark-price/{instrumentId}", response_model=MarkPriceResponse, responses=problems("INSTRUMENT_NOT_FOUND"))
async def get_mark_price(state: State, instrument_id: InstrumentId) -> Response:
    """The mark price and what it was made of."""
    return _json(await _read(state, mark_key(instrument_id), instrument_id))


@admin_router.post(
    "/mark-price/{instrumentId}", response_model=MarkPriceResponse, responses=problems("INSTRUMENT_NOT_FOUND")
)
async def hold_index(state: State, instrument_id: InstrumentId, request: HoldIndexRequest) -> Response:
    """Hold index and mark of an instrument exactly at a price, until released; answers when the mark stands there."""
    await _require_simulated(state, instrument_id)
    await state.redis.set(held_price_key(instrument_id), plain(request.price))
    await state.redis.publish(HELD_PRICE_CHANNEL, instrument_id)
    try:
        async with asyncio.timeout(HELD_PRICE_SECONDS_MAX):
            return _json(await _mark_at(state.redis, instrument_id, request.price))
    except TimeoutError:
        raise Problem("OVERLOADED", "The price is set, but the market process has not taken it yet") from None


@admin_router.delete("/mark-price/{instrumentId}", status_code=204, responses=problems("INSTRUMENT_NOT_FOUND"))
async def release_index(state: State, instrument_id: InstrumentId) -> None:
    """Let the simulated index move again, from where it is held."""
    await _require_simulated(state, instrument_id)
    await state.redis.delete(held_price_key(instrument_id))
    await state.redis.publish(HELD_PRICE_CHANNEL, instrument_id)


async def _read(state: AppState, key: str, instrument_id: str) -> bytes:
    document = cast(bytes | None, await state.redis.get(key))
    if document is None:
        await require_instrument(state.pool, instrument_id)
        raise Problem("OVERLOADED", f"There is no market data for {instrument_id} yet")
    return document


async def _require_simulated(state: AppState, instrument_id: str) -> None:
    if state.settings.index_source != "simulated":
        raise Problem("FORBIDDEN", "Only a simulated index can be held")
    await require_instrument(state.pool, instrument_id)


async def _mark_at(redis: Redis, instrument_id: str, price: Decimal) -> bytes:
    while True:
        document = cast(bytes | None, await redis.get(mark_key(instrument_id)))
        if document is not None:
            mark = _decode_mark(document)
            if mark.mark_price == mark.index_price == price:
                return document
        await asyncio.sleep(HELD_PRICE_POLL_SECONDS)


def _instrument(instrument: Instrument) -> InstrumentResponse:
    return InstrumentResponse(
        instrument_id=instrument.instrument_id,
        base_asset=instrument.base_asset,
        quote_asset=instrument.quote_asset,
        tick_size=instrument.tick_size,
        lot_size=instrument.lot_size,
        min_notional=instrument.min_notional,
        maker_fee_rate=instrument.maker_fee_rate,
        taker_fee_rate=instrument.taker_fee_rate,
        max_leverage=instrument.max_leverage,
        default_leverage=instrument.default_leverage,
        state=instrument.state,
    )


def _page(items: Sequence[msgspec.Raw]) -> Response:
    return _json(msgspec.json.encode({"items": items, "nextCursor": None}))


def _json(document: bytes) -> Response:
    return Response(document, media_type="application/json")

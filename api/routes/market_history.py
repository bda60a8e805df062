"""Public market data that the market process keeps in tables: klines and funding rates."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated, Literal

import asyncpg
from fastapi import APIRouter, Path, Query, Response
from pydantic import AfterValidator, AliasChoices, Field, model_validator

from activities.market import views as market_views
from activities.matching.views import require_instrument
from api.schema.models import Amount, ApiModel, Page, RequestModel, SafeText, Timestamp
from api.schema.openapi import problems
from api.state import State
from domain.clock import from_ms, to_ms
from domain.periods import PERIODS_MS

router = APIRouter(prefix="/api/market", tags=["market"])

KLINES_MAX = 1_500
RATES_MAX = 500
# The open kline moves with every trade. A closed one may still be amended by a late trade.
OPEN_CACHE_SECONDS = 1
CLOSED_CACHE_SECONDS = 60

_EARLIEST, _LATEST = datetime(1, 1, 2, tzinfo=UTC), datetime(9999, 12, 30, tzinfo=UTC)


def _in_utc(moment: datetime) -> datetime:
    moment = moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
    if not _EARLIEST <= moment <= _LATEST:
        raise ValueError("must be a time between the years 1 and 9999")
    return moment


# ISO-8601 (UTC unless it says otherwise) or Unix milliseconds.
Moment = Annotated[datetime, AfterValidator(_in_utc)]
InstrumentId = Annotated[SafeText, Path(alias="instrumentId", max_length=64)]


class KlineQuery(RequestModel):
    """Which klines: those that open from `startTime` to `endTime`, both included."""

    symbol: str = Field(max_length=64, validation_alias=AliasChoices("symbol", "instrumentId", "instrument_id"))
    period: Literal["1m", "5m", "15m", "1h", "4h", "1d"]
    start_time: Moment | None = Field(None, validation_alias=AliasChoices("startTime", "start_time"))
    end_time: Moment | None = Field(None, validation_alias=AliasChoices("endTime", "end_time"))
    limit: int = Field(500, ge=1, le=KLINES_MAX)

    @model_validator(mode="after")
    def _in_order(self) -> "KlineQuery":
        if self.start_time is not None and self.end_time is not None and self.start_time > self.end_time:
            raise ValueError("startTime must not be after endTime")
        return self


class KlineResponse(ApiModel):
    """One kline of trades from `openTime` up to before `closeTime`; `volume` in base."""

    open_time: Timestamp
    close_time: Timestamp
    open: Amount
    high: Amount
    low: Amount
    close: Amount
    volume: Amount
    trade_count: int
    closed: bool


class FundingRateResponse(ApiModel):
    """The rate paid at `effectiveAt`, and what it was made of; without `samples` the premium counts as zero.

    `source` says where the index behind it came from.
    """

    instrument_id: str
    effective_at: Timestamp
    rate: Amount
    premium_average: Amount
    mark_price: Amount
    samples: int
    source: str


@router.get("/kline", responses=problems("INSTRUMENT_NOT_FOUND"))
async def list_klines(state: State, response: Response, query: Annotated[KlineQuery, Query()]) -> list[KlineResponse]:
    """Klines, oldest first, the open one included: the first `limit` from `startTime` on, else the newest."""
    rows = await market_views.list_klines(
        state.pool,
        query.symbol,
        query.period,
        query.start_time or _EARLIEST,
        query.end_time or _LATEST,
        newest=query.start_time is None,
        limit=query.limit,
    )
    if not rows:
        await require_instrument(state.pool, query.symbol)
    is_open = not rows or not rows[-1]["closed"]
    _cache(response, OPEN_CACHE_SECONDS if is_open or query.end_time is None else CLOSED_CACHE_SECONDS)
    return [_kline(row, PERIODS_MS[query.period]) for row in rows]


@router.get("/funding-rates/{instrumentId}", responses=problems("INSTRUMENT_NOT_FOUND"))
async def list_funding_rates(
    state: State,
    response: Response,
    instrument_id: InstrumentId,
    limit: Annotated[int, Query(ge=1, le=RATES_MAX)] = 100,
    cursor: Annotated[int | None, Query(ge=1, le=to_ms(_LATEST), description="nextCursor of the part before")] = None,
) -> Page[FundingRateResponse]:
    """The funding rates fixed so far, newest first."""
    before = None if cursor is None else from_ms(cursor)
    rows = await market_views.list_funding_rates(state.pool, instrument_id, before=before, limit=limit)
    if not rows:
        await require_instrument(state.pool, instrument_id)
    _cache(response, OPEN_CACHE_SECONDS)
    items = [FundingRateResponse(instrument_id=instrument_id, **dict(row)) for row in rows]
    return Page(items=items, next_cursor=_next_cursor(rows, limit))


def _next_cursor(rows: Sequence[asyncpg.Record], limit: int) -> str | None:
    return str(to_ms(rows[-1]["effective_at"])) if len(rows) == limit else None


def _kline(row: asyncpg.Record, period_ms: int) -> KlineResponse:
    return KlineResponse(close_time=from_ms(to_ms(row["open_time"]) + period_ms), **dict(row))


def _cache(response: Response, seconds: int) -> None:
    response.headers["Cache-Control"] = f"public, max-age={seconds}"

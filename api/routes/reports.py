"""Reports by UTC day: profit, volume, fees, liquidations, open interest; what `reporting/` has counted so far.

Users see their own; operators anybody's (`userId`), or without it everybody's together.
"""

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Annotated, Any

import asyncpg
from fastapi import APIRouter, Query
from pydantic import AfterValidator, Field, model_validator

from api.edge.gateway import User, require_may_act_for
from api.schema.models import ApiModel, Page, RequestModel, SafeText, Timestamp, UserId
from api.schema.paging import LIST_MAX, next_cursor
from api.state import State
from domain.identity import Identity
from domain.money import plain
from reporting import views
from reporting.views import DayReport, Span

router = APIRouter(prefix="/api/reports", tags=["reports"])

DAYS_MAX = 366
DAYS_SHOWN = 30
# The driver takes the first and the last day of all for infinities.
EARLIEST, LATEST = date(1970, 1, 1), date(9999, 12, 30)


def _place(cursor: str) -> tuple[date, str]:
    day, _, instrument_id = cursor.partition("_")
    return date.fromisoformat(day), instrument_id


def _day_cursor(text: str) -> str:
    """Raises ValueError when it names no day of a report."""
    if not EARLIEST <= _place(text)[0] <= LATEST:
        raise ValueError("not a cursor of ours")
    return text


class Days(RequestModel):
    """Which days, both included: up to `to` (today), from `from` (29 days earlier); 366 at most."""

    from_day: Annotated[date | None, Field(alias="from", ge=EARLIEST, le=LATEST)] = None
    to_day: Annotated[date | None, Field(alias="to", ge=EARLIEST, le=LATEST)] = None
    instrument_id: Annotated[SafeText | None, Field(max_length=64)] = None
    limit: Annotated[int, Field(ge=1, le=LIST_MAX)] = 100

    @model_validator(mode="after")
    def _in_order(self) -> "Days":
        first, last = self.range()
        if first > last:
            raise ValueError("from must not be after to")
        if last - first >= timedelta(days=DAYS_MAX):
            raise ValueError(f"a report has {DAYS_MAX} days at most")
        return self

    def range(self) -> tuple[date, date]:
        """First and last day."""
        last = self.to_day or datetime.now(UTC).date()
        return self.from_day or max(EARLIEST, last - timedelta(days=DAYS_SHOWN - 1)), last

    def span(self) -> Span:
        """The days, and the instrument they are asked for."""
        return Span(*self.range(), self.instrument_id)


class DayPage(Days):
    """A part of the days, newest first."""

    cursor: Annotated[
        SafeText | None, AfterValidator(_day_cursor), Field(max_length=80, description="nextCursor of the part before")
    ] = None

    def place(self) -> tuple[date | None, str]:
        """After which day and instrument the part begins."""
        return (None, "") if self.cursor is None else _place(self.cursor)


class UserDayPage(DayPage):
    """Those of one user; of all together, for operators, without `userId`."""

    user_id: UserId | None = None


class LiquidationPage(Days):
    """A part of the liquidations, newest first."""

    user_id: UserId | None = None
    cursor: Annotated[int | None, Field(ge=1, le=2**63 - 1, description="nextCursor of the part before")] = None


class PnlView(ApiModel):
    """What the ledger booked on a day, signed as the user's money moved; `net` is all of it.

    `liquidation`: fees and surplus of liquidations; `insurance`: what the insurance fund paid for the user.
    """

    day: date
    instrument_id: str
    asset: str
    realized_pnl: str
    fees: str
    funding: str
    liquidation: str
    insurance: str
    net: str


class VolumeView(ApiModel):
    """Traded on a day, in quote. Of all users together, each trade is once maker's and once taker's volume."""

    day: date
    instrument_id: str
    maker_volume: str
    taker_volume: str
    volume: str
    maker_trades: int
    taker_trades: int


class FeeView(ApiModel):
    """Trading fees of the trades of a day in quote: paid, or got (negative)."""

    day: date
    instrument_id: str
    maker_fees: str
    taker_fees: str
    fees: str


class ReportedLiquidationView(ApiModel):
    """One liquidation, when it was triggered and why."""

    liquidation_id: int
    user_id: str
    instrument_id: str
    position_id: str
    reason: str
    triggered_at: Timestamp


class OpenInterestView(ApiModel):
    """The sum of all long positions (base) at the end of a day; of today (`isClosed` false) as it is now."""

    day: date
    instrument_id: str
    open_interest: str
    is_closed: bool


@router.get("/pnl", response_model=Page[PnlView])
async def pnl(state: State, user: User, query: Annotated[UserDayPage, Query()]) -> dict[str, Any]:
    """Profit and loss per day and instrument, newest first."""
    return await _sums(state, user, query, views.PNL)


@router.get("/volume", response_model=Page[VolumeView])
async def volume(state: State, user: User, query: Annotated[UserDayPage, Query()]) -> dict[str, Any]:
    """Traded volume per day and instrument, newest first."""
    return await _sums(state, user, query, views.VOLUME)


@router.get("/fees", response_model=Page[FeeView])
async def fees(state: State, user: User, query: Annotated[UserDayPage, Query()]) -> dict[str, Any]:
    """Trading fees per day and instrument, newest first."""
    return await _sums(state, user, query, views.FEES)


@router.get("/liquidations", response_model=Page[ReportedLiquidationView])
async def liquidations(state: State, user: User, query: Annotated[LiquidationPage, Query()]) -> dict[str, Any]:
    """Liquidations that were triggered on these days, newest first."""
    user_id = _whose(user, query.user_id)
    rows = await views.list_liquidations(state.pool, user_id, query.span(), query.cursor, query.limit)
    items = [{**row, "user_id": str(row["user_id"]), "position_id": str(row["position_id"])} for row in rows]
    return {"items": items, "next_cursor": next_cursor(rows, query.limit, "liquidation_id")}


@router.get("/open-interest", response_model=Page[OpenInterestView])
async def open_interest(state: State, _: User, query: Annotated[DayPage, Query()]) -> dict[str, Any]:
    """Open interest per instrument at the close of each day, and now; newest first."""
    today = datetime.now(UTC).date()
    span = query.span()
    until_today = replace(span, last=min(span.last, today))
    rows = await views.list_open_interest(state.pool, until_today, query.place(), query.limit)
    return _page(rows, query.limit, [{**_plain(row), "is_closed": row["day"] < today} for row in rows])


async def _sums(state: State, user: Identity, query: UserDayPage, report: DayReport) -> dict[str, Any]:
    user_id = _whose(user, query.user_id)
    rows = await views.list_sums(state.pool, report, user_id, query.span(), query.place(), query.limit)
    return _page(rows, query.limit, [_plain(row) for row in rows])


def _whose(user: Identity, user_id: int | None) -> int | None:
    """Whose report it is, None for everybody's. Raises Problem FORBIDDEN for another's."""
    if user_id is None:
        return None if user.is_admin else user.user_id
    require_may_act_for(user, user_id)
    return user_id


def _plain(row: asyncpg.Record) -> dict[str, Any]:
    return {name: plain(value) if isinstance(value, Decimal) else value for name, value in row.items()}


def _page(rows: Sequence[asyncpg.Record], limit: int, items: list[dict[str, Any]]) -> dict[str, Any]:
    last = rows[-1] if len(rows) == limit else None
    return {"items": items, "next_cursor": None if last is None else f"{last['day']}_{last['instrument_id']}"}

"""Positions of a user, and what backs them: leverage, margin, margin mode."""

import asyncio
import uuid
from decimal import Decimal
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from pydantic import Field, field_validator
from temporalio.client import WorkflowFailureError
from temporalio.common import SearchAttributePair, TypedSearchAttributes
from temporalio.service import RPCError

from activities.liquidation.accounts import cross_backing
from activities.liquidation.views import deleverage_ranks
from activities.matching.instruments import read_tiers
from activities.positions import views as positions_views
from activities.positions.views import position_view
from activities.risk.exposures import set_margin_mode
from activities.risk.unfinished import patiently, refused_with
from api.edge.gateway import ServedUserId, User, require_may_trade
from api.schema.models import ApiModel, RequestModel, SafeText
from api.schema.openapi import problems
from api.state import AppState, State
from domain.contracts.margin import MARGIN_CHANGE, MarginChange
from domain.contracts.queues import OPERATIONS_QUEUE
from domain.contracts.search import INSTRUMENT_ID, USER_ID
from domain.money import plain
from domain.problems import Problem
from storage.db import Connection
from storage.reference_prices import read_reference_prices

router = APIRouter(prefix="/api/positions", tags=["positions"])

CHANGE_SECONDS_MAX = 5.0
REFUSALS = {
    "POSITION_NOT_FOUND": "There is no open position",
    "POSITION_IS_CROSS": "All of the account's money stands behind a cross position already",
    "POSITION_IN_LIQUIDATION": "The position is being liquidated",
    "POSITION_CHANGED": "The position was traded meanwhile: look at it and ask again",
    "RISK_LIMIT_EXCEEDED": "The position, with the open orders, is too large for this leverage",
    "INSUFFICIENT_MARGIN": "There is not enough money, or the position would be left with too little",
    "INSUFFICIENT_FUNDS": "There is not enough available money",
    "MARK_PRICE_UNAVAILABLE": "There is no mark price to judge the position by",
}


class PositionView(ApiModel):
    """A position. What depends on the mark price is null while there is none.

    `adlRank` is its place in the queue for auto-deleveraging: 5 (would be among the first fifth) to 1; null when flat.
    """

    instrument_id: str
    side: str | None
    quantity: str
    entry_price: str | None
    mark_price: str | None
    unrealized_pnl: str | None
    realized_pnl: str
    leverage: int
    margin_mode: str
    margin: str
    maintenance_margin: str | None
    margin_ratio: str | None
    liquidation_price: str | None
    status: str
    adl_rank: int | None


class LeverageChange(RequestModel):
    """Leverage of what is open and of what will be."""

    leverage: Annotated[int, Field(ge=1, le=125)]


class MarginAmount(RequestModel):
    """Quote to put behind a position, or below 0 to take away."""

    amount: Annotated[Decimal, Field(ge=Decimal("-1e15"), le=Decimal("1e15"), max_digits=38, decimal_places=8)]

    @field_validator("amount")
    @classmethod
    def _moves_something(cls, amount: Decimal) -> Decimal:
        if not amount:
            raise ValueError("expected an amount other than 0")
        return amount


class ModeChange(RequestModel):
    """What stands behind positions opened from now on."""

    margin_mode: Literal["ISOLATED", "CROSS"]


class ModeView(ApiModel):
    """Margin mode in force."""

    instrument_id: str
    margin_mode: str


class LeverageView(ApiModel):
    """Leverage in force."""

    instrument_id: str
    leverage: int


@router.get("", response_model=list[PositionView])
async def list_positions(state: State, user_id: ServedUserId) -> list[dict[str, Any]]:
    """Positions of the caller (of anybody for operators), closed ones included with quantity 0."""
    return await _positions(state, user_id)


async def _positions(state: AppState, user_id: int, instrument_id: str | None = None) -> list[dict[str, Any]]:
    rows = await positions_views.list_positions(state.pool, user_id, instrument_id)
    if not rows:
        return []
    tiers = await read_tiers(state.pool)
    prices = await read_reference_prices(state.redis, list(tiers))
    marks = {name: price.mark for name, price in prices.items()}
    held = [row.instrument_id for row in rows if row.signed_quantity]
    ranks = await deleverage_ranks(state.pool, user_id, held, marks)
    is_cross = any(row.margin_mode == "CROSS" for row in rows)
    backing = await cross_backing(state.pool, marks, user_id) if is_cross else {}
    return [
        position_view(row, marks.get(name), tiers[name], backing.get(name)) | {"adlRank": ranks.get(name)}
        for row in rows
        for name in [row.instrument_id]
    ]


@router.put("/{instrument_id}/leverage", responses=problems("INSTRUMENT_NOT_FOUND", *REFUSALS))
async def change_leverage(state: State, user: User, instrument_id: SafeText, change: LeverageChange) -> LeverageView:
    """Set the leverage for an instrument. Open orders and the position are backed anew: lower leverage takes more
    margin at once (400 INSUFFICIENT_MARGIN when there is not enough), higher leverage releases what need not stay."""
    require_may_trade(user, instrument_id)
    if change.leverage > state.desk.instrument(instrument_id).max_leverage:
        raise Problem("VALIDATION_FAILED", f"Expected a leverage of at most that of {instrument_id}")
    await _change_margin(state, user.user_id, instrument_id, "LEVERAGE", str(change.leverage))
    return LeverageView(instrument_id=instrument_id, leverage=change.leverage)


@router.post(
    "/{instrument_id}/margin",
    response_model=PositionView,
    responses=problems("INSTRUMENT_NOT_FOUND", *REFUSALS),
)
async def change_margin(state: State, user: User, instrument_id: SafeText, change: MarginAmount) -> dict[str, Any]:
    """Put money behind a position (`amount` above 0) or take some back (below 0), as far as the position can do
    without: 400 INSUFFICIENT_MARGIN otherwise. Answers the position."""
    require_may_trade(user, instrument_id)
    state.desk.instrument(instrument_id)
    await _change_margin(state, user.user_id, instrument_id, "MARGIN", plain(change.amount))
    (position,) = await _positions(state, user.user_id, instrument_id)
    return position


@router.put("/{instrument_id}/margin-mode", responses=problems("INSTRUMENT_NOT_FOUND", "MARGIN_MODE_NOT_CHANGEABLE"))
async def change_margin_mode(state: State, user: User, instrument_id: SafeText, change: ModeChange) -> ModeView:
    """ISOLATED: only its own margin stands behind a position. CROSS: all of the user's money in that asset does.
    400 MARGIN_MODE_NOT_CHANGEABLE while there is a position or an open order."""
    require_may_trade(user, instrument_id)
    instrument = state.desk.instrument(instrument_id)

    async def change_now(conn: Connection) -> None:
        await set_margin_mode(conn, user.user_id, instrument, change.margin_mode)

    # Whoever was told that the position is closed, or the order cancelled, may rely on it.
    await patiently(state.pool, user.user_id, change_now, refused_with("MARGIN_MODE_NOT_CHANGEABLE"))
    return ModeView(instrument_id=instrument_id, margin_mode=change.margin_mode)


async def _change_margin(
    state: AppState, user_id: int, instrument_id: str, kind: Literal["LEVERAGE", "MARGIN"], value: str
) -> None:
    """Raises Problem with the refusal, or OVERLOADED when it is still under way, or was ended by an operator."""
    change_id = f"margin-{user_id}-{instrument_id}-{uuid.uuid4().hex[:12]}"
    try:
        async with asyncio.timeout(CHANGE_SECONDS_MAX):
            refusal: str | None = await state.temporal.execute_workflow(
                MARGIN_CHANGE,
                MarginChange(change_id, user_id, instrument_id, kind, value),
                id=change_id,
                task_queue=OPERATIONS_QUEUE,
                search_attributes=TypedSearchAttributes(
                    [SearchAttributePair(USER_ID, str(user_id)), SearchAttributePair(INSTRUMENT_ID, instrument_id)]
                ),
                static_summary=f"{kind} {value} of user {user_id} in {instrument_id}",
            )
    except (TimeoutError, RPCError, WorkflowFailureError) as error:
        raise Problem("OVERLOADED", f"The change may still be under way as {change_id}: look again soon") from error
    if refusal is not None:
        raise Problem(refusal, REFUSALS.get(refusal, "The exchange does not allow it"))

"""Positions of a user, and the leverage they are opened with."""

from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import Field

from activities.instruments import read_tiers
from activities.liquidation import deleverage_ranks
from activities.positions import position_view
from activities.risk import set_leverage
from api.gateway import ServedUserId, User
from api.models import ApiModel, SafeText
from api.state import State
from storage.reference_prices import read_reference_prices

router = APIRouter(prefix="/api/positions", tags=["positions"])


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


class LeverageChange(ApiModel):
    """Leverage for positions opened from now on."""

    leverage: Annotated[int, Field(ge=1, le=125)]


class LeverageView(ApiModel):
    """Leverage in force."""

    instrument_id: str
    leverage: int


@router.get("", response_model=list[PositionView])
async def list_positions(state: State, user_id: ServedUserId) -> list[dict[str, Any]]:
    """Positions of the caller (of anybody for operators), closed ones included with quantity 0."""
    rows = await state.pool.fetch(
        "SELECT instrument_id, signed_quantity, entry_notional, margin, realized_pnl, leverage, margin_mode,"
        " liquidation_price, status FROM positions.positions WHERE user_id = $1 ORDER BY instrument_id",
        user_id,
    )
    if not rows:
        return []
    tiers = await read_tiers(state.pool)
    prices = await read_reference_prices(state.redis, [row["instrument_id"] for row in rows])
    marks = {name: price.mark for name, price in prices.items()}
    held = [row["instrument_id"] for row in rows if row["signed_quantity"]]
    ranks = await deleverage_ranks(state.pool, user_id, held, marks)
    return [
        position_view(name, row, marks.get(name), tiers[name]) | {"adlRank": ranks.get(name)}
        for row in rows
        for name in [row["instrument_id"]]
    ]


@router.put("/{instrument_id}/leverage")
async def change_leverage(state: State, user: User, instrument_id: SafeText, change: LeverageChange) -> LeverageView:
    """Set the leverage for an instrument in which the caller has neither a position nor open orders."""
    instrument = state.desk.instrument(instrument_id)
    async with state.pool.acquire() as conn, conn.transaction():
        await set_leverage(conn, user.user_id, instrument, change.leverage)
    return LeverageView(instrument_id=instrument_id, leverage=change.leverage)

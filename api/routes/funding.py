"""What a user paid and got as funding."""

from typing import Annotated, Any

from fastapi import APIRouter, Query

from activities.positions.views import list_funding_payments
from api.edge.gateway import ServedUserId
from api.schema.models import ApiModel, Page, SafeText, Timestamp
from api.schema.paging import PageCursor, PageLimit, next_cursor
from api.state import State
from domain.money import plain

router = APIRouter(prefix="/api/funding", tags=["funding"])


class FundingPaymentView(ApiModel):
    """One payment: got (positive) or paid (negative) for `quantity` held at `fundingTime`, at that time's price."""

    funding_time: Timestamp
    instrument_id: str
    quantity: str
    side: str
    mark_price: str
    rate: str
    payment: str
    created_at: Timestamp


@router.get("/payments", response_model=Page[FundingPaymentView])
async def list_payments(
    state: State,
    user_id: ServedUserId,
    instrument_id: Annotated[SafeText | None, Query(alias="instrumentId")] = None,
    limit: PageLimit = 100,
    cursor: PageCursor = None,
) -> dict[str, Any]:
    """Payments of the caller (of anybody for operators), newest first."""
    rows = await list_funding_payments(state.pool, user_id, instrument_id=instrument_id, before=cursor, limit=limit)
    items = [
        {
            "fundingTime": row["funding_time"],
            "instrumentId": row["instrument_id"],
            "quantity": plain(row["quantity"]),
            "side": row["side"],
            "markPrice": plain(row["price"]),
            "rate": plain(row["rate"]),
            "payment": plain(row["realized_pnl"]),
            "createdAt": row["created_at"],
        }
        for row in rows
    ]
    return {"items": items, "nextCursor": next_cursor(rows, limit, "event_id")}

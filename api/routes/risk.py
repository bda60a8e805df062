"""The pre-trade check on its own."""

from decimal import Decimal
from functools import partial
from typing import Annotated, Literal

from fastapi import APIRouter
from pydantic import Field

from activities.risk.check import pre_check
from activities.risk.unfinished import patiently
from api.edge.gateway import Caller, require_may_act_for
from api.schema.models import ApiModel, Price, Quantity, UserId
from api.schema.openapi import problems
from api.state import State
from domain.matching import OrderType
from domain.money import plain
from domain.order_entry import OrderRequest
from domain.problems import Problem

router = APIRouter(prefix="/api/risk", tags=["risk"])

# The question itself cannot be answered; every other problem is an answer.
UNKNOWN = ("INSTRUMENT_NOT_FOUND", "OVERLOADED")


class PreCheck(ApiModel):
    """An order that might be placed; without a price, at market."""

    user_id: UserId | None = None
    instrument_id: Annotated[str, Field(max_length=64)]
    side: Literal["BUY", "SELL"]
    quantity: Quantity
    price: Price | None = None


class PreCheckView(ApiModel):
    """Whether it would be accepted, what it would reserve (quote), and the reason when not."""

    allowed: bool
    required_margin: str
    reason: str | None


@router.post("/pre-check", responses=problems("INSTRUMENT_NOT_FOUND"))
async def check_order(state: State, caller: Caller, check: PreCheck) -> PreCheckView:
    """What placement would say of this order now; nothing is reserved. Users ask for themselves."""
    user_id = check.user_id or caller.user_id
    if not user_id:
        raise Problem("VALIDATION_FAILED", "userId is needed")
    require_may_act_for(caller, user_id)
    kind: OrderType = "MARKET" if check.price is None else "LIMIT"
    request = OrderRequest(check.instrument_id, check.side, kind, check.quantity, check.price)
    try:
        order = await state.desk.check(user_id, request)
    except Problem as problem:
        if problem.code in UNKNOWN:
            raise
        return PreCheckView(allowed=False, required_margin="0", reason=problem.code)
    # As placement does: what the user was told counts.
    margin, reason = await patiently(state.pool, user_id, partial(pre_check, order=order), _would_be_refused)
    return PreCheckView(allowed=reason is None, required_margin=plain(margin), reason=reason)


def _would_be_refused(outcome: tuple[Decimal, str | None] | Problem) -> bool:
    return not isinstance(outcome, Problem) and outcome[1] is not None

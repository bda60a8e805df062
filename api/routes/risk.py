"""The pre-trade check on its own."""

from decimal import Decimal
from functools import partial
from typing import Annotated

from fastapi import APIRouter
from pydantic import Field

from activities.risk.check import pre_check
from activities.risk.unfinished import patiently
from api.edge.gateway import Caller, require_may_act_for
from api.schema.models import ApiModel, Price, Quantity, RequestModel, UserId
from api.schema.openapi import problems
from api.state import AppState, State
from domain.matching import OrderType, Side
from domain.money import plain
from domain.order_entry import OrderRequest
from domain.problems import Problem

router = APIRouter(prefix="/api/risk", tags=["risk"])

# The question itself cannot be answered; every other problem is an answer.
UNKNOWN = ("INSTRUMENT_NOT_FOUND", "OVERLOADED")


class PreCheck(RequestModel):
    """An order that might be placed; without a price, at market; without a side, judged for the worse one."""

    user_id: UserId | None = None
    instrument_id: Annotated[str, Field(max_length=64)]
    side: Side | None = None
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
    sides: tuple[Side, ...] = ("BUY", "SELL") if check.side is None else (check.side,)
    return max([await _judged(state, user_id, check, side) for side in sides], key=_badness)


async def _judged(state: AppState, user_id: int, check: PreCheck, side: Side) -> PreCheckView:
    kind: OrderType = "MARKET" if check.price is None else "LIMIT"
    request = OrderRequest(check.instrument_id, side, kind, check.quantity, check.price)
    try:
        order = await state.desk.check(user_id, request)
    except Problem as problem:
        if problem.code in UNKNOWN:
            raise
        return PreCheckView(allowed=False, required_margin="0", reason=problem.code)
    # As placement does: what the user was told counts.
    margin, reason = await patiently(state.pool, user_id, partial(pre_check, order=order), _would_be_refused)
    return PreCheckView(allowed=reason is None, required_margin=plain(margin), reason=reason)


def _badness(answer: PreCheckView) -> tuple[bool, Decimal]:
    return not answer.allowed, Decimal(answer.required_margin)


def _would_be_refused(outcome: tuple[Decimal, str | None] | Problem) -> bool:
    return not isinstance(outcome, Problem) and outcome[1] is not None

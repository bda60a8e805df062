"""Order entry, cancellation and look-up; a user's own fills."""

from datetime import timedelta
from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Depends, Path, Query, Response
from pydantic import Field, ValidationError

from activities.orders import views as orders_views
from activities.orders.countdowns import set_countdown, stop_countdown
from activities.orders.rows import OPEN_STATUSES, OrderRow
from activities.orders.views import order_view
from activities.positions.views import fill_view, list_fills
from api.edge.gateway import ServedUserId, User, require_internal, require_may_trade, require_may_trade_all
from api.schema.models import ApiModel, Page, Price, Quantity, RequestModel, SafeText, Timestamp
from api.schema.openapi import links, problems
from api.schema.paging import PageCursor, PageLimit, next_cursor
from api.schema.problems import ProblemDocument, invalid, problem_members
from api.state import AppState, State
from domain.identity import Identity
from domain.matching import OrderType
from domain.order_entry import LIMIT_TYPES, NewOrder, OrderRequest
from domain.problems import Problem

router = APIRouter(tags=["orders"])

BATCH_ORDERS_MAX = 500
ID_MAX = 2**53 - 1
_encode = msgspec.json.Encoder().encode

OrderStatus = Literal[
    "PENDING",
    "ACCEPTED",
    "PLACED",
    "PARTIALLY_FILLED",
    "FILLED",
    "FAILED",
    "REJECTED",
    "CANCEL_REQUESTED",
    "CANCELLED",
    "EXPIRED",
]
OrderId = Annotated[int, Path(ge=1, le=ID_MAX)]


class OrderCreate(RequestModel):
    """An order to place. `price` is quote per base and needed for LIMIT, `quantity` is in base."""

    instrument_id: str = Field(max_length=64)
    side: Literal["BUY", "SELL"]
    type: OrderType
    quantity: Quantity
    price: Price | None = None
    time_in_force: Literal["GTC", "IOC", "FOK"] = "GTC"
    stp_mode: Literal["EXPIRE_TAKER", "EXPIRE_MAKER", "EXPIRE_BOTH"] = "EXPIRE_TAKER"
    client_order_id: Annotated[str, Field(min_length=1, max_length=36)] | None = None
    post_only: bool = False
    reduce_only: bool = False
    stop_price: Price | None = None
    working_type: Literal["MARK", "LAST"] = "MARK"

    def request(self) -> OrderRequest:
        """The same, for the rules. An order without a limit never rests in the book."""
        return OrderRequest(
            self.instrument_id,
            self.side,
            self.type,
            self.quantity,
            self.price,
            self.time_in_force if self.type in LIMIT_TYPES or self.time_in_force == "FOK" else "IOC",
            self.stp_mode,
            self.client_order_id,
            self.post_only,
            self.reduce_only,
            self.stop_price,
            self.working_type,
        )


class OrderBatchCreate(RequestModel):
    """Up to 500 orders, taken in in this order; each is answered on its own."""

    # Checked one by one, so that a bad one refuses only itself.
    orders: Annotated[
        list[Any],
        Field(
            min_length=1,
            max_length=BATCH_ORDERS_MAX,
            json_schema_extra={"items": {"$ref": "#/components/schemas/OrderCreate"}},
        ),
    ]


class OrderView(ApiModel):
    """An order. `averagePrice` is over all fills; `failureReason` says why it failed or ended unfilled."""

    order_id: int
    client_order_id: str | None
    user_id: str
    instrument_id: str
    side: str
    type: str
    time_in_force: str
    price: str | None
    quantity: str
    filled_quantity: str
    average_price: str | None
    status: OrderStatus
    failure_reason: str | None
    stp_mode: str
    post_only: bool
    reduce_only: bool
    stop_price: str | None
    working_type: str | None
    is_liquidation: bool
    created_at: Timestamp
    updated_at: Timestamp


class OrderBatchView(ApiModel):
    """For each order of the batch, in the same order: the order, or the problem document that it alone would get."""

    results: list[OrderView | ProblemDocument]


class OrderAmend(RequestModel):
    """What to change of an order: `price` in quote per base, `quantity` in base of the whole order, what is filled
    already included; null leaves it as it is."""

    price: Price | None = None
    quantity: Quantity | None = None


class AmendedOrderView(OrderView):
    """The order, and how far the amendment is that was asked for.

    PENDING: its margin is being reserved; ACCEPTED: with the engine; then it was carried out (AMENDED), or the order
    stayed as it was (REJECTED by the engine, FAILED before).
    """

    amendment_id: int
    amendment_status: Literal["PENDING", "ACCEPTED", "AMENDED", "REJECTED", "FAILED"]
    amendment_failure_reason: str | None


class CancelView(ApiModel):
    """A cancellation on its way to the engine; the order's state tells how it ends."""

    order_id: int
    status: Literal["CANCEL_REQUESTED"] = "CANCEL_REQUESTED"


class DeadManSwitch(RequestModel):
    """How long to wait for the next sign of life, in milliseconds; 0 stops waiting."""

    timeout_ms: Annotated[int, Field(ge=0, le=24 * 3600 * 1000)]


class DeadManSwitchView(ApiModel):
    """When the caller's open orders are cancelled; null: not by themselves."""

    timeout_ms: int
    cancel_at: Timestamp | None


class FillView(ApiModel):
    """One side of a trade. Price in quote per base, fee and realised profit in quote."""

    trade_id: int
    order_id: int
    instrument_id: str
    price: str
    quantity: str
    side: str
    role: Literal["MAKER", "TAKER"]
    fee: str
    realized_pnl: str
    executed_at: Timestamp


_ORDER_RULES = (
    "INSTRUMENT_NOT_TRADING",
    "PRICE_NOT_ON_TICK",
    "QUANTITY_NOT_ON_LOT",
    "MIN_NOTIONAL",
    "PRICE_OUT_OF_BAND",
    "INSTRUMENT_NOT_FOUND",
)
_ORDER_LINKS = links(
    orders_get_order=("order_id", "orderId"),
    orders_amend_order=("order_id", "orderId"),
    orders_cancel_order=("order_id", "orderId"),
)
Wait = Annotated[Literal["placed"] | None, Query(description="`placed`: answer after the engine did")]


@router.post(
    "/api/orders",
    response_model=OrderView,
    responses=_ORDER_LINKS | problems(*_ORDER_RULES, "DUPLICATE_CLIENT_ORDER_ID"),
)
async def place_order(state: State, user: User, order: OrderCreate, wait: Wait = None) -> Response:
    """Take an order in: PENDING at once, its saga follows."""
    require_may_trade(user, order.instrument_id)
    checked = await state.desk.check(user.user_id, order.request())
    answer = (await state.desk.place([checked], awaited=wait is not None))[0]
    if isinstance(answer, Exception):
        raise answer
    return _json(answer)


@router.post("/api/orders/batch", response_model=OrderBatchView)
async def place_orders(state: State, user: User, batch: OrderBatchCreate, wait: Wait = None) -> Response:
    """Take up to 500 orders in; `results` has an order or a problem document for each, in the same order."""
    results = [await _checked(state, user, item) for item in batch.orders]
    good = [result for result in results if not isinstance(result, Exception)]
    placed = iter(await state.desk.place(good, awaited=wait is not None)) if good else iter(())
    answers = [result if isinstance(result, Exception) else next(placed) for result in results]
    return _json({"results": [_result(answer) for answer in answers]})


async def _checked(state: AppState, user: Identity, item: object) -> NewOrder | Exception:
    try:
        request = OrderCreate.model_validate(item).request()
        require_may_trade(user, request.instrument_id)
        return await state.desk.check(user.user_id, request)
    except ValidationError as error:
        return invalid(error.errors())
    except Problem as problem:
        return problem


def _result(answer: dict[str, Any] | Exception) -> dict[str, Any]:
    if isinstance(answer, Problem):
        return problem_members(answer)
    if isinstance(answer, Exception):
        raise answer
    return answer


@router.get("/api/orders/{order_id}", response_model=OrderView, responses=problems("ORDER_NOT_FOUND"))
async def get_order(state: State, user: User, order_id: OrderId) -> Response:
    """One of the caller's orders."""
    return _json(order_view(await _own_order(state, user, order_id)))


@router.get("/api/orders", response_model=Page[OrderView])
async def list_orders(
    state: State,
    user_id: ServedUserId,
    instrument_id: Annotated[SafeText | None, Query(alias="instrumentId")] = None,
    status: Annotated[OrderStatus | None, Query()] = None,
    limit: PageLimit = 100,
    cursor: PageCursor = None,
) -> Response:
    """Orders of the caller (of anybody for operators), newest first."""
    rows = await orders_views.list_orders(
        state.pool, user_id, instrument_id=instrument_id, status=status, before=cursor, limit=limit
    )
    items = [order_view(row) for row in rows]
    return _page(items, next_cursor(items, limit, "orderId"))


@router.post("/api/orders/cancel-all-after")
async def cancel_all_after(state: State, user: User, switch: DeadManSwitch) -> DeadManSwitchView:
    """Dead-man switch: cancel all the caller's open orders in `timeoutMs`, unless called again before; 0 stops it."""
    require_may_trade_all(user)
    async with state.pool.acquire() as conn:
        if not switch.timeout_ms:
            await stop_countdown(conn, user.user_id)
            return DeadManSwitchView(timeout_ms=0, cancel_at=None)
        cancel_at = await set_countdown(conn, user.user_id, timedelta(milliseconds=switch.timeout_ms))
    return DeadManSwitchView(timeout_ms=switch.timeout_ms, cancel_at=cancel_at)


@router.post(
    "/api/orders/{order_id}/amend",
    response_model=AmendedOrderView,
    responses=problems(*_ORDER_RULES, "ORDER_NOT_FOUND", "ORDER_NOT_AMENDABLE"),
)
async def amend_order(state: State, user: User, order_id: OrderId, change: OrderAmend, wait: Wait = None) -> Response:
    """Change the price or the quantity of one of the caller's open orders that have a limit.

    It keeps its place in the queue if its price stays and its quantity does not grow, else it enters anew and may
    trade. More margin, if the amended order needs more, is reserved before. One amendment of an order at a time.
    """
    if user.instruments:
        require_may_trade(user, (await _own_order(state, user, order_id)).instrument_id)
    return _json(
        await state.desk.amend(user.user_id, order_id, change.price, change.quantity, awaited=wait is not None)
    )


@router.delete("/api/orders/{order_id}", responses=problems("ORDER_NOT_FOUND", "ORDER_NOT_CANCELLABLE"))
async def cancel_order(state: State, user: User, order_id: OrderId) -> CancelView:
    """Request the cancellation of one of the caller's orders."""
    row = await _own_order(state, user, order_id)
    require_may_trade(user, row.instrument_id)
    return await _cancel(state, row)


@router.delete("/api/orders", responses=problems("INSTRUMENT_NOT_FOUND"))
async def cancel_orders(
    state: State, user: User, instrument_id: Annotated[SafeText | None, Query(alias="instrumentId")] = None
) -> Page[CancelView]:
    """Request the cancellation of all the caller's open orders, of one instrument or of all."""
    if instrument_id is None:
        require_may_trade_all(user)
    else:
        require_may_trade(user, instrument_id)
        state.desk.instrument(instrument_id)
    order_ids = await orders_views.open_order_ids(state.pool, user.user_id, instrument_id)
    await state.desk.cancel(order_ids)
    return Page(items=[CancelView(order_id=order_id) for order_id in order_ids])


class MatchingCancel(RequestModel):
    """The order to take out of the book."""

    order_id: Annotated[int, Field(ge=1, le=ID_MAX)]


@router.post(
    "/api/matching/cancel",
    dependencies=[Depends(require_internal)],
    responses=problems("ORDER_NOT_FOUND", "ORDER_NOT_CANCELLABLE"),
)
async def cancel_any_order(state: State, cancel: MatchingCancel) -> CancelView:
    """Request the cancellation of anybody's order; for the exchange's own services."""
    row = await orders_views.find_order(state.pool, cancel.order_id)
    if row is None:
        raise _not_found(cancel.order_id)
    return await _cancel(state, row)


@router.get("/api/trades", response_model=Page[FillView])
async def list_trades(
    state: State,
    user_id: ServedUserId,
    instrument_id: Annotated[SafeText | None, Query(alias="instrumentId")] = None,
    limit: PageLimit = 100,
    cursor: PageCursor = None,
) -> Response:
    """Fills of the caller (of anybody for operators), newest first."""
    rows = await list_fills(state.pool, user_id, instrument_id=instrument_id, before=cursor, limit=limit)
    return _page([fill_view(row) for row in rows], next_cursor(rows, limit, "event_id"))


async def _own_order(state: AppState, user: Identity, order_id: int) -> OrderRow:
    row = await orders_views.find_order(state.pool, order_id, user.user_id)
    if row is None:
        raise _not_found(order_id)
    return row


def _not_found(order_id: int) -> Problem:
    return Problem("ORDER_NOT_FOUND", f"There is no order {order_id}")


async def _cancel(state: AppState, row: OrderRow) -> CancelView:
    if row.status not in OPEN_STATUSES:
        raise Problem("ORDER_NOT_CANCELLABLE", f"Order {row.order_id} is {row.status}")
    if row.status != "CANCEL_REQUESTED":
        await state.desk.cancel([row.order_id])
    return CancelView(order_id=row.order_id)


def _json(document: object) -> Response:
    return Response(_encode(document), media_type="application/json")


def _page(items: list[dict[str, Any]], cursor: str | None) -> Response:
    return _json({"items": items, "nextCursor": cursor})

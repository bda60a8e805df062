"""What may be called in the name of a user, by a signed-in session or by a program with an API key."""

import secrets
from collections.abc import AsyncIterator, Sequence
from decimal import Decimal
from typing import Any, TypeVar

import msgspec

from client.errors import Refused, refused_document
from client.exchange import Caller, Exchange, Query
from client.models import (
    AmendedOrder,
    Balance,
    Cancellation,
    DeadManSwitch,
    Fill,
    FundingPayment,
    LedgerEntry,
    MarginMode,
    NewOrder,
    Order,
    Page,
    Position,
    PreCheck,
    Side,
    User,
)

T = TypeVar("T")


class Account:
    """Calls in the name of one user, whoever makes them: `caller` is an `ApiKey`, or that of `sign_in`.

    All raise Refused and UnavailableError.
    """

    def __init__(self, exchange: Exchange, caller: Caller) -> None:
        self.exchange = exchange
        self.caller = caller

    async def me(self) -> User:
        """One's account."""
        return await self._call("GET", "/api/users/me", User)

    async def place(self, order: NewOrder, *, wait: bool = False) -> Order:
        """Place an order; with `wait` the answer comes after the engine's.

        An order without a client order id gets one, so that it can be repeated: it is placed once in any case.
        """
        is_ours = order.client_order_id is None
        try:
            return await self._call("POST", "/api/orders", Order, body=_named(order), query=_wait(wait))
        except Refused as refusal:
            first = refusal.order
            if first is None or not is_ours:
                raise
            return first

    async def place_all(self, orders: Sequence[NewOrder], *, wait: bool = False) -> list[Order | Refused]:
        """Place up to 500 orders, in this order; for each the order, or why not."""
        body = {"orders": [_named(order) for order in orders]}
        answer = await self._call("POST", "/api/orders/batch", dict[str, Any], body=body, query=_wait(wait))
        return [_order_or_refusal(result) for result in answer["results"]]

    async def amend(
        self, order_id: int, *, price: Decimal | None = None, quantity: Decimal | None = None, wait: bool = False
    ) -> AmendedOrder:
        """Change price or quantity (of the whole order, what is filled included) of an open order."""
        body = {"price": price, "quantity": quantity}
        path = f"/api/orders/{order_id}/amend"
        return await self._call("POST", path, AmendedOrder, body=body, query=_wait(wait), repeatable=False)

    async def cancel(self, order_id: int) -> None:
        """Ask for the end of an order; its state tells how it ends."""
        await self._call("DELETE", f"/api/orders/{order_id}", Cancellation)

    async def cancel_all(self, instrument_id: str | None = None) -> list[int]:
        """Ask for the end of all open orders; their ids."""
        query = {"instrumentId": instrument_id}
        found = await self._call("DELETE", "/api/orders", Page[Cancellation], query=query)
        return [cancellation.order_id for cancellation in found.items]

    async def cancel_all_after(self, milliseconds: int) -> DeadManSwitch:
        """All open orders are cancelled then, unless this is called again before; 0 stops it."""
        return await self._call("POST", "/api/orders/cancel-all-after", DeadManSwitch, body={"timeoutMs": milliseconds})

    async def order(self, order_id: int) -> Order:
        """One's order."""
        return await self._call("GET", f"/api/orders/{order_id}", Order)

    def orders(self, *, instrument_id: str | None = None, status: str | None = None) -> AsyncIterator[Order]:
        """One's orders, newest first."""
        return self._pages("/api/orders", Order, {"instrumentId": instrument_id, "status": status})

    def fills(self, instrument_id: str | None = None) -> AsyncIterator[Fill]:
        """One's fills, newest first."""
        return self._pages("/api/trades", Fill, {"instrumentId": instrument_id})

    async def pre_check(
        self, instrument_id: str, side: Side, quantity: Decimal, price: Decimal | None = None
    ) -> PreCheck:
        """What placement would say of an order now (without a price: at market)."""
        body = {"instrumentId": instrument_id, "side": side, "quantity": quantity, "price": price}
        return await self._call("POST", "/api/risk/pre-check", PreCheck, body=body)

    async def positions(self) -> list[Position]:
        """One's positions, closed ones included with quantity 0."""
        return await self._call("GET", "/api/positions", list[Position])

    async def set_leverage(self, instrument_id: str, leverage: int) -> None:
        """For what is open and what will be."""
        path = f"/api/positions/{instrument_id}/leverage"
        await self._call("PUT", path, dict[str, Any], body={"leverage": leverage})

    async def add_margin(self, instrument_id: str, amount: Decimal) -> Position:
        """Put quote behind a position, or take it back (below 0); the position then."""
        path = f"/api/positions/{instrument_id}/margin"
        return await self._call("POST", path, Position, body={"amount": amount}, repeatable=False)

    async def set_margin_mode(self, instrument_id: str, mode: MarginMode) -> None:
        """For positions opened from now on."""
        path = f"/api/positions/{instrument_id}/margin-mode"
        await self._call("PUT", path, dict[str, Any], body={"marginMode": mode})

    async def balances(self) -> list[Balance]:
        """One's money."""
        return await self._call("GET", "/api/ledger/balances", list[Balance])

    def entries(self, asset: str | None = None) -> AsyncIterator[LedgerEntry]:
        """Every movement of one's money, newest first."""
        return self._pages("/api/ledger/entries", LedgerEntry, {"asset": asset})

    def funding_payments(self, instrument_id: str | None = None) -> AsyncIterator[FundingPayment]:
        """What one got and paid as funding, newest first."""
        return self._pages("/api/funding/payments", FundingPayment, {"instrumentId": instrument_id})

    async def _call(
        self,
        method: str,
        path: str,
        result: type[T],
        *,
        body: object = None,
        query: Query | None = None,
        repeatable: bool = True,
    ) -> T:
        return await self.exchange.call(
            method, path, result, body=body, query=query, caller=self.caller, repeatable=repeatable
        )

    def _pages(self, path: str, item: type[T], query: Query) -> AsyncIterator[T]:
        return self.exchange.pages(path, item, query, self.caller)


def _named(order: NewOrder) -> NewOrder:
    if order.client_order_id is not None:
        return order
    return msgspec.structs.replace(order, client_order_id=secrets.token_hex(16))


def _wait(wait: bool) -> Query:
    return {"wait": "placed" if wait else None}


def _order_or_refusal(result: dict[str, Any]) -> Order | Refused:
    return msgspec.convert(result, Order) if "orderId" in result else refused_document(result, 0)

"""The exchange at one address: its public calls, and the way for those of a user."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from datetime import datetime
from types import TracebackType
from typing import Any, Protocol, TypeVar

import httpx
import msgspec

from client.errors import Refused, UnavailableError, refused
from client.models import (
    Depth,
    FundingRate,
    Instrument,
    Kline,
    MarkPrice,
    Page,
    Ticker,
    Trade,
)

REQUEST_SECONDS = 15.0
PAUSE_SECONDS = 0.5
PAGE_ITEMS = 500
_BUSY = (httpx.codes.TOO_MANY_REQUESTS, httpx.codes.SERVICE_UNAVAILABLE)

Query = Mapping[str, str | int | None]
T = TypeVar("T")


class Caller(Protocol):
    """Who calls: proves it with headers."""

    def headers(self, method: str, target: str, body: bytes) -> Mapping[str, str]:
        """The proof for one request; `target` is path and query as sent."""

    async def renew(self, refused_headers: Mapping[str, str]) -> bool:
        """After a 401: whether there is a better proof now."""


def ignore(_: str) -> None:
    """Nobody wants to know."""


class Exchange:
    """`async with Exchange("http://127.0.0.1:8000") as exchange:`.

    While the exchange is busy or away, calls that are safe to repeat are repeated for `patience` seconds; `on_busy`
    hears each time why. Every call raises Refused, or UnavailableError when the exchange stays away.
    """

    def __init__(
        self, url: str, *, patience: float = 0.0, on_busy: Callable[[str], None] = ignore, connections: int = 24
    ) -> None:
        self.url = url.rstrip("/")
        self.patience = patience
        self.on_busy = on_busy
        limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
        self._http = httpx.AsyncClient(base_url=self.url, timeout=REQUEST_SECONDS, limits=limits, trust_env=False)

    async def __aenter__(self) -> "Exchange":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def is_ready(self) -> bool:
        """Whether all that the exchange needs answers. Raises UnavailableError when it is not even there."""
        try:
            answer = await self._http.get("/health/ready")
        except (httpx.TransportError, httpx.InvalidURL) as error:
            raise UnavailableError(f"{self.url} does not answer: {type(error).__name__}") from error
        return answer.is_success

    async def instruments(self) -> list[Instrument]:
        """All instruments."""
        return (await self.call("GET", "/api/market/instruments", Page[Instrument])).items

    async def ticker(self, instrument_id: str) -> Ticker:
        """The latest prices and the last 24 hours."""
        return await self.call("GET", f"/api/market/tickers/{instrument_id}", Ticker)

    async def depth(self, instrument_id: str, limit: int = 100) -> Depth:
        """The best `limit` levels of either side."""
        return await self.call("GET", f"/api/market/depth/{instrument_id}", Depth, query={"limit": limit})

    async def trades(self, instrument_id: str, limit: int = 100) -> list[Trade]:
        """The last public trades, newest first."""
        return (
            await self.call("GET", f"/api/market/trades/{instrument_id}", Page[Trade], query={"limit": limit})
        ).items

    async def mark_price(self, instrument_id: str) -> MarkPrice:
        """The mark price."""
        return await self.call("GET", f"/api/market/mark-price/{instrument_id}", MarkPrice)

    async def klines(
        self,
        instrument_id: str,
        period: str,
        *,
        start: datetime | None = None,
        end: datetime | None = None,
        limit: int = 500,
    ) -> list[Kline]:
        """Klines that open from `start` to `end`, oldest first: the first `limit` of them, without `start` the last."""
        query = {
            "symbol": instrument_id,
            "period": period,
            "startTime": None if start is None else start.isoformat(),
            "endTime": None if end is None else end.isoformat(),
            "limit": limit,
        }
        return await self.call("GET", "/api/market/kline", list[Kline], query=query)

    def funding_rates(self, instrument_id: str) -> AsyncIterator[FundingRate]:
        """The funding rates so far, newest first."""
        return self.pages(f"/api/market/funding-rates/{instrument_id}", FundingRate)

    async def pages(
        self, path: str, item: type[T], query: Query | None = None, caller: Caller | None = None
    ) -> AsyncIterator[T]:
        """Every item of a list, read part by part."""
        cursor: str | None = None
        while True:
            part_of = {**(query or {}), "limit": PAGE_ITEMS, "cursor": cursor}
            # The type is an argument here, which a type checker cannot follow.
            part: Page[Any] = await self.call("GET", path, Page[item], query=part_of, caller=caller)  # type: ignore[valid-type]  # as said above
            for found in part.items:
                yield found
            cursor = part.next_cursor
            if cursor is None:
                return

    async def call(
        self,
        method: str,
        path: str,
        result: type[T],
        *,
        body: object = None,
        query: Query | None = None,
        caller: Caller | None = None,
        repeatable: bool = True,
    ) -> T:
        """One call and its answer (None when it is empty)."""
        end = time.monotonic() + (self.patience if repeatable else 0.0)
        while True:
            problem = await self._try(method, path, body, query, caller)
            if isinstance(problem, httpx.Response):
                return msgspec.json.decode(problem.content or b"null", type=result)
            is_busy = isinstance(problem, UnavailableError) or (problem.status in _BUSY and problem.work is None)
            if not is_busy or time.monotonic() >= end:
                raise problem
            self.on_busy(problem.code if isinstance(problem, Refused) else "CONNECTION_LOST")
            await asyncio.sleep(PAUSE_SECONDS)

    async def _try(
        self, method: str, path: str, body: object, query: Query | None, caller: Caller | None
    ) -> httpx.Response | Refused | UnavailableError:
        content = b"" if body is None else msgspec.json.encode(body)
        params = {name: value for name, value in (query or {}).items() if value is not None}
        headers = {"Content-Type": "application/json"} if content else {}
        request = self._http.build_request(method, path, content=content, params=params, headers=headers)
        try:
            answer = await self._send(request, content, caller)
        except httpx.TransportError as error:
            return UnavailableError(f"{self.url} went away: {type(error).__name__}")
        return answer if answer.is_success else refused(answer)

    async def _send(self, request: httpx.Request, content: bytes, caller: Caller | None) -> httpx.Response:
        if caller is None:
            return await self._http.send(request)
        target = request.url.raw_path.decode()
        proof = caller.headers(request.method, target, content)
        request.headers.update(proof)
        answer = await self._http.send(request)
        if answer.status_code == httpx.codes.UNAUTHORIZED and await caller.renew(proof):
            request.headers.update(caller.headers(request.method, target, content))
            answer = await self._http.send(request)
        return answer

"""Counts and times every request, by the route that served it."""

import time
from functools import cache

from prometheus_client import Counter, Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from telemetry.metrics import HTTP_IN_FLIGHT, HTTP_REQUESTS, HTTP_SECONDS

# Paths that lead nowhere are the callers' invention: they share one name.
NO_ROUTE = "none"
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class Meter:
    """ASGI middleware; the outermost, so that refusals of the gateway are counted too."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request; sockets pass uncounted."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 500
        start = time.perf_counter()

        async def send_noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        HTTP_IN_FLIGHT.inc()
        try:
            await self._app(scope, receive, send_noting)
        finally:
            HTTP_IN_FLIGHT.dec()
            seconds, requests = _figures(_known(scope["method"]), _route(scope), status)
            seconds.observe(time.perf_counter() - start)
            requests.inc()


def count_refusal(method: str) -> None:
    """Count a request that was refused before the application saw it."""
    _figures(_known(method), NO_ROUTE, 503)[1].inc()


def _known(method: str) -> str:
    """Other methods are the callers' invention, too."""
    return method if method in _METHODS else "other"


@cache
def _figures(method: str, route: str, status: int) -> tuple[Histogram, Counter]:
    """Found once: looking a series up by its labels costs more than counting."""
    return HTTP_SECONDS.labels(method, route), HTTP_REQUESTS.labels(method, route, str(status))


def _route(scope: Scope) -> str:
    """The route's whole path. FastAPI keeps it beside the route itself, which lacks the prefixes of its routers."""
    chosen = scope.get("fastapi", {}).get("effective_route_context") or scope.get("route")
    return str(getattr(chosen, "path_format", NO_ROUTE))

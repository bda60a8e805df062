"""The application: gateway, routers, problem documents, and the state they share."""

import asyncio
from collections.abc import AsyncIterator, MutableMapping
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, Depends, FastAPI
from starlette.middleware.cors import CORSMiddleware
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from api.edge.gateway import Gateway
from api.edge.metering import Meter
from api.limits.load import Load
from api.routes import (
    admin,
    api_keys,
    auth,
    credentials,
    funding,
    health,
    insurance,
    ledger,
    market,
    market_history,
    orders,
    positions,
    reports,
    risk,
    sockets,
    users,
    well_known,
)
from api.schema.openapi import DocumentedApi, operation_id
from api.schema.problems import add_handlers
from api.schema.strictness import only_known
from api.state import open_state
from settings import Settings
from telemetry.tracing import start_tracing, stop_tracing

ROUTERS: list[APIRouter] = [
    # First, because routes are tried in turn and most requests are orders.
    orders.router,
    users.router,
    auth.router,
    api_keys.router,
    risk.router,
    ledger.router,
    positions.router,
    funding.router,
    credentials.router,
    admin.router,
    insurance.router,
    reports.router,
    market.router,
    market_history.router,
    market.admin_router,
    sockets.router,
    well_known.router,
    health.router,
]
_API_KEY_HEADERS = ["X-Api-Key", "X-Api-Timestamp", "X-Api-Recv-Window", "X-Api-Nonce", "X-Api-Signature"]


DESCRIPTION = """
Answers of `/api/market` may be kept for one second and have an ETag. Market data and a user's own events are pushed
over WebSockets, `/ws/market` and `/ws/user`: `docs/websocket.md` has their messages, heartbeat, limits, closing codes.
"""


def create_app(settings: Settings) -> FastAPI:
    """The api process as an ASGI application; its lifespan connects to the servers and leaves them."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with open_state(settings) as state:
            app.state.exchange = state
            watching = asyncio.create_task(app.state.load.watch())
            yield
            watching.cancel()
        stop_tracing()

    start_tracing("api", settings.otlp_endpoint)
    app = DocumentedApi(
        title="Saga Exchange",
        version="0.1.0",
        description=DESCRIPTION,
        lifespan=lifespan,
        dependencies=[Depends(only_known)],
        # A path is as it is documented or unknown: a redirect would be followed with the password, to where Host says.
        redirect_slashes=False,
        generate_unique_id_function=operation_id,
        # A span of every request costs more than most requests; figures are ours (api/edge/metering.py).
        telemetry={
            "tracing": settings.otlp_endpoint is not None,
            "operation_spans": False,
            "metrics": False,
            "logs": False,
            "auto_configure": False,
            "exclude": _is_unobserved,
        },
    )
    app.state.load = Load(
        settings.requests_in_flight_max, settings.loop_lag_seconds_max, settings.request_wait_seconds_max
    )
    app.state.logs_all_requests = settings.access_log == "all"
    add_handlers(app)
    # The last one added is the outermost.
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=_listed(settings.cors_origins),
            allow_methods=["GET", "POST", "PUT", "PATCH", "DELETE"],
            allow_headers=["Authorization", "Content-Type", "X-Request-Id", *_API_KEY_HEADERS],
            expose_headers=["X-Request-Id", "Retry-After", "RateLimit", "RateLimit-Policy"],
        )
    app.add_middleware(Gateway)
    app.add_middleware(Meter)
    if settings.trusted_proxies:
        app.add_middleware(ProxyHeadersMiddleware, trusted_hosts=_listed(settings.trusted_proxies))
    for router in ROUTERS:
        app.include_router(router)
    return app


def _is_unobserved(scope: MutableMapping[str, Any]) -> bool:
    """Whether a request makes no trace: probes come every few seconds, sockets last for hours."""
    path: str = scope.get("path", "")
    return scope["type"] != "http" or path == "/metrics" or path.startswith("/health/")


def _listed(text: str) -> list[str]:
    return [item.strip() for item in text.split(",") if item.strip()]

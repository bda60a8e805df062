"""The application: gateway, routers, problem documents, and the state they share."""

from collections.abc import AsyncIterator, MutableMapping
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, FastAPI

from api import (
    admin,
    auth,
    funding,
    health,
    insurance,
    ledger,
    market,
    market_history,
    orders,
    positions,
    risk,
    sockets,
    users,
)
from api.gateway import Gateway
from api.metering import Meter
from api.problems import add_handlers
from api.state import open_state
from settings import Settings
from telemetry.tracing import start_tracing, stop_tracing

ROUTERS: list[APIRouter] = [
    users.router,
    auth.router,
    orders.router,
    risk.router,
    ledger.router,
    positions.router,
    funding.router,
    admin.router,
    insurance.router,
    market.router,
    market_history.router,
    market.admin_router,
    sockets.router,
    health.router,
]


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
            yield
        stop_tracing()

    start_tracing("api", settings.otlp_endpoint)
    app = FastAPI(
        title="Saga Exchange",
        version="0.1.0",
        description=DESCRIPTION,
        lifespan=lifespan,
        # A span of every request costs more than most requests; figures are ours (api/metering.py).
        telemetry={
            "tracing": settings.otlp_endpoint is not None,
            "operation_spans": False,
            "metrics": False,
            "logs": False,
            "auto_configure": False,
            "exclude": _is_unobserved,
        },
    )
    add_handlers(app)
    app.add_middleware(Gateway)
    app.add_middleware(Meter)
    for router in ROUTERS:
        app.include_router(router)
    return app


def _is_unobserved(scope: MutableMapping[str, Any]) -> bool:
    """Whether a request makes no trace: probes come every few seconds, sockets last for hours."""
    path: str = scope.get("path", "")
    return scope["type"] != "http" or path == "/metrics" or path.startswith("/health/")

"""The application: gateway, routers, problem documents, and the state they share."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

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
from api.openapi import DocumentedApi, operation_id
from api.problems import add_handlers
from api.state import open_state
from settings import Settings

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

    app = DocumentedApi(
        title="Saga Exchange",
        version="0.1.0",
        description=DESCRIPTION,
        lifespan=lifespan,
        generate_unique_id_function=operation_id,
        # Spans and metrics of every request cost more than most requests.
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
    )
    add_handlers(app)
    app.add_middleware(Gateway)
    for router in ROUTERS:
        app.include_router(router)
    return app

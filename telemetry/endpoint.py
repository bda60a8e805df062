"""The small HTTP server of a process that has none: /metrics, /health/live and /health/ready.

It runs in the process's own event loop: while that stands still, it does not answer, which is the truth.
"""

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from telemetry.health import Checks, failures
from telemetry.metrics import CONTENT_TYPE, exposition

log = logging.getLogger(__name__)


class _Server(uvicorn.Server):
    """Leaves the signals to the process that it is a part of."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """None of them."""
        yield


@asynccontextmanager
async def endpoint(host: str, port: int | None, checks: Checks) -> AsyncIterator[None]:
    """Answer on `host`:`port` inside the block; nowhere when `port` is None.

    A port that cannot be had costs the figures, not the process: it is logged as an error.
    """
    if port is None:
        yield
        return
    try:
        listener = socket.create_server((host, port))
    except OSError as error:
        log.error("No figures of this process: %s:%d cannot be had: %s", host, port, error.strerror)
        yield
        return
    config = uvicorn.Config(
        _application(checks), log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=1
    )
    server = _Server(config)
    task = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield
    finally:
        server.should_exit = True
        await task


def _application(checks: Checks) -> Starlette:
    async def metrics(_: Request) -> Response:
        return Response(exposition(), media_type=CONTENT_TYPE)

    async def live(_: Request) -> Response:
        return JSONResponse({"status": "UP"})

    async def ready(_: Request) -> Response:
        failed = await failures(checks)
        if failed:
            return JSONResponse({"status": "DOWN", "failed": failed}, status_code=503)
        return JSONResponse({"status": "UP"})

    return Starlette(
        routes=[Route("/metrics", metrics), Route("/health/live", live), Route("/health/ready", ready)],
    )

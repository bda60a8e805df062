"""How the application is served."""

import uvicorn
from fastapi import FastAPI

from api.http_protocol import BoundedHttpProtocol
from api.socket_protocol import OutletProtocol

GRACE_SECONDS = 10
# A peer that does not answer a ping is gone 40 s after its last sign of life; see docs/websocket.md.
PING_SECONDS = 20.0
PONG_SECONDS = 20.0
SOCKET_MESSAGE_BYTES_MAX = 16 * 1024


def server_config(app: FastAPI, host: str, port: int) -> uvicorn.Config:
    """Serve `app` on `host`:`port`; requests in flight at the end get ten seconds to finish."""
    return uvicorn.Config(
        app,
        host=host,
        port=port,
        loop="uvloop",
        http=BoundedHttpProtocol,
        # The application does that itself, for proxies it is told to trust.
        proxy_headers=False,
        server_header=False,
        ws=OutletProtocol,
        # Compression would be done anew for every client; what clients send is short.
        ws_per_message_deflate=False,
        ws_max_size=SOCKET_MESSAGE_BYTES_MAX,
        ws_ping_interval=PING_SECONDS,
        ws_ping_timeout=PONG_SECONDS,
        access_log=False,
        log_config=None,
        backlog=2048,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )

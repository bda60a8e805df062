"""`python -m api`: one api process, until SIGTERM or SIGINT; requests in flight get ten seconds to finish."""

import uvicorn

from api.app import create_app
from api.server import BoundedHttpProtocol
from logs import set_up_logging
from settings import get_settings

GRACE_SECONDS = 10


def main() -> None:
    """Serve on EXCHANGE_API_HOST:EXCHANGE_API_PORT."""
    settings = get_settings()
    set_up_logging(settings)
    uvicorn.run(
        create_app(settings),
        host=settings.api_host,
        port=settings.api_port,
        loop="uvloop",
        http=BoundedHttpProtocol,
        # The application does that itself, for proxies it is told to trust.
        proxy_headers=False,
        server_header=False,
        ws="websockets-sansio",
        # Compression would be done anew for every client; what clients send is short.
        ws_per_message_deflate=False,
        ws_max_size=16 * 1024,
        access_log=False,
        log_config=None,
        backlog=2048,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )


if __name__ == "__main__":
    main()

"""`python -m api`: one api process, until SIGTERM or SIGINT; requests in flight get ten seconds to finish."""

import logging

import uvicorn

from api.app import create_app
from settings import get_settings

GRACE_SECONDS = 10


def main() -> None:
    """Serve on EXCHANGE_API_HOST:EXCHANGE_API_PORT."""
    settings = get_settings()
    logging.basicConfig(level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    uvicorn.run(
        create_app(settings),
        host=settings.api_host,
        port=settings.api_port,
        loop="uvloop",
        http="httptools",
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

"""`python -m api`: one api process, until SIGTERM or SIGINT."""

import sys

from api.app import create_app
from api.edge.server import Server, server_config
from logs import set_up_logging
from settings import get_settings


def main() -> None:
    """Serve on EXCHANGE_API_HOST:EXCHANGE_API_PORT. Raises SystemExit when it cannot start."""
    settings = get_settings()
    set_up_logging(settings)
    server = Server(server_config(create_app(settings), settings.api_host, settings.api_port))
    server.run()
    if not server.started:
        sys.exit(1)


if __name__ == "__main__":
    main()

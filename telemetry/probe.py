"""`python -m telemetry.probe`: whether the process beside it is ready; for container health checks.

Standard library only, since it is started every few seconds.
"""

import os
import sys
from http import HTTPStatus
from http.client import HTTPConnection

SECONDS_MAX = 5.0


def main() -> int:
    """0 when /health/ready says so on EXCHANGE_METRICS_PORT, or without one on EXCHANGE_API_PORT; else 1."""
    port = os.environ.get("EXCHANGE_METRICS_PORT") or os.environ.get("EXCHANGE_API_PORT") or "8000"
    connection = HTTPConnection("127.0.0.1", int(port), timeout=SECONDS_MAX)
    try:
        connection.request("GET", "/health/ready")
        answer = connection.getresponse()
        print(answer.read().decode("utf-8", "replace"))
    except OSError as error:
        print(f"No answer on port {port}: {error}")
        return 1
    return 0 if answer.status == HTTPStatus.OK else 1


if __name__ == "__main__":
    sys.exit(main())

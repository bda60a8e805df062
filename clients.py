"""Connections to the servers other than Postgres: Redis and Temporal; and whether all of them answer."""

from datetime import timedelta
from functools import cache

from redis.asyncio import Redis
from temporalio.client import Client
from temporalio.runtime import PrometheusConfig, Runtime, TelemetryConfig

from settings import Settings
from storage.db import Pool
from telemetry.health import CHECK_SECONDS_MAX, Checks
from telemetry.tracing import temporal_interceptors


def open_redis(settings: Settings) -> Redis:
    """A client with a connection pool; commands raise redis.ConnectionError while the server is away.

    No command times out by itself: callers that must go on while the server stands still set their own limit.
    """
    # With a socket timeout the library sends through asyncio.wait_for, which in Python 3.11 loses a cancellation that
    # arrives as the send completes: the task then never ends.
    return Redis.from_url(
        settings.require_redis_url(), health_check_interval=15, socket_timeout=None, socket_connect_timeout=5
    )


async def connect_temporal(settings: Settings) -> Client:
    """A client of the settings' namespace. Raises RuntimeError when the server cannot be reached."""
    port = settings.temporal_metrics_port
    return await Client.connect(
        settings.require_temporal_address(),
        namespace=settings.temporal_namespace,
        interceptors=temporal_interceptors(),
        runtime=None if port is None else _measured_runtime(f"{settings.metrics_host}:{port}"),
    )


def server_checks(pool: Pool, redis: Redis, temporal: Client) -> Checks:
    """Whether Postgres, Redis and Temporal answer."""
    return {
        "postgres": lambda: pool.fetchval("SELECT 1"),
        "redis": redis.ping,
        "temporal": lambda: temporal.service_client.check_health(timeout=timedelta(seconds=CHECK_SECONDS_MAX)),
    }


@cache
def _measured_runtime(address: str) -> Runtime:
    """The one runtime of this process that shows Temporal's own figures at `address`."""
    figures = PrometheusConfig(
        bind_address=address, counters_total_suffix=True, unit_suffix=True, durations_as_seconds=True
    )
    return Runtime(telemetry=TelemetryConfig(metrics=figures))

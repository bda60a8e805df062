"""Every figure that our processes show to Prometheus, in one place: names, meaning, labels.

A counter whose first increase must be seen (an alert) is shown as 0 from the start. Figures of the whole exchange, as
opposed to one process, are read from the database by `monitors/observer.py` and shown by the worker that observes.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    REGISTRY,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

# When each series was begun: a third of the answer, of no use to us.
disable_created_metrics()  # type: ignore[no-untyped-call]  # the library left its annotation out
CONTENT_TYPE = CONTENT_TYPE_LATEST
_LATENCIES = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_SIZES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)

# --- api -----------------------------------------------------------------------------------------------------------
HTTP_REQUESTS = Counter("exchange_http_requests", "Requests answered.", ["method", "route", "status"])
HTTP_SECONDS = Histogram(
    "exchange_http_request_seconds", "From the head of a request to the end of its answer.", ["method", "route"],
    buckets=_LATENCIES,
)  # fmt: skip
HTTP_IN_FLIGHT = Gauge("exchange_http_requests_in_flight", "Requests that have no answer yet.")
DESK_WAITING = Gauge("exchange_desk_waiting_orders", "Orders, amendments and cancels that wait for a batch.", ["lane"])
DESK_BATCH = Histogram("exchange_desk_batch_orders", "How many went into one batch.", ["lane"], buckets=_SIZES)
DESK_SECONDS = Histogram(
    "exchange_desk_batch_seconds", "How long a batch took; of lane sagas: a whole placement saga.", ["lane"],
    buckets=_LATENCIES,
)  # fmt: skip
WEBSOCKETS = Gauge("exchange_websocket_clients", "Sockets that are open.")
WEBSOCKET_SKIPS = Counter("exchange_websocket_skips", "Times a slow reader was left out messages it gets anew later.")
WEBSOCKETS_DROPPED = Counter("exchange_websocket_dropped", "Sockets closed because they were read too slowly.")

# --- sagas and settlement (api and worker) -------------------------------------------------------------------------
ORDERS = Counter("exchange_orders", "Orders and amendments that came to this outcome.", ["outcome"])
SETTLED_EVENTS = Counter("exchange_settled_events", "Engine events that settlement has acknowledged.", ["instrument"])
AUDITS = Counter("exchange_ledger_audits", "Ledger audits by how they ended.", ["result"])
SWEPT_SAGAS = Counter("exchange_sagas_swept", "Sagas that had no workflow and were started by the sweeper.")
RELAYED_ROWS = Counter("exchange_relay_rows", "Outbox rows that the relay has moved to Redis.")
RELAY_SECONDS = Histogram(
    "exchange_relay_lag_seconds", "Age of the oldest row of a batch once it was relayed.", buckets=_LATENCIES
)

# --- engine --------------------------------------------------------------------------------------------------------
ENGINE_COMMANDS = Counter("exchange_engine_commands", "Commands matched and committed.", ["instrument"])
ENGINE_EVENTS = Counter("exchange_engine_events", "Events written.", ["instrument"])
ENGINE_BATCH = Histogram("exchange_engine_batch_commands", "Commands in one transaction.", buckets=_SIZES)
ENGINE_BATCH_SECONDS = Histogram(
    "exchange_engine_batch_seconds", "Matching a batch and committing it.", buckets=_LATENCIES
)
ENGINE_LEASE = Gauge("exchange_engine_lease_held", "Whether this engine owns the instrument.", ["instrument"])
ENGINE_LEASES_LOST = Counter("exchange_engine_leases_lost", "Leases another engine took away.", ["instrument"])

# --- market --------------------------------------------------------------------------------------------------------
MARKET_PUBLICATIONS = Counter("exchange_market_publications", "Rounds of publishing to Redis.", ["result"])

# --- alerts --------------------------------------------------------------------------------------------------------
ALERTS = Counter("exchange_alerts", "Alerts raised, each with a line ALERT in the log.", ["alert"])

for _result in ("ok", "failed"):
    AUDITS.labels(_result)
    MARKET_PUBLICATIONS.labels(_result)


class Observation(Collector):
    """Figures of the whole exchange as last observed; nothing while another process observes."""

    def __init__(self) -> None:
        self._figures: Sequence[Metric] = ()

    def show(self, figures: Sequence[Metric]) -> None:
        """Show these from now on."""
        self._figures = figures

    def collect(self) -> Iterable[Metric]:
        """What Prometheus gets."""
        return self._figures


def figure(
    name: str, meaning: str, values: Iterable[tuple[Sequence[str], float]], labels: Sequence[str] = ()
) -> Metric:
    """One observed figure with a value for each set of label values."""
    family = GaugeMetricFamily(name, meaning, labels=labels)
    for of, value in values:
        family.add_metric(of, value)
    return family


class ConnectionPool(Protocol):
    """What asyncpg's pools tell about themselves."""

    def is_closing(self) -> bool:
        """Whether it is closed, or about to be."""

    def get_size(self) -> int:
        """Open connections."""

    def get_idle_size(self) -> int:
        """Open connections that nobody uses."""

    def get_max_size(self) -> int:
        """How many connections there may be."""


class _Pools(Collector):
    """Connections of every open pool, read when asked for."""

    def __init__(self) -> None:
        self._pools: list[tuple[str, ConnectionPool]] = []

    def watch(self, name: str, pool: ConnectionPool) -> None:
        """Show `pool` until it is closed."""
        self._pools = [(other, known) for other, known in self._pools if not known.is_closing()]
        self._pools.append((name, pool))

    def collect(self) -> Iterator[Metric]:
        """What Prometheus gets."""
        counts: dict[tuple[str, str], float] = {}
        for name, pool in self._pools:
            for state, count in _connections(pool).items():
                counts[name, state] = counts.get((name, state), 0) + count
        meaning = "Connections to Postgres: in use, idle, and how many there may be."
        yield figure("exchange_db_pool_connections", meaning, counts.items(), ["pool", "state"])


def _connections(pool: ConnectionPool) -> dict[str, int]:
    if pool.is_closing():
        return {}
    idle = pool.get_idle_size()
    return {"used": pool.get_size() - idle, "idle": idle, "max": pool.get_max_size()}


OBSERVATION = Observation()
_pools = _Pools()
REGISTRY.register(OBSERVATION)
REGISTRY.register(_pools)
watch_pool = _pools.watch


def exposition() -> bytes:
    """All figures of this process in Prometheus' text format."""
    return generate_latest()

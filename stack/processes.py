"""The processes of the exchange in start order, and what they are told through their environment."""

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from settings import PORT_MAX, Settings, revealed
from stack import servers
from stack.ports import claim
from stack.servers import Endpoint, Process, Server, StackError
from stack.state import StateFolder

TEMPORAL_PORT = 7233
TEMPORAL_UI_PORT = 8233
PORTS_TRIED = 100
FIRST_METRICS_PORT = 9464
METRICS_PORT, TEMPORAL_METRICS_PORT = "EXCHANGE_METRICS_PORT", "EXCHANGE_TEMPORAL_METRICS_PORT"
# Which ports for figures a process needs: the api shows its own where it serves.
FIGURES = {
    "engine": [METRICS_PORT],
    "worker": [METRICS_PORT, TEMPORAL_METRICS_PORT],
    "market": [METRICS_PORT],
    "api": [TEMPORAL_METRICS_PORT],
}

SERVICES = (
    Process("engine", [*servers.launcher(), sys.executable, "-m", "engine"]),
    Process("worker", [*servers.launcher(), sys.executable, "worker.py"]),
    Process("market", [*servers.launcher(), sys.executable, "-m", "market"]),
    Process("api", [*servers.launcher(), sys.executable, "-m", "api"]),
)


@dataclass(frozen=True)
class Plan:
    """What runs: the embedded servers (those that no setting names), and where all three servers answer."""

    embedded: Sequence[Server]
    database: Endpoint
    redis: Endpoint
    temporal: Endpoint
    temporal_ui_url: str | None
    services: Sequence[Process]

    @property
    def processes(self) -> list[Process]:
        """Everything to supervise, in start order."""
        return [*(server.process for server in self.embedded), *self.services]


def make_plan(settings: Settings, state: StateFolder) -> Plan:
    """Prepares the embedded servers that are needed. Raises StackError when one cannot run here."""
    embedded: list[Server] = []

    def embed(server: Server) -> Endpoint:
        embedded.append(server)
        return server.endpoint

    namespace = settings.temporal_namespace
    ui_url = None
    database_url, redis_url = revealed(settings.database_url), revealed(settings.redis_url)
    database = servers.postgres_at(database_url) if database_url else embed(servers.postgres(state.path))
    redis = servers.valkey_at(redis_url) if redis_url else embed(servers.valkey(state.path))
    if settings.temporal_address:
        temporal = servers.temporal_at(settings.temporal_address, namespace)
    else:
        port, ui_port = _temporal_ports()
        temporal = embed(servers.temporal(state.path, port, ui_port, [namespace]))
        ui_url = f"http://127.0.0.1:{ui_port}"
    return Plan(embedded, database, redis, temporal, ui_url, _with_figures(settings))


def addresses(settings: Settings, plan: Plan) -> dict[str, str]:
    """The settings that lead a tool to the running servers."""
    return {
        "EXCHANGE_DATABASE_URL": plan.database.url,
        "EXCHANGE_REDIS_URL": plan.redis.url,
        "EXCHANGE_TEMPORAL_ADDRESS": plan.temporal.url,
        "EXCHANGE_TEMPORAL_NAMESPACE": settings.temporal_namespace,
    }


def service_environment(
    settings: Settings, state: StateFolder, plan: Plan, internal_token: str, jwt_key: Path, api_key_secrets: Path
) -> dict[str, str]:
    """The environment of our processes: that of the stack with everything it found out or made."""
    return {
        **os.environ,
        **addresses(settings, plan),
        "EXCHANGE_STATE_DIR": str(state.path),
        "EXCHANGE_INTERNAL_TOKEN": internal_token,
        "EXCHANGE_JWT_PRIVATE_KEY_FILE": str(jwt_key),
        "EXCHANGE_API_KEY_SECRETS_FILE": str(api_key_secrets),
        "PYTHONUNBUFFERED": "1",
    }


def scrape_targets(settings: Settings, plan: Plan) -> list[dict[str, object]]:
    """Where the processes show their figures, as Prometheus reads it from a file (file_sd_configs)."""
    ports = [
        (process.name, port)
        for process in plan.services
        for name, port in process.environment.items()
        if name in (METRICS_PORT, TEMPORAL_METRICS_PORT)
    ]
    ports.append(("api", str(settings.api_port)))
    return [{"targets": [f"127.0.0.1:{port}"], "labels": {"job": job}} for job, port in ports]


def _with_figures(settings: Settings) -> list[Process]:
    """The services, each with ports of its own for its figures: those after EXCHANGE_METRICS_PORT that are free."""
    first = settings.metrics_port or FIRST_METRICS_PORT
    candidates = ((port,) for port in range(first, min(first + PORTS_TRIED, PORT_MAX + 1)))
    wanted = sum(map(len, FIGURES.values()))
    claimed = list(islice(_claimed(settings.metrics_host, candidates), wanted))
    if len(claimed) < wanted:
        where = f"on {settings.metrics_host} from {first} on"
        raise StackError(f"No free ports for figures {where}: set EXCHANGE_METRICS_HOST or EXCHANGE_METRICS_PORT")
    ports = (str(port) for (port,) in claimed)
    return [replace(process, environment={name: next(ports) for name in FIGURES[process.name]}) for process in SERVICES]


def _temporal_ports() -> tuple[int, ...]:
    """The usual pair of ports, or the next one that is free."""
    candidates = ((TEMPORAL_PORT + offset, TEMPORAL_UI_PORT + offset) for offset in range(PORTS_TRIED))
    for ports in _claimed("127.0.0.1", candidates):
        return ports
    raise StackError(f"No free pair of ports for Temporal from {TEMPORAL_PORT} and {TEMPORAL_UI_PORT} on")


def _claimed(host: str, candidates: Iterable[tuple[int, ...]]) -> Iterator[tuple[int, ...]]:
    """Those candidates that can be had, each claimed only when it is asked for."""
    for ports in candidates:
        try:
            claim(host, *ports)
        except OSError:
            continue
        yield ports

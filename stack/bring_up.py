"""From nothing to ready: servers, schema, admin account, services, each as soon as what it needs answers."""

import asyncio
import json
import shlex
import sys
from collections.abc import Mapping, Sequence

import httpx
from pydantic import SecretStr
from temporalio.api.enums.v1 import IndexedValueType
from temporalio.api.operatorservice.v1 import AddSearchAttributesRequest, ListSearchAttributesRequest
from temporalio.client import Client
from temporalio.service import RPCError

from settings import Settings
from stack.processes import Plan, addresses, scrape_targets
from stack.screen import Screen
from stack.servers import SEARCH_ATTRIBUTES, StackError, launcher, wait_until_ready
from stack.state import StateFolder, write_private
from stack.supervision import ROOT, Supervisor

EMBEDDED_SECONDS = 60
EXTERNAL_SECONDS = 10
STEP_SECONDS = 120
SLOW_SECONDS = 60
POLL_SECONDS = 0.1
TARGETS = "prometheus-targets.json"

_INDEXED_TYPES = {
    "Int": IndexedValueType.INDEXED_VALUE_TYPE_INT,
    "Keyword": IndexedValueType.INDEXED_VALUE_TYPE_KEYWORD,
    "KeywordList": IndexedValueType.INDEXED_VALUE_TYPE_KEYWORD_LIST,
}


async def bring_up(
    settings: Settings,
    state: StateFolder,
    plan: Plan,
    supervisor: Supervisor,
    environment: Mapping[str, str],
    screen: Screen,
) -> None:
    """Starts everything in order and says `ready` when the API does. Raises StackError when a step fails for good."""
    for server in plan.embedded:
        supervisor.start(server.process.name)
    await asyncio.gather(
        _prepare_database(settings, state, plan, environment),
        wait_until_ready(plan.redis, _patience(settings.redis_url)),
        _prepare_temporal(settings, plan),
    )
    await _step("Setting up the admin account", ["-m", "api.bootstrap"], state, environment)
    for process in plan.services:
        supervisor.start(process.name)
    quoted = (f"{name}={shlex.quote(value)}\n" for name, value in addresses(settings, plan).items())
    write_private(state.path / "environment", "".join(quoted))
    write_private(state.path / TARGETS, json.dumps(scrape_targets(settings, plan), indent=1))
    await _wait_for_services(settings, state, supervisor, screen)
    urls = {"API": _api_url(settings), "docs": f"{_api_url(settings)}/docs", "Temporal UI": plan.temporal_ui_url}
    screen.say("ready  " + "  ".join(f"{name} {url}" for name, url in urls.items() if url))


async def _prepare_database(settings: Settings, state: StateFolder, plan: Plan, environment: Mapping[str, str]) -> None:
    await wait_until_ready(plan.database, _patience(settings.database_url))
    await _step("Migrating the database", ["-m", "alembic", "upgrade", "head"], state, environment)


async def _prepare_temporal(settings: Settings, plan: Plan) -> None:
    await wait_until_ready(plan.temporal, _patience(settings.temporal_address))
    if settings.temporal_address:
        try:
            await _register_search_attributes(settings.temporal_address, settings.temporal_namespace)
        except RPCError as error:
            raise StackError(f"Cannot register search attributes in Temporal: {error.message}") from None


def _patience(external: str | SecretStr | None) -> float:
    """A server we have just started may have to recover first; an external one should be there."""
    return EXTERNAL_SECONDS if external else EMBEDDED_SECONDS


async def _register_search_attributes(address: str, namespace: str) -> None:
    """Adds those that an external Temporal lacks; the embedded one is started with them."""
    operator = (await Client.connect(address, namespace=namespace)).operator_service
    there = await operator.list_search_attributes(ListSearchAttributesRequest(namespace=namespace))
    missing = {
        name: _INDEXED_TYPES[kind] for name, kind in SEARCH_ATTRIBUTES.items() if name not in there.custom_attributes
    }
    if missing:
        request = AddSearchAttributesRequest(namespace=namespace, search_attributes=missing)
        await operator.add_search_attributes(request)


async def _step(what: str, arguments: Sequence[str], state: StateFolder, environment: Mapping[str, str]) -> None:
    """Runs Python to the end, its output in a log. Raises StackError with its last words when it fails."""
    path = state.logs / "set-up.log"
    start = path.stat().st_size if path.exists() else 0
    with path.open("ab") as log:
        command = [*launcher(), sys.executable, *arguments]
        child = await asyncio.create_subprocess_exec(
            *command, cwd=ROOT, env=environment, stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log
        )
    try:
        async with asyncio.timeout(STEP_SECONDS):
            status = await child.wait()
    except TimeoutError:
        raise StackError(f"{what} took more than {STEP_SECONDS} s: see {path}") from None
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
    if status != 0:
        words = path.read_bytes()[start:].decode("utf-8", "replace").strip().splitlines() or ["no message"]
        raise StackError(f"{what} failed: {words[-1]} (all of it in {path})")


async def _wait_for_services(settings: Settings, state: StateFolder, supervisor: Supervisor, screen: Screen) -> None:
    """Returns when every process runs and the API is ready; says once who is late, and goes on waiting."""
    clock = asyncio.get_running_loop().time
    late_at = clock() + SLOW_SECONDS
    async with httpx.AsyncClient(base_url=_api_url(settings), trust_env=False) as client:
        while True:
            late = [status.name for status in supervisor.statuses() if status.state != "running"]
            if not await _is_ready(client):
                late = late or ["api"]
            if not late:
                return
            if clock() > late_at:
                late_at = float("inf")
                screen.say(f"not ready after {SLOW_SECONDS} s: {', '.join(late)}; see {state.logs}")
            await asyncio.sleep(POLL_SECONDS)


async def _is_ready(client: httpx.AsyncClient) -> bool:
    try:
        return (await client.get("/health/ready")).status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


def _api_url(settings: Settings) -> str:
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(settings.api_host, settings.api_host)
    return f"http://{host}:{settings.api_port}"

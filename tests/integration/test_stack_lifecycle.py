"""`make run` from start to end: it heals, it stops cleanly, it dies cleanly, it continues."""

import signal
import stat
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from settings import Settings
from tests.stack_runner import COMMANDS, HANG_SECONDS, RunningStack, refused, stack_in, wait_until

# Three starts in one test; what hangs is found by the bound of each wait.
pytestmark = pytest.mark.timeout(4 * HANG_SECONDS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stack")


@pytest.fixture(scope="module")
def exchange(folder: Path) -> Iterator[RunningStack]:
    """One stack for all tests that leave it running."""
    with stack_in(folder / "state", folder / "output") as running:
        running.wait_until_ready()
        yield running


def test_ready_names_the_addresses(exchange: RunningStack) -> None:
    line = next(line for line in exchange.text.splitlines() if line.startswith("ready "))
    assert exchange.api_url in line
    assert f"{exchange.api_url}/docs" in line
    ui = line.split()[-1]
    assert httpx.get(ui, trust_env=False).status_code == httpx.codes.OK
    assert exchange.is_ready()


def test_secrets_are_for_their_owner_only(exchange: RunningStack, folder: Path) -> None:
    state = folder / "state"
    assert stat.S_IMODE(state.stat().st_mode) == 0o700
    for name in ("admin-password", "internal-token", "jwt-ed25519.pem", "environment"):
        assert stat.S_IMODE((state / name).stat().st_mode) == 0o600, name
    assert (state / "admin-password").read_text().strip() in exchange.text


@pytest.mark.parametrize("name", COMMANDS)
def test_a_killed_process_is_replaced_and_the_exchange_is_ready_again(exchange: RunningStack, name: str) -> None:
    old = exchange.process(name)
    old.kill()
    wait_until(lambda: exchange.pid(name) not in {None, old.pid}, HANG_SECONDS, f"{name} restarted")
    wait_until(exchange.is_ready, HANG_SECONDS, f"ready after {name} was killed")
    wait_until(lambda: f"{name:<9} running pid {exchange.pid(name)}" in exchange.text, HANG_SECONDS, "running")


def test_a_second_stack_on_the_same_state_is_refused(exchange: RunningStack, folder: Path) -> None:
    assert f"(pid {exchange.child.pid})" in refused(folder / "state")


def test_sigterm_leaves_nothing_and_the_next_start_continues(tmp_path: Path) -> None:
    state = tmp_path / "state"
    with stack_in(state, tmp_path / "first") as first:
        first.wait_until_ready()
        everything = first.descendants()
        assert first.send(signal.SIGTERM) == 0
    assert psutil.wait_procs(everything, timeout=HANG_SECONDS)[1] == []
    password = (state / "admin-password").read_text().strip()
    with stack_in(state, tmp_path / "second") as second:
        second.wait_until_ready()
        assert password not in second.text
        login = {"email": "admin@exchange.local", "password": password}
        assert httpx.post(f"{second.api_url}/api/auth/login", json=login, trust_env=False).is_success
        everything = second.descendants()
        assert second.send(signal.SIGKILL) == -signal.SIGKILL
    assert psutil.wait_procs(everything, timeout=HANG_SECONDS)[1] == []
    with stack_in(state, tmp_path / "third") as third:
        third.wait_until_ready()
        assert third.is_ready()
        everything = third.descendants()
        assert third.send(signal.SIGINT) == 0
    assert psutil.wait_procs(everything, timeout=HANG_SECONDS)[1] == []


def test_a_stop_during_the_start_leaves_nothing(tmp_path: Path) -> None:
    with stack_in(tmp_path / "state", tmp_path / "output") as running:
        wait_until(lambda: running.pid("postgres") is not None, HANG_SECONDS, "postgres started")
        everything = running.descendants()
        assert running.send(signal.SIGTERM) == 0
    assert psutil.wait_procs(everything, timeout=HANG_SECONDS)[1] == []


def test_external_servers_are_used_instead_of_embedded_ones(tmp_path: Path, settings: Settings) -> None:
    external = {
        "EXCHANGE_DATABASE_URL": settings.require_database_url(),
        "EXCHANGE_REDIS_URL": settings.require_redis_url(),
        "EXCHANGE_TEMPORAL_ADDRESS": settings.require_temporal_address(),
        "EXCHANGE_TEMPORAL_NAMESPACE": settings.temporal_namespace,
        "EXCHANGE_ADMIN_PASSWORD": "chosen by the operator",
    }
    with stack_in(tmp_path / "state", tmp_path / "output", **external) as running:
        running.wait_until_ready()
        assert [running.pid(name) for name in ("postgres", "valkey", "temporal")] == [None, None, None]
        login = {"email": "admin@exchange.local", "password": "chosen by the operator"}
        assert httpx.post(f"{running.api_url}/api/auth/login", json=login, trust_env=False).is_success
    assert not (tmp_path / "state" / "admin-password").exists()

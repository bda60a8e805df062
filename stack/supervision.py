"""Supervision by supervisord: it starts, restarts, logs and stops; we write its configuration and ask it questions."""

import asyncio
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from xmlrpc.client import Error as RpcError
from xmlrpc.client import ServerProxy

from supervisor.xmlrpc import SupervisorTransport  # type: ignore[import-untyped]  # ships no types

from stack.servers import Process, StackError, launcher, socket_folder
from stack.state import StateFolder

ROOT = Path(__file__).parent.parent
SOCKET = "supervisor.sock"
START_SECONDS = 15
STOP_SECONDS = 20
LOG_BYTES = 10_000_000
# supervisord gives up after so many failed starts in a row, each a second later than the one before: we never do.
RETRIES = 1_000_000
RPC_ERRORS = (OSError, HTTPException, RpcError)

_TEMPLATE = """\
[supervisord]
nodaemon = true
silent = true
logfile = {logs}/supervisord.log
logfile_maxbytes = {log_bytes}
logfile_backups = 1
pidfile = {folder}/supervisord.pid
childlogdir = {logs}
umask = 077
{user}
[unix_http_server]
file = {socket}
chmod = 0700
[rpcinterface:supervisor]
supervisor.rpcinterface_factory = supervisor.rpcinterface:make_main_rpcinterface
"""

_PROGRAM = """\
[program:{name}]
command = {command}
directory = {root}
environment = {environment}
priority = {priority}
autostart = false
autorestart = true
startsecs = 1
startretries = {retries}
stopsignal = {signal}
stopwaitsecs = {stop_seconds}
killasgroup = true
redirect_stderr = true
stdout_logfile = {logs}/{name}.log
stdout_logfile_maxbytes = {log_bytes}
stdout_logfile_backups = 1
"""


@dataclass(frozen=True)
class Status:
    """A process as supervisord sees it: `pid` is 0 while there is none, `since` is in seconds since the epoch."""

    name: str
    state: str
    pid: int
    since: int
    detail: str


class Supervisor:
    """A running supervisord. Its processes are stopped in the reverse order of `processes`."""

    def __init__(self, child: asyncio.subprocess.Process, socket: Path, names: Sequence[str]) -> None:
        self._child = child
        self._socket = socket
        self._names = names

    def is_alive(self) -> bool:
        """Whether supervisord itself still runs."""
        return self._child.returncode is None

    def start(self, name: str) -> None:
        """Starts a process and returns at once; from now on it is restarted whenever it ends."""
        with self._rpc() as rpc:
            rpc.supervisor.startProcess(name, False)  # noqa: FBT003 - the RPC has no names for its arguments

    def statuses(self) -> list[Status]:
        """All processes in start order. Raises one of RPC_ERRORS when supervisord is starting, ending or gone."""
        with self._rpc() as rpc:
            infos = rpc.supervisor.getAllProcessInfo()
        assert isinstance(infos, list), f"Expected a list of processes, was {infos!r}"
        return sorted(map(_status, infos), key=lambda status: self._names.index(status.name))

    def _rpc(self) -> ServerProxy:
        # The address only has to look like one: the transport speaks through the socket.
        return ServerProxy("http://127.0.0.1", transport=SupervisorTransport(None, None, f"unix://{self._socket}"))

    async def stop(self) -> None:
        """Stops everything, last started first, and returns when nothing is left."""
        if self.is_alive():
            self._child.terminate()
        await self._child.wait()


async def start_supervisor(
    state: StateFolder, processes: Sequence[Process], environment: Mapping[str, str]
) -> Supervisor:
    """supervisord with the processes known but not started. Raises StackError when it does not come up."""
    socket = socket_folder(state.path, f"{SOCKET}.1234567", os.geteuid()) / SOCKET
    config = state.path / "supervisord.conf"
    config.write_text(configuration(state, processes, socket), encoding="utf-8")
    output = state.logs / "supervisord.out"
    with output.open("wb") as log:
        child = await asyncio.create_subprocess_exec(
            *launcher(),
            *(sys.executable, "-m", "supervisor.supervisord", "-c", str(config)),
            cwd=ROOT,
            env=dict(environment),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            # It keeps the folder locked for as long as anything of ours may run.
            pass_fds=[state.lock],
            # Ctrl-C is for us: we stop it in order.
            start_new_session=True,
        )
    supervisor = Supervisor(child, socket, [process.name for process in processes])
    if not await _answers(supervisor):
        words = output.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no message"]
        await supervisor.stop()
        raise StackError(f"supervisord did not start: {words[-1]}")
    return supervisor


def configuration(state: StateFolder, processes: Sequence[Process], socket: Path) -> str:
    """The text of supervisord.conf."""
    folder, logs = _escape(str(state.path)), _escape(str(state.logs))
    head = _TEMPLATE.format(
        folder=folder,
        logs=logs,
        log_bytes=LOG_BYTES,
        socket=_escape(str(socket)),
        user="user = root" if os.geteuid() == 0 else "",
    )
    programs = (
        _PROGRAM.format(
            name=process.name,
            command=_escape(shlex.join(process.command)),
            root=_escape(str(ROOT)),
            environment=",".join(f'{name}="{_escape(value)}"' for name, value in process.environment.items()),
            priority=priority,
            retries=RETRIES,
            signal=process.stop_signal.name.removeprefix("SIG"),
            stop_seconds=STOP_SECONDS,
            logs=logs,
            log_bytes=LOG_BYTES,
        )
        for priority, process in enumerate(processes, start=1)
    )
    return head + "".join(programs)


def _escape(text: str) -> str:
    # A % begins a variable in supervisord's configuration, a ; after a blank a comment, which has no escape.
    if " ;" in text or "\n" in text:
        raise StackError(f"supervisord cannot take this path or command: {text!r}")
    return text.replace("%", "%%")


def _status(info: Mapping[str, object]) -> Status:
    return Status(
        name=str(info["name"]),
        state=str(info["statename"]).lower(),
        pid=int(str(info["pid"])),
        since=int(str(info["start"])),
        detail=str(info["spawnerr"] or info["description"]),
    )


async def _answers(supervisor: Supervisor) -> bool:
    with suppress(TimeoutError):
        async with asyncio.timeout(START_SECONDS):
            while supervisor.is_alive():
                try:
                    supervisor.statuses()
                    return True
                except RPC_ERRORS:
                    await asyncio.sleep(0.02)
    return False

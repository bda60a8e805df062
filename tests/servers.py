"""The servers of a test run: started once, on sockets and ports of their own, gone when the run ends."""

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from stack.servers import Server, wait_until_ready

ROOT = Path(__file__).parent.parent
READY_SECONDS = 60
STOP_SECONDS = 15


@asynccontextmanager
async def running(servers: Sequence[Server], logs: Path) -> AsyncIterator[None]:
    """The servers, ready; stopped in the end whatever happens, and by the kernel should this process be killed."""
    children: list[tuple[Server, subprocess.Popen[bytes]]] = []
    try:
        for server in servers:
            with (logs / f"{server.process.name}.log").open("wb") as log:
                children.append((server, _start(server.process.command, log.fileno())))
        await asyncio.gather(*(wait_until_ready(server.endpoint, READY_SECONDS) for server in servers))
        yield
    finally:
        for server, child in children:
            child.send_signal(server.process.stop_signal)
        for _, child in children:
            _reap(child)


def _start(command: Sequence[str], log: int) -> subprocess.Popen[bytes]:
    # A session of its own: Ctrl-C goes to pytest, which stops the servers after the tests' clean-up.
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)


def _reap(child: subprocess.Popen[bytes]) -> None:
    try:
        child.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def migrate(database_url: str) -> None:
    """Brings the database to the newest schema, the way the stack does it."""
    environment = os.environ | {"EXCHANGE_DATABASE_URL": database_url}
    command = [sys.executable, "-m", "alembic", "upgrade", "head"]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)

"""Servers of a benchmark's own, in a temporary folder, gone in the end."""

import asyncio
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.exchange import ROOT
from stack.servers import Server, postgres, valkey, wait_until_ready


@contextmanager
def own_postgres() -> Iterator[str]:
    """The URL of a new, migrated database with the stack's settings (commits reach the disk)."""
    with _folder() as folder, _running(postgres(folder), folder) as url:
        environment = os.environ | {"EXCHANGE_DATABASE_URL": url}
        command = [sys.executable, "-m", "alembic", "upgrade", "head"]
        subprocess.run(command, cwd=ROOT, env=environment, check=True, stderr=subprocess.DEVNULL)
        yield url


@contextmanager
def own_valkey() -> Iterator[str]:
    """The URL of a new, empty Valkey."""
    with _folder() as folder, _running(valkey(folder), folder) as url:
        yield url


@contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="exchange-bench-") as folder:
        os.chmod(folder, 0o711)
        yield Path(folder)


@contextmanager
def _running(server: Server, folder: Path) -> Iterator[str]:
    with Path(folder, "server.log").open("wb") as log:
        child = subprocess.Popen(server.process.command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    try:
        asyncio.run(wait_until_ready(server.endpoint, 60))
        yield server.endpoint.url
    finally:
        child.send_signal(server.process.stop_signal)
        child.wait(60)

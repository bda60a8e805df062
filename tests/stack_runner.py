"""Runs `python -m stack` the way an operator does, and looks at what it leaves."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from stack.ports import free_port
from tests.servers import ROOT

COMMANDS = {
    "postgres": "bin/postgres ",
    "valkey": "valkey-server ",
    "temporal": "temporal server ",
    "engine": "-m engine",
    "worker": "worker.py",
    "market": "-m market",
    "api": "-m api",
}
# What is waited for is an event, or the end of the process that would have to make it; how long it takes is the
# machine's business. Only what hangs is found by this time, far above what anything takes on a slow machine.
HANG_SECONDS = 300


@dataclass(frozen=True)
class RunningStack:
    """A stack in a process of its own."""

    child: subprocess.Popen[bytes]
    api_url: str
    output: Path

    @property
    def text(self) -> str:
        """What it has said so far."""
        return self.output.read_text(encoding="utf-8")

    def is_ready(self) -> bool:
        """What GET /health/ready says."""
        try:
            return httpx.get(f"{self.api_url}/health/ready", trust_env=False).status_code == httpx.codes.OK
        except httpx.TransportError:
            return False

    def descendants(self) -> list[psutil.Process]:
        """Every process it has started, directly or not."""
        return psutil.Process(self.child.pid).children(recursive=True)

    def process(self, name: str) -> psutil.Process:
        """The process supervised under this name. Raises StopIteration when it does not run."""
        supervisord = psutil.Process(self.child.pid).children()[0]
        commands = ((child, " ".join(child.cmdline())) for child in supervisord.children())
        return next(child for child, text in commands if COMMANDS[name] in text and "child.py" not in text)

    def pid(self, name: str) -> int | None:
        """Its pid, or None while it does not run."""
        try:
            return self.process(name).pid
        except (StopIteration, IndexError, psutil.NoSuchProcess):
            return None

    def wait_until_ready(self) -> None:
        """Returns when it has said `ready`."""
        wait_until(lambda: "\nready " in f"\n{self.text}" or self.child.poll() is not None, HANG_SECONDS, self.output)
        assert self.child.poll() is None, f"The stack ended: {self.text}"

    def send(self, number: signal.Signals) -> int:
        """Sends it a signal and waits for its end. Returns its exit status."""
        self.child.send_signal(number)
        return self.child.wait(HANG_SECONDS)


@contextmanager
def stack_in(state: Path, output: Path, **settings: str) -> Iterator[RunningStack]:
    """A stack on state folder `state`, just started; ended in the end."""
    port = free_port()
    environment = stack_environment(state, port) | settings
    with output.open("wb") as file:
        child = subprocess.Popen(
            [sys.executable, "-m", "stack"], cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True
        )
    running = RunningStack(child, f"http://127.0.0.1:{port}", output)
    try:
        yield running
    finally:
        if child.poll() is None:
            running.send(signal.SIGTERM)


def refused(state: Path, **settings: str) -> str:
    """What a stack says that cannot start: one line on stderr and exit status 1."""
    environment = stack_environment(state, free_port()) | settings
    command = [sys.executable, "-m", "stack"]
    outcome = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=HANG_SECONDS
    )
    lines = outcome.stderr.splitlines()
    assert outcome.returncode == 1, f"Expected 1, was {outcome.returncode}: {outcome.stderr}"
    assert len(lines) == 1, f"Expected one line, was {lines}"
    return lines[0]


def stack_environment(state: Path, port: int) -> dict[str, str]:
    """Our environment without settings of the exchange but these two."""
    return client_environment(state) | {"EXCHANGE_API_PORT": str(port)}


def client_environment(state: Path) -> dict[str, str]:
    """The same for those who use an exchange, and are told its address."""
    others = {name: value for name, value in os.environ.items() if not name.startswith("EXCHANGE_")}
    return others | {"EXCHANGE_STATE_DIR": str(state)}


def wait_until(condition: Callable[[], bool], seconds: float, what: object) -> None:
    """Returns when the condition holds. Fails after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"Still not so after {seconds} s: {what}"
        time.sleep(0.05)

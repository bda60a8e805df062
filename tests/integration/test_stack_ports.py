"""Exchanges that start at the same time on one machine do not choose the same ports."""

import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from stack.ports import claim, free_port
from tests.servers import ROOT
from tests.stack_runner import refused, stack_environment

CLAIMED = """
import sys
from stack.ports import claim
claim("127.0.0.1", *map(int, sys.argv[1:]))
print(flush=True)
input()
"""
# A stack that has made its plan and started nothing yet: it shows the ports it chose, and waits to be told to end.
PLANNED = """
from pathlib import Path
from settings import Settings
from stack.processes import make_plan
from stack.state import open_state_folder
settings = Settings()
plan = make_plan(settings, open_state_folder(settings.state_dir))
figures = [port for service in plan.services for port in service.environment.values()]
print(plan.temporal.url.rpartition(":")[2], plan.temporal_ui_url.rpartition(":")[2], *figures, flush=True)
input()
"""


@contextmanager
def said_by(program: str, state: Path, *arguments: str) -> Iterator[str]:
    """The line that a program says, which then waits for the end of the block."""
    with subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        cwd=ROOT,
        env=stack_environment(state, free_port()),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdout is not None
        assert child.stdin is not None
        yield child.stdout.readline()
        child.stdin.write("\n")


def test_exchanges_that_start_together_have_ports_of_their_own(tmp_path: Path) -> None:
    with ExitStack() as running:
        lines = [running.enter_context(said_by(PLANNED, tmp_path / str(number))) for number in range(3)]
    plans = [set(line.split()) for line in lines]
    assert [len(ports) for ports in plans] == [7, 7, 7]
    assert len(set.union(*plans)) == 21


def test_a_claim_is_for_one_process_and_ends_with_it(tmp_path: Path) -> None:
    port = free_port()
    with said_by(CLAIMED, tmp_path, str(port)) as line:
        assert line == "\n"
        with pytest.raises(OSError, match="in use"):
            claim("127.0.0.1", port)
        # Nobody listens there yet: it is the claim that kept us out.
        socket.create_server(("127.0.0.1", port)).close()
    claim("127.0.0.1", port)


def test_an_exchange_is_refused_the_port_of_one_that_is_about_to_listen(tmp_path: Path) -> None:
    port = free_port()
    with said_by(CLAIMED, tmp_path, str(port)):
        line = refused(tmp_path / "state", EXCHANGE_API_PORT=str(port))
    assert f"127.0.0.1:{port}: Address already in use" in line


def test_of_two_ports_both_are_claimed_or_none() -> None:
    free = free_port()
    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(OSError, match="in use"):
        claim("127.0.0.1", free, other.getsockname()[1])
    claim("127.0.0.1", free)

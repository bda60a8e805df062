"""Exchanges that start at the same time on one machine do not choose the same ports."""

import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from stack.ports import claim, free_port, why_not_listen
from tests.servers import ROOT
from tests.stack_runner import stack_environment

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
def planned(state: Path) -> Iterator[set[int]]:
    """The ports of a stack that is about to start."""
    with subprocess.Popen(
        [sys.executable, "-c", PLANNED],
        cwd=ROOT,
        env=stack_environment(state, free_port()),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdout is not None
        assert child.stdin is not None
        yield set(map(int, child.stdout.readline().split()))
        child.stdin.write("\n")


def test_exchanges_that_start_together_have_ports_of_their_own(tmp_path: Path) -> None:
    with ExitStack() as running:
        plans = [running.enter_context(planned(tmp_path / str(number))) for number in range(3)]
    assert [len(ports) for ports in plans] == [7, 7, 7]
    assert len(set.union(*plans)) == 21


def test_a_claim_is_for_one_process_and_ends_with_it(tmp_path: Path) -> None:
    with planned(tmp_path) as ports:
        assert not any(claim("127.0.0.1", port) for port in ports)
        # Nobody listens there yet: it is the claim that keeps us out.
        assert {why_not_listen("127.0.0.1", port) for port in ports} == {None}
    assert claim("127.0.0.1", *ports)


def test_of_two_ports_both_are_claimed_or_none() -> None:
    free = free_port()
    with socket.create_server(("127.0.0.1", 0)) as other:
        assert not claim("127.0.0.1", free, other.getsockname()[1])
    assert claim("127.0.0.1", free)

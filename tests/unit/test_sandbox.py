"""Workflows are loaded into the sandbox also while what is collected imports; every sandboxed worker of tests can."""

import ast
import asyncio
import gc
import importlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from temporalio.workflow import _Definition

from tests.replay import every_workflow
from tests.sandbox import CalmSandbox, nothing_collected

TESTS = Path(__file__).parents[1]
DEFINITIONS = [_Definition.must_from_class(found) for found in every_workflow()]


class Importing:
    """Garbage that imports a module never loaded before when it is collected, and leaves more of its kind.

    Not while it does so already: importing in the midst of its own import, it would wait for itself for ever.
    """

    is_left = True
    names = count()
    thread = threading.local()

    def __init__(self) -> None:
        self.myself = self

    def __del__(self) -> None:
        if self.is_left:
            Importing()
        if not getattr(self.thread, "is_importing", False):
            self.thread.is_importing = True
            with suppress(ModuleNotFoundError):
                importlib.import_module(f"gc.nothing{next(self.names)}")
            self.thread.is_importing = False


@contextmanager
def littered() -> Iterator[None]:
    """A process in which garbage that imports is collected all the time; not while pytest tells what failed."""
    before = gc.get_threshold()
    Importing.is_left = True
    gc.set_threshold(1, 1, 1)
    Importing()
    try:
        yield
    finally:
        Importing.is_left = False
        gc.set_threshold(*before)
        gc.collect()


def test_garbage_that_imports_does_not_disturb_the_sandbox() -> None:
    async def validate(definition: _Definition) -> None:
        CalmSandbox().prepare_workflow(definition)

    with littered(), ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda definition: asyncio.run(validate(definition)), DEFINITIONS))


def test_the_collector_is_on_again_when_the_last_thread_has_left() -> None:
    entered, leave = threading.Event(), threading.Event()

    def stay() -> None:
        with nothing_collected():
            entered.set()
            leave.wait()

    other = threading.Thread(target=stay)
    other.start()
    entered.wait()
    with nothing_collected():
        assert not gc.isenabled()
    assert not gc.isenabled()
    leave.set()
    other.join()
    assert gc.isenabled()


def test_every_worker_of_a_test_says_how_it_runs_workflows() -> None:
    """A worker without a runner has temporalio's own sandbox, which garbage disturbs."""
    bare = [
        f"{path.relative_to(TESTS)}:{call.lineno}"
        for path in sorted(TESTS.rglob("*.py"))
        if "from temporalio.worker import" in (source := path.read_text(encoding="utf-8"))
        for call in ast.walk(ast.parse(source))
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Name)
        and call.func.id in ("Worker", "Replayer")
        and "workflow_runner" not in {keyword.arg for keyword in call.keywords}
    ]
    assert bare == []

"""The sandbox in which tests run workflows, made safe beside other work of the process.

Before Python 3.12 a module's import lock is not re-entrant (CPython issue 91351): it is entered under the number of the
thread, and left by `del`. temporalio's sandbox loads modules anew for every workflow. If the garbage collector runs in
the middle of that and finalizes something that imports (a warning of a coroutine never awaited, a connection never
closed: what tests with many tasks and threads leave), the inner import takes the entry away, and the outer one fails of
a `KeyError` of the thread's number: `Failed validating workflow …`. So nothing is collected in the meantime.
"""

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from temporalio.worker import WorkflowInstance, WorkflowInstanceDetails
from temporalio.worker.workflow_sandbox import SandboxedWorkflowRunner

_lock = threading.Lock()
_inside = 0


@contextmanager
def nothing_collected() -> Iterator[None]:
    """The garbage collector is off, in all threads, until the last that is in here leaves."""
    global _inside  # noqa: PLW0603 - the collector is the process's
    with _lock:
        _inside += 1
        gc.disable()
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                gc.enable()


class CalmSandbox(SandboxedWorkflowRunner):
    """temporalio's sandbox, in which no finalizer imports while it does. Every sandboxed worker of a test has it."""

    def create_instance(self, det: WorkflowInstanceDetails) -> WorkflowInstance:
        """A workflow in a sandbox; validation makes one too."""
        with nothing_collected():
            return _CalmInstance(super().create_instance(det))


class _CalmInstance(WorkflowInstance):
    """A workflow whose code imports in peace, also what it imports late."""

    def __init__(self, real: WorkflowInstance) -> None:
        self._real = real

    def activate(self, act: Any) -> Any:
        with nothing_collected():
            return self._real.activate(act)

    def get_serialization_context(self, command_info: Any) -> Any:
        with nothing_collected():
            return self._real.get_serialization_context(command_info)

    def get_external_store_context(self, command_info: Any) -> Any:
        with nothing_collected():
            return self._real.get_external_store_context(command_info)

    def get_info(self) -> Any:
        return self._real.get_info()

    def get_thread_id(self) -> int | None:
        return self._real.get_thread_id()

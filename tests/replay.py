"""Saved histories of real workflow runs: today's workflow code must be able to continue each of them.

`EXCHANGE_SAVE_HISTORIES=1 pytest …` writes them anew while the tests that make them run.
"""

import importlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from temporalio.client import WorkflowHandle, WorkflowHistory
from temporalio.worker import Interceptor, Replayer, UnsandboxedWorkflowRunner

import workflows as package

HISTORIES = Path(__file__).parent / "histories"
# Where a history was made is of no use to a replay.
_PRIVATE = ("identity", "stackTrace")
_PROCESS = re.compile(r"\d+@[\w.-]+")


async def save_history(handle: WorkflowHandle[Any, Any], name: str) -> None:
    """Keep the history of this run as `name`, when the tests are told to refresh them."""
    if not os.environ.get("EXCHANGE_SAVE_HISTORIES"):
        return
    save_as(await handle.fetch_history(), HISTORIES / f"{name}.json")


def save_as(history: WorkflowHistory, path: Path) -> None:
    """Write a history without what tells where it was made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_scrubbed(json.loads(history.to_json())), indent=1) + "\n")


def every_workflow() -> list[type]:
    """The workflow classes of today's code."""
    modules = [importlib.import_module(f"workflows.{p.stem}") for p in sorted(Path(package.__path__[0]).glob("*.py"))]
    values = [(module, value) for module in modules for value in vars(module).values()]
    return [
        value
        for module, value in values
        if hasattr(value, "__temporal_workflow_definition") and value.__module__ == module.__name__
    ]


async def replay(name: str, workflows: Sequence[type], *interceptors: Interceptor) -> None:
    """Run the saved history through the workflow code, as production does. Raises temporalio's NondeterminismError."""
    history = WorkflowHistory.from_json(name, (HISTORIES / f"{name}.json").read_text())
    replayer = Replayer(workflows=workflows, workflow_runner=UnsandboxedWorkflowRunner(), interceptors=interceptors)
    await replayer.replay_workflow(history)


def _scrubbed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _scrubbed(member) for key, member in value.items() if key not in _PRIVATE}
    if isinstance(value, str):
        return _PROCESS.sub("worker", value)
    return [_scrubbed(member) for member in value] if isinstance(value, list) else value

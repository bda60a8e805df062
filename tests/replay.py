"""Saved histories of real workflow runs: today's workflow code must be able to continue each of them.

`EXCHANGE_SAVE_HISTORIES=1 pytest …` writes them anew while the tests that make them run.
"""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from temporalio.client import WorkflowHandle, WorkflowHistory
from temporalio.worker import Replayer

HISTORIES = Path(__file__).parent / "histories"
# Where a history was made is of no use to a replay.
_PRIVATE = ("identity", "stackTrace")
_PROCESS = re.compile(r"\d+@[\w.-]+")


async def save_history(handle: WorkflowHandle[Any, Any], name: str) -> None:
    """Keep the history of this run as `name`, when the tests are told to refresh them."""
    if not os.environ.get("EXCHANGE_SAVE_HISTORIES"):
        return
    history = json.loads((await handle.fetch_history()).to_json())
    (HISTORIES / f"{name}.json").write_text(json.dumps(_scrubbed(history), indent=1) + "\n")


async def replay(name: str, workflows: Sequence[type]) -> None:
    """Run the saved history through the workflow code. Raises temporalio's NondeterminismError."""
    history = WorkflowHistory.from_json(name, (HISTORIES / f"{name}.json").read_text())
    await Replayer(workflows=workflows).replay_workflow(history)


def _scrubbed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _scrubbed(member) for key, member in value.items() if key not in _PRIVATE}
    if isinstance(value, str):
        return _PROCESS.sub("worker", value)
    return [_scrubbed(member) for member in value] if isinstance(value, list) else value

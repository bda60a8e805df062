"""`python deploy/replay.py`: can today's workflow code continue what runs on the exchange now?

Fetches the histories of all open workflows and of the newest closed ones of each type from the Temporal of the
environment (`set -a; . .exchange/environment` with `make run`), and replays them. `--save` keeps one of each type and
outcome as files for tests/histories. Run it with the new version before an upgrade. Ends with 1 when a history does not
replay.
"""

import argparse
import asyncio
import sys
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from temporalio.client import Client, WorkflowExecution  # noqa: E402 - found by the line above
from temporalio.worker import Replayer  # noqa: E402

from clients import connect_temporal  # noqa: E402
from settings import get_settings  # noqa: E402
from tests.replay import every_workflow, save_as  # noqa: E402


async def executions(client: Client, newest: int) -> AsyncIterator[WorkflowExecution]:
    """All that are open, and the `newest` closed ones of each type."""
    async for execution in client.list_workflows('ExecutionStatus = "Running"'):
        yield execution
    for found in every_workflow():
        name = getattr(found, "__temporal_workflow_definition").name
        async for execution in client.list_workflows(
            f'WorkflowType = "{name}" AND ExecutionStatus != "Running"', limit=newest
        ):
            yield execution


async def check(newest: int, save: Path | None) -> int:
    """Replay; how many histories did not."""
    client = await connect_temporal(get_settings())
    replayer = Replayer(workflows=every_workflow())
    good: Counter[str] = Counter()
    failed = 0
    async for execution in executions(client, newest):
        history = await client.get_workflow_handle(execution.id, run_id=execution.run_id).fetch_history()
        result = await replayer.replay_workflow(history, raise_on_replay_failure=False)
        if result.replay_failure is not None:
            failed += 1
            print(f"{execution.workflow_type} {execution.id}: {result.replay_failure}")
            continue
        good[execution.workflow_type] += 1
        if save is not None:
            outcome = execution.status.name.lower() if execution.status else "unknown"
            save_as(history, save / f"{execution.workflow_type}_{outcome}.json")
    print(f"Replayed: {dict(sorted(good.items()))}; failed: {failed}")
    return failed


def main() -> int:
    """0 when everything replays."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--newest", type=int, default=20, help="closed workflows of each type (%(default)s)")
    parser.add_argument("--save", type=Path, help="a folder for one history of each type and outcome")
    options = parser.parse_args()
    return 1 if asyncio.run(check(options.newest, options.save)) else 0


if __name__ == "__main__":
    sys.exit(main())

"""What Temporal gives without us: one workflow per order, each with one no-op local activity."""

import asyncio
import time
import uuid
from datetime import timedelta

from temporalio import activity, workflow
from temporalio.client import Client
from temporalio.worker import UnsandboxedWorkflowRunner, Worker

IN_FLIGHT = 50


@activity.defn(name="bench.nothing")
async def nothing() -> None:
    """The step of a saga that does nothing."""


@workflow.defn(name="BenchBareOrder")
class BareOrder:
    """The least that one durable workflow per order can be."""

    @workflow.run
    async def run(self) -> None:
        """One step."""
        await workflow.execute_local_activity(nothing, start_to_close_timeout=timedelta(seconds=5))


async def bare_rate(address: str, seconds: float) -> float:
    """Workflows per second, started eagerly in the worker's own process and awaited, IN_FLIGHT at a time."""
    client = await Client.connect(address)
    queue = f"bench-bare-{uuid.uuid4().hex}"
    done = 0
    async with Worker(
        client,
        task_queue=queue,
        workflows=[BareOrder],
        activities=[nothing],
        workflow_runner=UnsandboxedWorkflowRunner(),
    ):
        started = time.perf_counter()
        deadline = started + seconds

        async def place_orders() -> None:
            nonlocal done
            while time.perf_counter() < deadline:
                name = f"{queue}-{uuid.uuid4().hex}"
                await client.execute_workflow(BareOrder.run, id=name, task_queue=queue, request_eager_start=True)
                done += 1

        await asyncio.gather(*(place_orders() for _ in range(IN_FLIGHT)))
        return done / (time.perf_counter() - started)

"""The worker process: Temporal workers of all task queues, the schedules, and the monitors."""

import asyncio
import logging
import signal
from collections.abc import Awaitable, Callable
from datetime import timedelta

import uvloop
from redis.asyncio import Redis
from temporalio.client import Client
from temporalio.worker import UnsandboxedWorkflowRunner, Worker

from activities.matching.instruments import read_instruments
from activities.registry import (
    liquidation_activities,
    operations_activities,
    order_activities,
    register_schedules,
    schedules,
    settlement_activities,
)
from clients import (
    LIQUIDATION_QUEUE,
    OPERATIONS_QUEUE,
    ORDERS_QUEUE,
    SETTLEMENT_QUEUE,
    connect_temporal,
    open_redis,
    server_checks,
)
from logs import set_up_logging
from monitors.countdowns import run_countdowns
from monitors.liquidations import run_liquidations
from monitors.observer import run_observer
from monitors.pruner import run_pruner
from monitors.relay import run_relay
from monitors.sweeper import run_sweeper
from reporting.consumer import run_reporting
from settings import Settings, get_settings
from storage.db import Pool, open_pool
from storage.waiting import wait_for_event
from telemetry.alerts import MONITOR_FAILED, alert
from telemetry.endpoint import endpoint
from telemetry.tracing import start_tracing, stop_tracing
from workflows.audit import LedgerAuditWorkflow
from workflows.funding import FundingSettlementWorkflow
from workflows.liquidation import LiquidationWorkflow
from workflows.margin import MarginChangeWorkflow
from workflows.orders import OrderCancellationWorkflow, OrderPlacementWorkflow
from workflows.registration import RegistrationResumerWorkflow, UserRegistrationWorkflow
from workflows.settlement import SettlementWorkflow

log = logging.getLogger("worker")

Monitor = Callable[[], Awaitable[None]]
MONITOR_PAUSE_SECONDS = 5.0


def build_workers(client: Client, pool: Pool, redis: Redis) -> list[Worker]:
    """One worker per task queue. Unsandboxed: the sandbox costs 20 ms of CPU per workflow, and tests run in it."""
    runner = UnsandboxedWorkflowRunner()
    return [
        Worker(
            client,
            task_queue=ORDERS_QUEUE,
            workflows=[OrderPlacementWorkflow, OrderCancellationWorkflow],
            activities=order_activities(pool, redis),
            workflow_runner=runner,
        ),
        Worker(
            client,
            task_queue=SETTLEMENT_QUEUE,
            workflows=[SettlementWorkflow, FundingSettlementWorkflow],
            activities=settlement_activities(pool, redis),
            workflow_runner=runner,
        ),
        Worker(
            client,
            task_queue=LIQUIDATION_QUEUE,
            workflows=[LiquidationWorkflow],
            activities=liquidation_activities(pool, redis),
            workflow_runner=runner,
        ),
        Worker(
            client,
            task_queue=OPERATIONS_QUEUE,
            workflows=[
                UserRegistrationWorkflow,
                RegistrationResumerWorkflow,
                LedgerAuditWorkflow,
                MarginChangeWorkflow,
            ],
            activities=operations_activities(pool, redis),
            workflow_runner=runner,
        ),
    ]


async def run(settings: Settings, stop: asyncio.Event) -> None:
    """Work until `stop` is set; an error of Temporal's workers that cannot be waited out ends the process, and its
    supervisor restarts it. An error of a monitor does not: settlement must not stop for it."""
    async with (
        await open_pool(settings.require_database_url(), size_max=20, name="worker") as pool,
        open_redis(settings) as redis,
    ):
        client = await connect_temporal(settings)
        funding_interval = timedelta(seconds=settings.funding_interval_seconds)
        await register_schedules(client, schedules(await read_instruments(pool), funding_interval))
        checks = server_checks(pool, redis, client)
        async with endpoint(settings.metrics_host, settings.metrics_port, checks), asyncio.TaskGroup() as tasks:
            for worker in build_workers(client, pool, redis):
                tasks.create_task(_run_worker(worker, stop))
            for name, monitor in _monitors(settings, pool, redis, client, stop).items():
                tasks.create_task(keep_running(name, monitor, stop))


def _monitors(settings: Settings, pool: Pool, redis: Redis, client: Client, stop: asyncio.Event) -> dict[str, Monitor]:
    audits_kept = timedelta(days=settings.login_audit_retention_days)
    return {
        "relay": lambda: run_relay(pool, redis, stop),
        "observer": lambda: run_observer(pool, redis, stop),
        "sweeper": lambda: run_sweeper(pool, client, stop),
        "pruner": lambda: run_pruner(pool, audits_kept, stop),
        "reporting": lambda: run_reporting(pool, redis, stop),
        "countdowns": lambda: run_countdowns(pool, client, stop),
        "liquidations": lambda: run_liquidations(pool, redis, client, settings.mark_price_interval_seconds, stop),
    }


async def keep_running(name: str, monitor: Monitor, stop: asyncio.Event) -> None:
    """Run a monitor until `stop`. It waits outages out by itself; what it raises is a defect: told, and tried again."""
    while not stop.is_set():
        try:
            await monitor()
        except Exception as error:
            log.exception("The monitor %s failed", name)
            alert(MONITOR_FAILED, "the monitor %s failed, and is tried again: %s", name, error)
            await wait_for_event(stop, MONITOR_PAUSE_SECONDS)


async def _run_worker(worker: Worker, stop: asyncio.Event) -> None:
    async with worker:
        await stop.wait()


async def main() -> None:
    """Entry: run until SIGTERM or SIGINT."""
    settings = get_settings()
    set_up_logging(settings)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    start_tracing("worker", settings.otlp_endpoint)
    try:
        await run(settings, stop)
    finally:
        stop_tracing()


if __name__ == "__main__":
    uvloop.run(main())

"""The worker process: Temporal workers of all task queues, the schedules, and the monitors."""

import asyncio
import logging
import signal
from datetime import timedelta

import uvloop
from temporalio.client import Client
from temporalio.worker import UnsandboxedWorkflowRunner, Worker

from activities.instruments import read_instruments
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
from telemetry.endpoint import endpoint
from telemetry.health import CHECK_SECONDS_MAX, Checks
from telemetry.tracing import start_tracing, stop_tracing
from workflows.audit import LedgerAuditWorkflow
from workflows.funding import FundingSettlementWorkflow
from workflows.liquidation import LiquidationWorkflow
from workflows.margin import MarginChangeWorkflow
from workflows.orders import OrderCancellationWorkflow, OrderPlacementWorkflow
from workflows.registration import RegistrationResumerWorkflow, UserRegistrationWorkflow
from workflows.settlement import SettlementWorkflow

log = logging.getLogger("worker")


def build_workers(client: Client, pool: Pool, settings: Settings) -> list[Worker]:
    """One worker per task queue. Unsandboxed: the sandbox costs 20 ms of CPU per workflow, and tests run in it."""
    redis = open_redis(settings)
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
    """Work until `stop` is set; an error that cannot be waited out ends the process, and its supervisor restarts it."""
    pool = await open_pool(settings.require_database_url(), size_max=20, name="worker")
    client = await connect_temporal(settings)
    funding_interval = timedelta(seconds=settings.funding_interval_seconds)
    await register_schedules(client, schedules(await read_instruments(pool), funding_interval))
    redis = open_redis(settings)
    checks: Checks = {
        "postgres": lambda: pool.fetchval("SELECT 1"),
        "redis": redis.ping,
        "temporal": lambda: client.service_client.check_health(timeout=timedelta(seconds=CHECK_SECONDS_MAX)),
    }
    async with endpoint(settings.metrics_host, settings.metrics_port, checks), asyncio.TaskGroup() as tasks:
        for worker in build_workers(client, pool, settings):
            tasks.create_task(_run_worker(worker, stop))
        tasks.create_task(run_relay(pool, open_redis(settings), stop))
        tasks.create_task(run_observer(pool, redis, stop))
        tasks.create_task(run_sweeper(pool, client, stop))
        tasks.create_task(run_pruner(pool, timedelta(days=settings.login_audit_retention_days), stop))
        tasks.create_task(run_reporting(pool, open_redis(settings), stop))
        tasks.create_task(run_countdowns(pool, client, stop))
        tasks.create_task(
            run_liquidations(pool, open_redis(settings), client, settings.mark_price_interval_seconds, stop)
        )
    await pool.close()


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
    await run(settings, stop)
    stop_tracing()


if __name__ == "__main__":
    uvloop.run(main())

"""Which activities and workflows a worker of each task queue runs."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

from redis.asyncio import Redis
from temporalio.client import (
    Client,
    Schedule,
    ScheduleActionStartWorkflow,
    ScheduleAlreadyRunningError,
    ScheduleIntervalSpec,
    ScheduleOverlapPolicy,
    SchedulePolicy,
    ScheduleSpec,
    ScheduleUpdate,
    ScheduleUpdateInput,
)

from activities.audit import AuditActivities
from activities.auth import AuthActivities
from activities.engine_log import EngineLog
from activities.insurance import InsuranceActivities
from activities.ledger import LedgerActivities
from activities.liquidation import LiquidationActivities
from activities.matching import MatchingActivities
from activities.orders import OrderActivities
from activities.positions import PositionActivities
from activities.risk import RiskActivities
from activities.users import RESUMER_SCHEDULE, RESUMER_SCHEDULE_ID, UserActivities
from clients import OPERATIONS_QUEUE
from domain.sagas import LEDGER_AUDIT
from storage.db import Pool

Activities = list[Callable[..., Any]]
AUDIT_SCHEDULE_ID = "ledger-audit"
AUDIT_INTERVAL = timedelta(minutes=5)


def order_activities(pool: Pool, redis: Redis) -> Activities:
    """Steps of placement and cancellation."""
    risk, ledger = RiskActivities(pool, EngineLog()), LedgerActivities(pool)
    orders = OrderActivities(pool, redis, EngineLog())
    return [
        risk.check_orders,
        risk.release_orders,
        ledger.freeze_funds,
        ledger.unfreeze_funds,
        orders.accept,
        orders.request_cancels,
    ]


def settlement_activities(pool: Pool, redis: Redis) -> Activities:
    """Steps of settlement; they share one reader of the engine's log."""
    log = EngineLog()
    positions, risk, ledger = PositionActivities(pool, redis, log), RiskActivities(pool, log), LedgerActivities(pool)
    orders, matching = OrderActivities(pool, redis, log), MatchingActivities(pool)
    return [
        positions.apply_trades,
        risk.apply_events,
        ledger.settle,
        positions.confirm,
        orders.apply_events,
        orders.cancel_uncovered,
        matching.acknowledge,
    ]


def liquidation_activities(pool: Pool, redis: Redis) -> Activities:
    """Steps of liquidation."""
    liquidation, insurance = LiquidationActivities(pool, redis), InsuranceActivities(pool)
    return [
        liquidation.begin,
        OrderActivities(pool, redis, EngineLog()).cancel_for_liquidation,
        liquidation.plan,
        insurance.claim,
        liquidation.submit,
        liquidation.deleverage,
        liquidation.stop,
        insurance.release,
        liquidation.finish,
    ]


def operations_activities(pool: Pool, redis: Redis) -> Activities:
    """Steps of registration, margin changes, sweeps and audits."""
    users, auth, audit = UserActivities(pool), AuthActivities(pool), AuditActivities(pool)
    return [
        RiskActivities(pool, EngineLog()).plan_margin_change,
        LedgerActivities(pool).move_margin,
        PositionActivities(pool, redis, EngineLog()).adopt_margin,
        OrderActivities(pool, redis, EngineLog()).cancel_uncovered,
        users.complete_registration,
        users.fail_registration,
        users.stalled_registrations,
        auth.create_credentials,
        audit.audit,
    ]


def schedules() -> dict[str, Schedule]:
    """Everything that Temporal starts by the clock, by schedule id."""
    audit = Schedule(
        action=ScheduleActionStartWorkflow(
            LEDGER_AUDIT,
            id=AUDIT_SCHEDULE_ID,
            task_queue=OPERATIONS_QUEUE,
            static_summary="Checks the ledger's invariants",
        ),
        spec=ScheduleSpec(intervals=[ScheduleIntervalSpec(every=AUDIT_INTERVAL)]),
        policy=SchedulePolicy(overlap=ScheduleOverlapPolicy.SKIP, catchup_window=timedelta(minutes=1)),
    )
    return {RESUMER_SCHEDULE_ID: RESUMER_SCHEDULE, AUDIT_SCHEDULE_ID: audit}


async def register_schedules(client: Client) -> None:
    """Create the schedules, or bring existing ones up to this version; their paused state is kept."""
    for schedule_id, schedule in schedules().items():
        try:
            await client.create_schedule(schedule_id, schedule)
        except ScheduleAlreadyRunningError:
            await client.get_schedule_handle(schedule_id).update(_updater(schedule))


def _updater(schedule: Schedule) -> Callable[[ScheduleUpdateInput], ScheduleUpdate]:
    def update(current: ScheduleUpdateInput) -> ScheduleUpdate:
        kept = current.description.schedule
        kept.action, kept.spec, kept.policy = schedule.action, schedule.spec, schedule.policy
        return ScheduleUpdate(kept)

    return update

"""Which activities and workflows a worker of each task queue runs."""

from collections.abc import Callable, Iterable, Mapping
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
from temporalio.common import SearchAttributePair, TypedSearchAttributes

from activities.identity.auth import AuthActivities
from activities.identity.users import RESUMER_SCHEDULE, RESUMER_SCHEDULE_ID, UserActivities
from activities.ledger.audit import AuditActivities
from activities.ledger.steps import InsuranceActivities, LedgerActivities
from activities.liquidation.steps import LiquidationActivities
from activities.matching.engine_log import EngineLog
from activities.matching.steps import MatchingActivities
from activities.orders.sagas import INSTRUMENT_ID
from activities.orders.steps import OrderActivities
from activities.positions.steps import PositionActivities
from activities.risk.steps import RiskActivities
from clients import OPERATIONS_QUEUE, SETTLEMENT_QUEUE
from domain.funding import FUNDING_SETTLEMENT, FundingInput
from domain.sagas import LEDGER_AUDIT
from storage.db import Pool

Activities = list[Callable[..., Any]]
AUDIT_SCHEDULE_ID = "ledger-audit"
AUDIT_INTERVAL = timedelta(minutes=5)
# How far back a funding time is made up for that passed while Temporal was away.
FUNDING_CATCH_UP = timedelta(days=365)


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
    """Steps of settlement and funding; they share one reader of the engine's log."""
    log = EngineLog()
    positions, risk, ledger = PositionActivities(pool, log), RiskActivities(pool, log), LedgerActivities(pool)
    orders, matching = OrderActivities(pool, redis, log), MatchingActivities(pool)
    return [
        ledger.open_funding,
        matching.last_command,
        matching.events_of,
        positions.fix_funding_positions,
        ledger.settle_funding,
        positions.confirm_funding,
        ledger.funding_uncovered,
        ledger.close_funding,
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
        PositionActivities(pool, EngineLog()).adopt_margin,
        OrderActivities(pool, redis, EngineLog()).cancel_uncovered,
        users.complete_registration,
        users.fail_registration,
        users.stalled_registrations,
        auth.create_credentials,
        audit.audit,
    ]


def schedules(instrument_ids: Iterable[str], funding_interval: timedelta) -> dict[str, Schedule]:
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
    funding = {
        funding_schedule_id(instrument_id): funding_schedule(instrument_id, funding_interval)
        for instrument_id in instrument_ids
    }
    return {RESUMER_SCHEDULE_ID: RESUMER_SCHEDULE, AUDIT_SCHEDULE_ID: audit, **funding}


def funding_schedule_id(instrument_id: str) -> str:
    """Also begins the ids of its workflows: Temporal adds the funding time."""
    return f"funding-{instrument_id}"


def funding_schedule(instrument_id: str, interval: timedelta) -> Schedule:
    """Starts a funding settlement at every multiple of `interval` since the epoch, one after the other."""
    return Schedule(
        action=ScheduleActionStartWorkflow(
            FUNDING_SETTLEMENT,
            FundingInput(instrument_id),
            id=funding_schedule_id(instrument_id),
            task_queue=SETTLEMENT_QUEUE,
            typed_search_attributes=TypedSearchAttributes([SearchAttributePair(INSTRUMENT_ID, instrument_id)]),
            static_summary=f"Settles the funding of {instrument_id}",
        ),
        spec=ScheduleSpec(intervals=[ScheduleIntervalSpec(every=interval)]),
        policy=SchedulePolicy(overlap=ScheduleOverlapPolicy.BUFFER_ALL, catchup_window=FUNDING_CATCH_UP),
    )


async def register_schedules(client: Client, wanted: Mapping[str, Schedule]) -> None:
    """Create the schedules, or bring existing ones up to this version; their paused state is kept."""
    for schedule_id, schedule in wanted.items():
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

"""The order and settlement sagas on real servers, in the workflow sandbox: orders in, workers that can be made to
fail, and an engine that matches when told.
"""

import asyncio
import functools
import inspect
import re
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

from redis.asyncio import Redis
from temporalio import activity
from temporalio.api.sdk.v1 import WorkflowMetadata
from temporalio.client import Client, WorkflowHandle, WorkflowHistory
from temporalio.worker import Worker

from activities.ledger.audit import run_audit
from activities.ledger.transfers import transfer_external
from activities.orders.intake import lock_for_amendment, take_in, take_in_amendment, take_in_cancels
from activities.orders.sagas import Saga, start_saga
from activities.registry import (
    liquidation_activities,
    operations_activities,
    order_activities,
    settlement_activities,
)
from activities.risk.exposures import set_margin_mode
from clients import LIQUIDATION_QUEUE, OPERATIONS_QUEUE, ORDERS_QUEUE, SETTLEMENT_QUEUE
from domain.instruments import SHIPPED, Instrument
from domain.matching import AnyEvent
from domain.order_entry import NewOrder, OrderRequest, Reference, amendment
from domain.sagas import (
    ACKNOWLEDGE,
    APPLY_ORDER_EVENTS,
    APPLY_RISK_EVENTS,
    APPLY_TRADES,
    CONFIRM_POSITIONS,
    SETTLE,
    SETTLEMENT,
    EventRange,
    Progress,
    SettlementInput,
)
from engine import lease as leases
from engine.log import Batch, read_commands, write_batch
from engine.matcher import Matcher
from storage.db import Pool
from tests.marks import say_mark
from tests.sandbox import CalmSandbox
from tests.waiting import until
from workflows.audit import LedgerAuditWorkflow
from workflows.funding import FundingSettlementWorkflow
from workflows.liquidation import LiquidationWorkflow
from workflows.margin import MarginChangeWorkflow
from workflows.orders import OrderCancellationWorkflow, OrderPlacementWorkflow
from workflows.settlement import SettlementWorkflow

BTC, ETH = SHIPPED[0].instrument_id, SHIPPED[1].instrument_id
Activity = Callable[..., Awaitable[Any]]
Change = Callable[[Activity], Activity]


class StepFailedError(Exception):
    """What a step of these tests fails with."""


def order(user_id: int, side: str, quantity: str, price: str, instrument_id: str = BTC) -> NewOrder:
    """A LIMIT order that has passed order entry."""
    figures = Decimal(quantity), Decimal(price)
    request = OrderRequest(instrument_id, side, "LIMIT", *figures)  # type: ignore[arg-type]  # a Literal, from a test
    return NewOrder(user_id, request, figures[1])


@dataclass(frozen=True)
class Desk:
    """Order entry without an api: what it writes down, the workflows it starts, and what became of them."""

    pool: Pool
    temporal: Client

    async def deposit(self, user_id: int, amount: str) -> None:
        """Credit USDT; a negative amount is a withdrawal."""
        async with self.pool.acquire() as conn, conn.transaction():
            await transfer_external(conn, "DEPOSIT", uuid.uuid4().hex, user_id, "USDT", Decimal(amount))

    async def take_in(self, *orders: NewOrder, mark: str | None = None) -> Saga:
        """Write orders down; their saga, not started. The market is at their prices, or at `mark`."""
        for order in orders:
            instrument = next(i for i in SHIPPED if i.instrument_id == order.request.instrument_id)
            await say_mark(self.pool, instrument, order.bound_price if mark is None else Decimal(mark))
        async with self.pool.acquire() as conn, conn.transaction():
            saga = (await take_in(conn, orders, datetime.now(UTC))).saga
        assert saga is not None
        return saga

    async def take_in_amendment(self, user_id: int, order_id: int, quantity: str) -> Saga:
        """Write an amendment of an order down; its saga, not started."""
        async with self.pool.acquire() as conn, conn.transaction():
            found = await lock_for_amendment(conn, user_id, order_id)
            assert found is not None
            instrument = next(i for i in SHIPPED if i.instrument_id == found[0].request.instrument_id)
            checked = amendment(found[0], None, Decimal(quantity), instrument, Reference(found[0].bound_price))
            return await take_in_amendment(conn, checked, datetime.now(UTC))

    async def amendment(self, saga: Saga) -> tuple[str, str | None]:
        """Status and failure reason of the amendment of a saga."""
        row = await self.pool.fetchrow(
            "SELECT status, failure_reason FROM orders.amendments WHERE amendment_id = $1", saga.batch.order_ids[0]
        )
        assert row is not None
        return row["status"], row["failure_reason"]

    async def start(self, saga: Saga) -> WorkflowHandle[Any, Any]:
        """Start a saga's workflow."""
        assert await start_saga(self.temporal, saga, eager=False)
        return self.temporal.get_workflow_handle(saga.batch.saga_id)

    async def cross(self, user_id: int) -> None:
        """All of the user's money stands behind what they open in BTC from now on."""
        async with self.pool.acquire() as conn, conn.transaction():
            await set_margin_mode(conn, user_id, SHIPPED[0], "CROSS")

    async def place(self, *orders: NewOrder, mark: str | None = None) -> list[int]:
        """Place orders and wait for the end of their saga; their ids."""
        saga = await self.take_in(*orders, mark=mark)
        await (await self.start(saga)).result()
        return saga.batch.order_ids

    async def take_in_cancellation(self, *order_ids: int) -> Saga:
        """Write the cancellation of orders down; its saga, not started."""
        async with self.pool.acquire() as conn, conn.transaction():
            return await take_in_cancels(conn, list(order_ids), uuid.uuid4().hex[:12])

    async def cancel(self, *order_ids: int) -> WorkflowHandle[Any, Any]:
        """Start the cancellation of orders."""
        return await self.start(await self.take_in_cancellation(*order_ids))

    async def states(self, order_ids: list[int]) -> list[tuple[str, str | None]]:
        """(status, failure reason) of each order."""
        rows = await self.pool.fetch(
            "SELECT status, failure_reason FROM orders.orders WHERE order_id = ANY($1) ORDER BY order_id", order_ids
        )
        return [(row["status"], row["failure_reason"]) for row in rows]

    async def balance(self, user_id: int) -> tuple[Decimal, Decimal]:
        """Available and reserved USDT."""
        row = await self.pool.fetchrow(
            "SELECT available, reserved FROM ledger.ledger_balances WHERE user_id = $1 AND asset = 'USDT'", user_id
        )
        assert row is not None
        return row["available"], row["reserved"]

    async def commands(self) -> list[str]:
        """The kinds of all commands about orders that the engine got, in order per instrument."""
        rows = await self.pool.fetch(
            "SELECT payload::json ->> 'kind' FROM matching.commands"
            " WHERE payload::json ->> 'kind' NOT IN ('MARK_PRICE', 'SET_TERMS', 'MOVE_MARGIN')"
            " ORDER BY instrument_id, seq"
        )
        return [row[0] for row in rows]

    async def assert_clean(self) -> None:
        """Every invariant of the ledger holds, and nothing is in motion."""
        report = await run_audit(self.pool)
        assert report.ok, report
        assert not any(check.detail for check in report.checks), report
        assert not await self.pool.fetchval("SELECT EXISTS (SELECT FROM orders.sagas WHERE NOT done)")


class StepwiseEngine:
    """The engine's log of one instrument, written when a test says so."""

    def __init__(self, pool: Pool, instrument: Instrument = SHIPPED[0]) -> None:
        self._pool = pool
        self._instrument = instrument
        self._matcher = Matcher(instrument)

    async def match(self) -> int:
        """Match the commands that wait; the seq of the last event."""
        async with self._pool.acquire() as conn:
            lease = await leases.take(conn, self._instrument.instrument_id, "test")
            assert lease is not None
            commands = await read_commands(conn, lease.instrument_id, lease.command_seq, 10_000)
            events: list[AnyEvent] = []
            causes: list[int] = []
            for seq, command in enumerate(commands, lease.command_seq + 1):
                caused = self._matcher.apply(command)
                events += caused
                causes += [seq] * len(caused)
            batch = Batch(lease.command_seq + len(commands), lease.event_seq + 1, events, causes)
            await write_batch(conn, lease, self._instrument, batch)
            return batch.last_seq


async def start_settlement(temporal: Client, instrument_id: str = BTC) -> WorkflowHandle[Any, Any]:
    """Start the settlement of an instrument, as the engine's first signal does."""
    return await temporal.start_workflow(
        SETTLEMENT,
        SettlementInput(instrument_id),
        id=f"settlement-{instrument_id}",
        task_queue=SETTLEMENT_QUEUE,
    )


async def until_settled(handle: WorkflowHandle[Any, Any], seq: int, seconds: float = 15) -> None:
    """Returns when settlement has acknowledged everything up to `seq`."""

    async def settled() -> bool:
        progress: Progress = await handle.query("progress", result_type=Progress)
        return progress.settled_seq >= seq

    await until(settled, seconds, f"{handle.id} to reach {seq}")


async def settlement_steps(pool: Pool, redis: Redis, events: EventRange) -> None:
    """Settle a range without a workflow."""
    steps = {_name(function): function for function in settlement_activities(pool, redis)}
    for name in (APPLY_TRADES, APPLY_RISK_EVENTS, SETTLE, CONFIRM_POSITIONS, APPLY_ORDER_EVENTS, ACKNOWLEDGE):
        await steps[name](events)


@asynccontextmanager
async def workers(
    temporal: Client, pool: Pool, redis: Redis, changed: Mapping[str, Change] | None = None
) -> AsyncIterator[None]:
    """Workers of all queues, workflows in the sandbox; `changed` wraps the activities of these names."""
    queues: list[tuple[str, list[type], list[Activity]]] = [
        (ORDERS_QUEUE, [OrderPlacementWorkflow, OrderCancellationWorkflow], order_activities(pool, redis)),
        (SETTLEMENT_QUEUE, [SettlementWorkflow, FundingSettlementWorkflow], settlement_activities(pool, redis)),
        (LIQUIDATION_QUEUE, [LiquidationWorkflow], liquidation_activities(pool, redis)),
        (OPERATIONS_QUEUE, [LedgerAuditWorkflow, MarginChangeWorkflow], operations_activities(pool, redis)),
    ]
    left = set(changed or {})
    running: list[Worker] = []
    for queue, workflows, activities in queues:
        used = [_changed(function, changed or {}) for function in activities]
        left -= {_name(function) for function in activities}
        running.append(
            Worker(temporal, task_queue=queue, workflows=workflows, activities=used, workflow_runner=CalmSandbox())
        )
    assert not left, f"Expected activities named {left}"
    async with running[0], running[1], running[2], running[3]:
        yield


async def details(handle: WorkflowHandle[Any, Any]) -> str:
    """Where a workflow says that it stands."""
    metadata: WorkflowMetadata = await handle.query("__temporal_workflow_metadata", result_type=WorkflowMetadata)
    return metadata.current_details


async def until_said(handle: WorkflowHandle[Any, Any], pattern: str) -> None:
    """Returns when the workflow says, in its current details, what the pattern finds."""

    async def is_said() -> bool:
        return re.search(pattern, await details(handle)) is not None

    await until(is_said, 15, f"details like {pattern!r}")


def fails(times: int) -> Change:
    """The step raises the first `times` times, then does its work."""
    left = times

    def change(real: Activity) -> Activity:
        async def step(*args: Any) -> Any:
            nonlocal left
            if left > 0:
                left -= 1
                raise StepFailedError(f"{left} failures to come")
            return await real(*args)

        return step

    return change


class Gate:
    """A step that raises while the gate is closed; `knocked` tells that it has tried, `visible` that it is retried
    as a regular activity.
    """

    def __init__(self, *, open_for: Callable[[Any], bool] = lambda _: False) -> None:
        self.is_open = False
        self.knocked = asyncio.Event()
        self.visible = asyncio.Event()
        self._open_for = open_for

    def __call__(self, real: Activity) -> Activity:
        """The step behind the gate."""

        async def step(arg: Any) -> Any:
            if not self.is_open and not self._open_for(arg):
                self.knocked.set()
                if not activity.info().is_local:
                    self.visible.set()
                raise StepFailedError("The gate is closed")
            return await real(arg)

        return step


def first(action: Callable[[], Awaitable[None]]) -> Change:
    """`action` happens once, right before the step's first run."""
    done = False

    def change(real: Activity) -> Activity:
        async def step(*args: Any) -> Any:
            nonlocal done
            if not done:
                done = True
                await action()
            return await real(*args)

        return step

    return change


def regular_attempts(history: WorkflowHistory) -> list[tuple[str, int]]:
    """(name, attempt that started last) of every activity that was run as a regular one, visible to operators."""
    scheduled = {
        event.event_id: event.activity_task_scheduled_event_attributes.activity_type.name
        for event in history.events
        if event.HasField("activity_task_scheduled_event_attributes")
    }
    started = [
        event.activity_task_started_event_attributes
        for event in history.events
        if event.HasField("activity_task_started_event_attributes")
    ]
    return [(scheduled[attributes.scheduled_event_id], attributes.attempt) for attributes in started]


def _name(function: Activity) -> str:
    name: str = function.__temporal_activity_definition.name  # type: ignore[attr-defined]  # set by @activity.defn
    return name


def _changed(function: Activity, changed: Mapping[str, Change]) -> Activity:
    change = changed.get(_name(function))
    if change is None:
        return function
    # The signature is kept (Temporal decodes arguments by it); the definition is made anew.
    step = functools.wraps(function, updated=())(change(function))
    assert inspect.signature(step) == inspect.signature(function)
    return activity.defn(name=_name(function))(step)

"""The desk of one api process: takes orders in, runs their sagas, answers with the engine's word on request."""

import asyncio
import logging
import signal
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

from opentelemetry.trace import SpanContext
from redis.asyncio import Redis
from temporalio.client import Client
from temporalio.service import RPCError
from temporalio.worker import UnsandboxedWorkflowRunner, Worker

from activities.matching.instruments import read_instruments
from activities.orders.intake import (
    find_by_client_ids,
    lock_for_amendment,
    take_in,
    take_in_amendment,
    take_in_cancels,
)
from activities.orders.rows import IN_ENGINE_STATUSES, OrderRow
from activities.orders.sagas import Saga, merge_sagas, start_saga
from activities.orders.views import find_amendment, find_order, order_view
from activities.registry import order_activities
from api.desk.batcher import Answer, Lane
from api.desk.order_views import pending_view, verdict_view
from api.desk.verdicts import Verdicts
from clients import ORDERS_QUEUE
from domain.clock import iso
from domain.instruments import Instrument
from domain.order_entry import NewOrder, OrderRequest, Reference, amendment, new_order
from domain.problems import Problem
from storage.db import Pool
from storage.reference_prices import read_reference_prices
from storage.waiting import pause
from telemetry import tracing
from telemetry.tracing import Trails
from workflows.orders import OrderCancellationWorkflow, OrderPlacementWorkflow

log = logging.getLogger(__name__)

LANES = 2
BATCH_MAX = 1000
WAITING_MAX = 20_000
# What a saga costs beside its orders grows with the load: only larger ones keep up with it then.
SAGA_MAX = 3_000
SAGA_SECONDS_MAX = 10.0
PLACED_SECONDS_MAX = 5.0
INSTRUMENTS_SECONDS = 1.0
REFERENCE_SECONDS = 0.1
FIRST_PAUSE_SECONDS = 0.02
# With the ten seconds for requests before it (api/__main__.py) still within what the supervisor waits.
DRAIN_SECONDS_MAX = 7.0
DRAIN_POLL_SECONDS = 0.02


@dataclass(frozen=True, slots=True)
class Entry:
    """An order on its way in; `awaited` when its sender wants the engine's word. `trace` is that of its request."""

    order: NewOrder
    awaited: bool
    trace: SpanContext | None = None


@dataclass(frozen=True, slots=True)
class PlacementLane:
    """The two stages of placement. A user always has the same lane, so their orders keep the order of sending."""

    intake: Lane[Entry, dict[str, Any]]
    sagas: Lane[Saga, None]


class OrderDesk:
    """Group-commits placements and cancellations; hosts the worker on which their workflows start eagerly."""

    def __init__(self, pool: Pool, redis: Redis, temporal: Client) -> None:
        self._pool = pool
        self._redis = redis
        self._temporal = temporal
        self._verdicts = Verdicts(redis)
        self._placement_trails, self._cancel_trails = Trails(), Trails()
        self._instruments: dict[str, Instrument] = {}
        self._references: dict[str, Reference] = {}
        self._placements = [self._placement_lane() for _ in range(LANES)]
        self._cancels: Lane[int, None] = Lane(
            self._cancel, batch_max=BATCH_MAX, waiting_max=WAITING_MAX, name="cancels"
        )
        self._cancel_sagas: Lane[Saga, None] = Lane(
            self._start_cancels, batch_max=BATCH_MAX, waiting_max=WAITING_MAX, name="cancel_sagas"
        )

    def _placement_lane(self) -> PlacementLane:
        """Orders are written down as they come; the sagas follow one at a time, each over all that waits by then."""
        sagas: Lane[Saga, None] = Lane(self._run_placements, batch_max=SAGA_MAX, waiting_max=SAGA_MAX, name="sagas")

        async def take_in_next(entries: Sequence[Entry], answer: Answer[dict[str, Any]]) -> None:
            saga = await self._take_in(entries, answer)
            if saga is not None:
                await sagas.hand_over(saga, len(saga.batch.order_ids))

        intake = Lane(take_in_next, batch_max=BATCH_MAX, waiting_max=WAITING_MAX // LANES, name="intake")
        return PlacementLane(intake, sagas)

    async def run(self, ready: asyncio.Event) -> None:
        """Serve until cancelled; `ready` is set when orders can be taken."""
        await self._read_instruments()
        worker = Worker(
            self._temporal,
            task_queue=ORDERS_QUEUE,
            workflows=[OrderPlacementWorkflow, OrderCancellationWorkflow],
            activities=order_activities(self._pool, self._redis),
            workflow_runner=UnsandboxedWorkflowRunner(),
        )
        async with worker, asyncio.TaskGroup() as tasks:
            tasks.create_task(self._verdicts.listen())
            tasks.create_task(self._refresh(self._read_instruments, INSTRUMENTS_SECONDS))
            tasks.create_task(self._refresh(self._read_references, REFERENCE_SECONDS))
            for lane in self._placements:
                tasks.create_task(lane.intake.run())
                tasks.create_task(lane.sagas.run())
            tasks.create_task(self._cancels.run())
            tasks.create_task(self._cancel_sagas.run())
            ready.set()

    async def drain(self) -> None:
        """Returns when nothing that was taken in waits any more, or after `DRAIN_SECONDS_MAX`: the sweeper has the
        rest."""
        lanes: list[Lane[Any, Any]] = [self._cancels, self._cancel_sagas]
        for placement in self._placements:
            lanes += [placement.intake, placement.sagas]
        deadline = time.monotonic() + DRAIN_SECONDS_MAX
        while not all(lane.is_idle for lane in lanes):
            if time.monotonic() > deadline:
                log.warning("Sagas are left to the sweeper: they take longer than %g s", DRAIN_SECONDS_MAX)
                return
            await asyncio.sleep(DRAIN_POLL_SECONDS)

    def instrument(self, instrument_id: str) -> Instrument:
        """Raises Problem INSTRUMENT_NOT_FOUND."""
        found = self._instruments.get(instrument_id)
        if found is None:
            raise Problem("INSTRUMENT_NOT_FOUND", f"There is no instrument {instrument_id[:64]!r}")
        return found

    async def reference(self, instrument_id: str, *, fresh: bool) -> Reference:
        """Prices for bounds. Raises Problem OVERLOADED while the instrument has never been priced."""
        if fresh or instrument_id not in self._references:
            await self._read_references()
        found = self._references.get(instrument_id)
        if found is None:
            raise Problem("OVERLOADED", f"{instrument_id} has no mark price yet; try again shortly")
        return found

    async def check(self, user_id: int, request: OrderRequest) -> NewOrder:
        """The order, if it may be taken in. Raises the problems of `domain.order_entry.bound_price`."""
        instrument = self.instrument(request.instrument_id)
        reference = await self.reference(request.instrument_id, fresh=request.type == "MARKET")
        return new_order(user_id, request, instrument, reference)

    async def place(self, orders: Sequence[NewOrder], *, awaited: bool) -> Sequence[dict[str, Any] | Exception]:
        """Take orders of one user in; answers are the orders (PENDING, or after the engine if `awaited`) or why not."""
        lane = self._placements[orders[0].user_id % LANES]
        placed = await lane.intake.submit([Entry(order, awaited, tracing.current()) for order in orders])
        if not awaited:
            return placed
        return await asyncio.gather(*(self._await_engine(view) for view in placed))

    async def amend(
        self, user_id: int, order_id: int, price: Decimal | None, quantity: Decimal | None, *, awaited: bool
    ) -> dict[str, Any]:
        """Take an amendment of one of the user's orders in (None: as it is); the order with it, once it has ended if
        `awaited`.

        One that comes while the order, or an amendment of it, is still on its way waits for that. Raises Problem
        ORDER_NOT_FOUND, ORDER_NOT_AMENDABLE and the problems of `domain.order_entry.amendment`.
        """
        saga = None
        async for _ in _tries(PLACED_SECONDS_MAX):
            saga = await self._take_in_amendment(user_id, order_id, price, quantity)
            if saga is not None:
                break
        if saga is None:
            raise Problem("ORDER_NOT_AMENDABLE", f"Order {order_id} or an amendment of it is still on its way")
        self._placement_trails.remember(saga.batch.order_ids, tracing.current())
        await self._placements[user_id % LANES].sagas.hand_over(saga, 1)
        view: dict[str, Any] = {}
        async for _ in _tries(PLACED_SECONDS_MAX if awaited else 0):
            view = await self._amendment(saga.batch.order_ids[0])
            if view["amendmentStatus"] not in ("PENDING", "ACCEPTED"):
                break
        return view

    async def _take_in_amendment(
        self, user_id: int, order_id: int, price: Decimal | None, quantity: Decimal | None
    ) -> Saga | None:
        async with self._pool.acquire() as conn, conn.transaction():
            found = await lock_for_amendment(conn, user_id, order_id)
            if found is None:
                raise Problem("ORDER_NOT_FOUND", f"There is no order {order_id}")
            order, status = found
            if status == "PENDING":
                return None
            if status not in IN_ENGINE_STATUSES:
                raise Problem("ORDER_NOT_AMENDABLE", f"Order {order_id} is {status}")
            instrument = self.instrument(order.request.instrument_id)
            reference = await self.reference(order.request.instrument_id, fresh=False)
            checked = amendment(order, price, quantity, instrument, reference)
            return await take_in_amendment(conn, checked, datetime.now(UTC))

    async def _amendment(self, amendment_id: int) -> dict[str, Any]:
        async with self._pool.acquire() as conn:
            change = await find_amendment(conn, amendment_id)
            assert change is not None, f"Expected amendment {amendment_id}"
            order = await find_order(conn, change.order_id)
            assert order is not None, f"Expected order {change.order_id}"
        return {
            **order_view(order),
            "amendmentId": amendment_id,
            "amendmentStatus": change.status,
            "amendmentFailureReason": change.failure_reason,
        }

    async def cancel(self, order_ids: Sequence[int]) -> None:
        """Hand in the cancellation of orders that were found open."""
        if order_ids:
            self._cancel_trails.remember(order_ids, tracing.current())
            await self._cancels.submit(order_ids)

    async def _take_in(self, entries: Sequence[Entry], answer: Answer[dict[str, Any]]) -> Saga | None:
        now = datetime.now(UTC)
        async with self._pool.acquire() as conn, conn.transaction():
            intake = await take_in(conn, [entry.order for entry in entries], now)
        for order_id, entry in zip(intake.order_ids, entries, strict=True):
            if order_id is not None:
                self._placement_trails.remember([order_id], entry.trace)
            if order_id is not None and entry.awaited:
                self._verdicts.order(order_id)
        answer(await self._answers(entries, intake.order_ids, now))
        return intake.saga

    async def _run_placements(self, waiting: Sequence[Saga], answer: Answer[None]) -> None:
        saga = await merge_sagas(self._pool, waiting)
        trail = self._placement_trails.take(order_id for one in waiting for order_id in one.batch.order_ids)
        if saga is not None:
            await self._run(saga, trail)
        answer([None] * len(waiting))

    async def _run(self, saga: Saga, trail: Sequence[SpanContext]) -> None:
        verdict = self._verdicts.saga(saga.batch.saga_id)
        try:
            if await self._start(saga, trail):
                await asyncio.wait_for(verdict, SAGA_SECONDS_MAX)
        except TimeoutError:
            log.warning("Saga %s takes long; going on with the next one", saga.batch.saga_id)
        finally:
            self._verdicts.forget_saga(saga.batch.saga_id)

    async def _start_cancels(self, waiting: Sequence[Saga], answer: Answer[None]) -> None:
        saga = await merge_sagas(self._pool, waiting)
        trail = self._cancel_trails.take(order_id for one in waiting for order_id in one.batch.order_ids)
        if saga is not None:
            await self._start(saga, trail)
        answer([None] * len(waiting))

    async def _start(self, saga: Saga, trail: Sequence[SpanContext]) -> bool:
        batch = saga.batch
        try:
            with tracing.span(f"saga {saga.kind}", trail, {"exchange.saga": batch.saga_id}) as context:
                if trail:
                    await tracing.note_orders(self._redis, batch.order_ids, context)
                await start_saga(self._temporal, saga, eager=True)
        except RPCError as error:
            # The saga is written down: the sweeper starts it when Temporal is back.
            log.warning("Saga %s could not be started, the sweeper will: %s", saga.batch.saga_id, error.message)
            return False
        return True

    async def _answers(
        self, entries: Sequence[Entry], order_ids: Sequence[int | None], now: datetime
    ) -> list[dict[str, Any] | Exception]:
        repeated = [
            (entry.order.user_id, entry.order.request.client_order_id or "")
            for entry, order_id in zip(entries, order_ids, strict=True)
            if order_id is None
        ]
        first_ones: dict[tuple[int, str], OrderRow] = {}
        if repeated:
            async with self._pool.acquire() as conn:
                first_ones = await find_by_client_ids(conn, repeated)
        answers: list[dict[str, Any] | Exception] = []
        for entry, order_id in zip(entries, order_ids, strict=True):
            if order_id is None:
                row = first_ones[entry.order.user_id, entry.order.request.client_order_id or ""]
                answers.append(
                    Problem(
                        "DUPLICATE_CLIENT_ORDER_ID",
                        f"Order {row.order_id} has this clientOrderId",
                        order=order_view(row),
                    )
                )
            else:
                answers.append(pending_view(order_id, entry.order, now))
        return answers

    async def _await_engine(self, view: dict[str, Any] | Exception) -> dict[str, Any] | Exception:
        if isinstance(view, Exception):
            return view
        order_id = view["orderId"]
        try:
            change = await asyncio.wait_for(self._verdicts.order(order_id), PLACED_SECONDS_MAX)
        except TimeoutError:
            row = await find_order(self._pool, order_id)
            return view if row is None else order_view(row)
        finally:
            self._verdicts.forget_order(order_id)
        return {**view, **verdict_view(change), "updatedAt": iso(datetime.now(UTC))}

    async def _cancel(self, order_ids: Sequence[int], answer: Answer[None]) -> None:
        unique = sorted(set(order_ids))
        async with self._pool.acquire() as conn, conn.transaction():
            saga = await take_in_cancels(conn, unique, uuid.uuid4().hex[:12])
        answer([None] * len(order_ids))
        await self._cancel_sagas.hand_over(saga, len(unique))

    async def _read_instruments(self) -> None:
        self._instruments = await read_instruments(self._pool)
        self._verdicts.know(self._instruments)

    async def _read_references(self) -> None:
        found = await read_reference_prices(self._redis, list(self._instruments))
        self._references = {instrument_id: Reference(price.mark) for instrument_id, price in found.items()}

    async def _refresh(self, read: Callable[[], Coroutine[Any, Any, None]], seconds: float) -> None:
        while True:
            await pause(seconds)
            try:
                await read()
            except Exception as error:  # any outage: what was read last stays good until the next look
                log.warning("%s failed: %r", read.__name__, error)


async def _tries(seconds: float) -> AsyncIterator[None]:
    """Gives control at once, then after ever longer pauses, for `seconds` all told."""
    deadline, pause = time.monotonic() + seconds, FIRST_PAUSE_SECONDS
    yield
    while time.monotonic() + pause < deadline:
        await asyncio.sleep(pause)
        yield
        pause *= 1.5


@asynccontextmanager
async def open_desk(pool: Pool, redis: Redis, temporal: Client) -> AsyncIterator[OrderDesk]:
    """A running desk. Should it fail, the whole process ends: its supervisor starts a new one."""
    desk = OrderDesk(pool, redis, temporal)
    ready = asyncio.Event()
    task = asyncio.create_task(desk.run(ready))
    task.add_done_callback(_end_process_on_failure)
    waiting = asyncio.create_task(ready.wait())
    await asyncio.wait([task, waiting], return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    if task.done():
        task.result()
    try:
        yield desk
        if not task.done():
            await desk.drain()
    finally:
        task.cancel()
        await asyncio.wait([task])


def _end_process_on_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        log.critical("The order desk failed", exc_info=task.exception())
        signal.raise_signal(signal.SIGTERM)

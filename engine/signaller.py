"""Tells the settlement workflows that there are new events, as rarely as possible and without holding up matching.

A signal costs Temporal about 10 ms of CPU. Settlement reads the engine's position after it has committed its
acknowledgement and goes on by itself if there is more, so a signal is needed only when it may have gone idle.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta

from temporalio.client import Client
from temporalio.common import (
    SearchAttributeKey,
    SearchAttributePair,
    TypedSearchAttributes,
    WorkflowIDConflictPolicy,
)
from temporalio.service import RPCError

from activities.matching.steps import SETTLEMENT_CONSUMER
from clients import SETTLEMENT_QUEUE
from domain.sagas import ADVANCE_SIGNAL, SETTLEMENT, SettlementInput
from storage.db import DATABASE_ERRORS, Connection, Pool
from storage.waiting import pause

log = logging.getLogger(__name__)

# How long settlement may lag before it is told again: heals a lost signal, a failed one, a terminated workflow.
REPEAT_SECONDS = 1.0
INSTRUMENT_ID = SearchAttributeKey.for_keyword("InstrumentId")
RPC_TIMEOUT = timedelta(seconds=5)
_ACKED = """
    SELECT instrument_id, acked_seq FROM matching.consumers WHERE consumer = $1 AND instrument_id = ANY($2::text[])
"""


@dataclass(slots=True)
class Progress:
    """What is known of one instrument: the engine's `head`, settlement's `acked`, and `bound`, how far settlement
    will certainly get without another signal.
    """

    head: int = 0
    acked: int = 0
    bound: int = 0
    head_when_observed: int = 0
    signalled_at: float = 0.0
    in_flight: bool = False

    def observe(self, acked: int, head: int) -> None:
        """Settlement's acknowledgement was read as `acked`, at a time when `head` was committed already.

        If it has moved since the last look, settlement read the engine's position later than that look.
        """
        if acked > self.acked:
            self.bound = max(self.bound, self.head_when_observed)
        self.acked = acked
        self.head_when_observed = head

    def is_due(self, now: float) -> bool:
        """Whether to signal now: settlement may be idle, or has lagged for long."""
        if self.in_flight or self.acked >= self.head:
            return False
        return self.acked >= self.bound or now >= self.signalled_at + REPEAT_SECONDS

    def begin(self, now: float) -> None:
        """A signal up to `head` is on its way."""
        self.in_flight = True
        self.signalled_at = now
        self.bound = self.head


class Signaller:
    """Runs beside the runners; one query a round for all instruments, at most one signal in flight for each."""

    def __init__(self, pool: Pool, connect: Callable[[], Awaitable[Client]], instrument_ids: Sequence[str]) -> None:
        self._pool = pool
        self._connect = connect
        self._progress = {instrument_id: Progress() for instrument_id in instrument_ids}
        self._advanced = asyncio.Event()
        self._client: Client | None = None
        self._connecting = asyncio.Lock()
        self._down = False

    def advanced(self, instrument_id: str, head: int) -> None:
        """Events up to `head` are committed."""
        self._progress[instrument_id].head = head
        self._advanced.set()

    async def run(self) -> None:
        """Signal until cancelled."""
        while True:
            try:
                async with self._pool.acquire() as conn, asyncio.TaskGroup() as signals:
                    await self._follow(conn, signals)
            except* DATABASE_ERRORS as errors:
                log.warning("Cannot read how far settlement is: %r", errors.exceptions)
            await pause(REPEAT_SECONDS)

    async def _follow(self, conn: Connection, signals: asyncio.TaskGroup) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._wait()
            self._advanced.clear()
            await self._observe(conn)
            for instrument_id, progress in self._progress.items():
                if progress.is_due(loop.time()):
                    progress.begin(loop.time())
                    signals.create_task(self._signal(instrument_id, progress))

    async def _wait(self) -> None:
        """Until an engine advances; at most for a while when settlement lags, and for ever when it does not."""
        lags = any(progress.acked < progress.head for progress in self._progress.values())
        try:
            async with asyncio.timeout(REPEAT_SECONDS if lags else None):
                await self._advanced.wait()
        except TimeoutError:
            return

    async def _observe(self, conn: Connection) -> None:
        heads = {instrument_id: progress.head for instrument_id, progress in self._progress.items()}
        rows = await conn.fetch(_ACKED, SETTLEMENT_CONSUMER, list(heads))
        for instrument_id, acked in rows:
            self._progress[instrument_id].observe(acked, heads[instrument_id])

    async def _signal(self, instrument_id: str, progress: Progress) -> None:
        try:
            client = await self._connected()
            await client.start_workflow(
                SETTLEMENT,
                SettlementInput(instrument_id),
                id=f"settlement-{instrument_id}",
                task_queue=SETTLEMENT_QUEUE,
                id_conflict_policy=WorkflowIDConflictPolicy.USE_EXISTING,
                start_signal=ADVANCE_SIGNAL,
                start_signal_args=[progress.bound],
                search_attributes=TypedSearchAttributes([SearchAttributePair(INSTRUMENT_ID, instrument_id)]),
                static_summary=f"Settlement of {instrument_id}",
                rpc_timeout=RPC_TIMEOUT,
            )
        except (RPCError, RuntimeError, OSError) as error:
            self._report(error)
        else:
            self._report(None)
        finally:
            progress.in_flight = False
            # Settlement may have caught up and gone idle while the call was under way.
            self._advanced.set()

    async def _connected(self) -> Client:
        async with self._connecting:
            if self._client is None:
                async with asyncio.timeout(RPC_TIMEOUT.total_seconds()):
                    self._client = await self._connect()
            return self._client

    def _report(self, error: Exception | None) -> None:
        """Log the begin and the end of an outage, not every attempt of it."""
        if error is not None and not self._down:
            log.warning("Temporal is away, settlement will be told when it is back: %s", error)
        elif error is None and self._down:
            log.info("Temporal is back")
        self._down = error is not None

"""Settlement: one entity workflow per instrument applies the engine's events to positions, risk, ledger and orders."""

import asyncio

from temporalio import workflow
from temporalio.exceptions import ApplicationError, FailureError, is_cancelled_exception

with workflow.unsafe.imports_passed_through():
    from domain.contracts.liquidation import SETTLED_SIGNAL
    from domain.contracts.orders import CANCEL_UNCOVERED, Uncovered
    from domain.contracts.settlement import (
        ACKNOWLEDGE,
        ADVANCE_SIGNAL,
        APPLY_ORDER_EVENTS,
        APPLY_RISK_EVENTS,
        APPLY_TRADES,
        CONFIRM_POSITIONS,
        CURSOR_GAP,
        SETTLE,
        SETTLEMENT,
        EventRange,
        Progress,
        SettlementInput,
    )
    from workflows.steps import cause_of, run_step

RANGE_MAX = 4000


@workflow.defn(name=SETTLEMENT)
class SettlementWorkflow:
    """positions.apply_trades -> risk.apply_events -> ledger.settle -> positions.confirm -> orders.apply_events.

    The engine signals `advance(to_seq)`. Every step is idempotent per event sequence number, ranges follow one
    another without a hole, and a lost signal is healed by the next one (the engine repeats it).
    """

    @workflow.init
    def __init__(self, state: SettlementInput) -> None:
        self._instrument_id = state.instrument_id
        self._settled_seq = state.settled_seq
        self._applied_seq = state.settled_seq
        self._target_seq = state.target_seq
        # Keeps what runs beside settlement from being collected.
        self._telling: set[asyncio.Task[None]] = set()

    @workflow.signal(name=ADVANCE_SIGNAL)
    def advance(self, to_seq: int) -> None:
        """The engine has events up to `to_seq`; an older number than known is ignored."""
        self._target_seq = max(self._target_seq, to_seq)

    @workflow.query
    def progress(self) -> Progress:
        """How far settlement is, and how far it knows the engine to be."""
        return Progress(self._settled_seq, self._applied_seq, self._target_seq)

    @workflow.run
    async def run(self, state: SettlementInput) -> None:
        """Never ends: continues as new when its history grows."""
        workflow.set_current_details("Looks up where things stand")
        await self._look_up()
        while not workflow.info().is_continue_as_new_suggested():
            workflow.set_current_details(f"Settled up to event {self._settled_seq} of {self._target_seq}")
            await workflow.wait_condition(lambda: self._target_seq > self._settled_seq)
            try:
                await self._settle_next()
            except FailureError as error:
                cause = cause_of(error)
                if not (isinstance(cause, ApplicationError) and cause.type == CURSOR_GAP):
                    raise
                await self._look_up()
        workflow.continue_as_new(SettlementInput(self._instrument_id, self._target_seq, self._settled_seq))

    async def _look_up(self) -> None:
        """Learn from the tables where things stand: at the start, after a reset, after a termination in mid-range."""
        progress = await run_step(ACKNOWLEDGE, EventRange(self._instrument_id, 0, 0), Progress, "where things stand")
        self._settled_seq = progress.settled_seq
        self._follow(progress)

    async def _settle_next(self) -> None:
        # A range that was begun has to be finished as it was: its first step stands at its end.
        begun = self._applied_seq > self._settled_seq
        to_seq = self._applied_seq if begun else min(self._target_seq, self._settled_seq + RANGE_MAX)
        events = EventRange(self._instrument_id, self._settled_seq, to_seq)
        label = f"{events.after_seq + 1}..{events.to_seq}"
        await run_step(APPLY_TRADES, events, type(None), label)
        # None in histories from before there were liquidations.
        liquidations = await run_step(APPLY_RISK_EVENTS, events, list[str] | None, label)  # type: ignore[arg-type]  # or none
        uncovered = await run_step(SETTLE, events, list[int], label)
        await run_step(CONFIRM_POSITIONS, events, type(None), label)
        await run_step(APPLY_ORDER_EVENTS, events, type(None), label)
        if uncovered:
            await run_step(CANCEL_UNCOVERED, Uncovered(self._instrument_id, uncovered), type(None), label)
        self._follow(await run_step(ACKNOWLEDGE, events, Progress, label))
        for workflow_id in liquidations or ():
            # Not waited for: after a crash the server may take half a minute to deliver some of a hundred.
            told = asyncio.create_task(_tell(workflow_id, to_seq))
            self._telling.add(told)
            told.add_done_callback(self._telling.discard)

    def _follow(self, progress: Progress) -> None:
        self._settled_seq = max(self._settled_seq, progress.settled_seq)
        self._applied_seq = progress.applied_seq
        self._target_seq = max(self._target_seq, progress.engine_seq)


async def _tell(workflow_id: str, seq: int) -> None:
    """Tell a liquidation that events of its user are settled; one that has ended does not need to know."""
    try:
        await workflow.get_external_workflow_handle(workflow_id).signal(SETTLED_SIGNAL, seq)
    except FailureError as error:
        if is_cancelled_exception(error):
            raise
        workflow.logger.info("Liquidation %s is not there: %s", workflow_id, error)

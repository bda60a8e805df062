"""Funding: one workflow per instrument and funding time, started by a schedule, or by hand for a time given."""

from datetime import timedelta

from temporalio import workflow
from temporalio.common import SearchAttributeKey
from temporalio.exceptions import ApplicationError

with workflow.unsafe.imports_passed_through():
    from domain.contracts.funding import (
        CLOSE_FUNDING,
        CONFIRM_FUNDING,
        EVENTS_OF,
        FIX_FUNDING_POSITIONS,
        FUNDING_SETTLEMENT,
        FUNDING_UNCOVERED,
        LAST_COMMAND,
        OPEN_FUNDING,
        SETTLE_FUNDING,
        FundingInput,
        FundingPage,
        FundingRun,
        FundingSnapshot,
        FundingTotals,
        LogPosition,
    )
    from domain.contracts.orders import CANCEL_UNCOVERED, Uncovered
    from workflows.steps import run_step

# Set by Temporal on what a schedule starts: the time it was due, however late it starts.
SCHEDULED_TIME = SearchAttributeKey.for_datetime("TemporalScheduledStartTime")
# After the funding time: orders accepted before it are in the engine's log by then.
SETTLED_AFTER = timedelta(seconds=3)
# Runs of before took nothing of what open orders hold.
PAID_FROM_ORDERS = "funding-paid-from-orders"


@workflow.defn(name=FUNDING_SETTLEMENT)
class FundingSettlementWorkflow:
    """ledger.open_funding -> positions.fix_funding_positions -> per page: ledger.settle_funding ->
    positions.confirm_funding (-> orders.cancel_uncovered) -> ledger.close_funding.

    Every step has its effect once, so a run may be started again, also under another workflow id. What is not there
    yet (the rate, the engine's or settlement's progress) is waited for, visibly.
    """

    @workflow.run
    async def run(self, start: FundingInput) -> FundingTotals:
        """Settle one funding time. Fails when it was started by hand without one."""
        run = _run_of(start)
        wait = run.time + SETTLED_AFTER - workflow.now()
        if wait > timedelta(0):
            workflow.set_current_details(f"Waiting for {run.funding_time}")
            await workflow.sleep(wait)
        workflow.set_current_details(f"Waiting for the rate of {run.funding_time}")
        if await run_step(OPEN_FUNDING, run, bool, run.funding_time):
            await self._fix_positions(run)
            await self._settle(run)
        totals = await run_step(CLOSE_FUNDING, run, FundingTotals, run.funding_time)
        workflow.set_current_details(f"{totals.positions} positions paid {totals.paid} and got {totals.received}")
        return totals

    async def _fix_positions(self, run: FundingRun) -> None:
        workflow.set_current_details("Waiting until all trades up to the funding time are settled")
        command_seq = await run_step(LAST_COMMAND, run.instrument_id, int)
        commands = LogPosition(run.instrument_id, command_seq)
        event_seq = await run_step(EVENTS_OF, commands, int, f"command {command_seq}")
        await run_step(FIX_FUNDING_POSITIONS, FundingSnapshot(run, event_seq), type(None), f"event {event_seq}")

    async def _settle(self, run: FundingRun) -> None:
        after_user_id: int | None = 0
        while after_user_id is not None:
            workflow.set_current_details(f"Settling positions of users after {after_user_id}")
            page, label = FundingPage(run, after_user_id), f"users after {after_user_id}"
            after_user_id = await run_step(SETTLE_FUNDING, page, int | None, label)  # type: ignore[arg-type]  # a union
            await run_step(CONFIRM_FUNDING, page, type(None), label)
            if workflow.patched(PAID_FROM_ORDERS):
                await self._cancel_uncovered(page, label)

    async def _cancel_uncovered(self, page: FundingPage, label: str) -> None:
        for uncovered in await run_step(FUNDING_UNCOVERED, page, list[Uncovered], label):
            await run_step(CANCEL_UNCOVERED, uncovered, type(None), f"{uncovered.instrument_id}, {label}")


def _run_of(start: FundingInput) -> FundingRun:
    if start.funding_time is not None:
        return FundingRun(start.instrument_id, start.funding_time)
    due = workflow.info().typed_search_attributes.get(SCHEDULED_TIME)
    if due is None:
        raise ApplicationError("Expected a funding time: no schedule started this run", non_retryable=True)
    return FundingRun(start.instrument_id, due.isoformat())

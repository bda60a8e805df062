"""Margin changes by a user: leverage, and money put behind a position or taken away from it."""

import asyncio
from dataclasses import replace

from temporalio import workflow
from temporalio.exceptions import FailureError, is_cancelled_exception

with workflow.unsafe.imports_passed_through():
    from domain.contracts.margin import (
        ADOPT_MARGIN,
        MARGIN_CHANGE,
        MOVE_MARGIN,
        PLAN_MARGIN_CHANGE,
        MarginChange,
        MarginMoved,
        MarginVerdict,
    )
    from domain.contracts.orders import CANCEL_UNCOVERED, Uncovered
    from workflows.steps import busy_pause, run_step


@workflow.defn(name=MARGIN_CHANGE)
class MarginChangeWorkflow:
    """risk.plan_margin_change -> ledger.move_margin -> positions.adopt_margin (-> orders.cancel_uncovered).

    Cancelling the workflow ends one that waits for another saga; one that risk has decided on is carried out."""

    @workflow.run
    async def run(self, change: MarginChange) -> str | None:
        """Answers why it was refused, None when it is done."""
        refusal = await self._change(change)
        workflow.set_current_details("Done" if refusal is None else f"Refused: {refusal}")
        return refusal

    async def _change(self, change: MarginChange) -> str | None:
        try:
            return await self._carry_out(change, await self._decide(change))
        except (FailureError, asyncio.CancelledError) as error:
            if not is_cancelled_exception(error):
                raise
            workflow.set_current_details("Cancelled: finishes what was begun")
            # Half a change would bar the user's orders for good. The steps answer what they have answered before.
            plan = await self._plan(change)
            if plan.is_busy:
                raise
            return await self._carry_out(change, plan)

    async def _decide(self, change: MarginChange) -> MarginVerdict:
        waits = change.waits
        workflow.set_current_details("Checks the change")
        while (plan := await self._plan(change)).is_busy:
            waits += 1
            workflow.set_current_details("Waits for another saga of the user")
            await busy_pause(waits)
            if workflow.info().is_continue_as_new_suggested():
                workflow.continue_as_new(replace(change, waits=waits))
        return plan

    async def _plan(self, change: MarginChange) -> MarginVerdict:
        return await run_step(PLAN_MARGIN_CHANGE, change, MarginVerdict, f"{change.kind} {change.value}")

    async def _carry_out(self, change: MarginChange, plan: MarginVerdict) -> str | None:
        if plan.refusal is not None:
            return plan.refusal
        workflow.set_current_details("Moves the money")
        moved = await run_step(MOVE_MARGIN, change, MarginMoved)
        if moved.refused:
            return moved.refused[0]
        workflow.set_current_details("Adopts what was moved")
        await run_step(ADOPT_MARGIN, change, type(None))
        if moved.is_uncovered:
            # The money went elsewhere while the leverage was being lowered; the position came first.
            await run_step(CANCEL_UNCOVERED, Uncovered(change.instrument_id, [change.user_id]), type(None))
        return None

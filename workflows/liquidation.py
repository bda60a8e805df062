"""Liquidation: one workflow per liquidation of a position, from the takeover to the last of what is left."""

import asyncio
from dataclasses import replace
from datetime import timedelta

from temporalio import workflow
from temporalio.exceptions import FailureError, is_cancelled_exception

with workflow.unsafe.imports_passed_through():
    from domain.contracts.liquidation import (
        BEGIN,
        CANCEL_ORDERS,
        CLAIM_INSURANCE,
        DELEVERAGE,
        FINISH,
        LIQUIDATION,
        PLAN,
        RELEASE_INSURANCE,
        SETTLED_SIGNAL,
        STOP,
        SUBMIT,
        Ending,
        LiquidationInput,
        Plan,
        PlanRequest,
        Submission,
        Takeover,
        claim_of,
    )
    from workflows.steps import pause_before, run_step

# A lost signal costs no more than this.
LOOK_INTERVAL = timedelta(seconds=2)
# While there is nobody to deleverage against, or nothing may be liquidated, it looks less and less often.
PAUSE_MAX = timedelta(seconds=30)


@workflow.defn(name=LIQUIDATION)
class LiquidationWorkflow:
    """begin -> rounds of (cancel the user's orders -> plan -> claim -> submit, or plan -> deleverage) -> release ->
    finish.

    Each round waits until the one before is settled; settlement signals `settled`. What an order leaves although it
    went as far as margin and insurance fund allow is deleveraged in the next round. Cancelling the workflow aborts:
    what is with the engine is waited for, and the position is its user's again.
    """

    @workflow.init
    def __init__(self, state: LiquidationInput) -> None:
        self._state = state
        self._settled = False

    @workflow.signal(name=SETTLED_SIGNAL)
    def settled(self, seq: int) -> None:
        """Settlement has finished with events, up to `seq`, that may be of this user."""
        self._settled = True

    @workflow.run
    async def run(self, state: LiquidationInput) -> str:
        """PROCESSED, ABORTED by an operator, or OVER when it had ended before."""
        takeover = Takeover(state.liquidation_id, is_open=True)
        status = "ABORTED" if state.is_stopping else "PROCESSED"
        workflow.set_current_details("Takes the position over")
        try:
            if state.is_stopping:
                await self._stop(state.liquidation_id)
            else:
                takeover = await run_step(BEGIN, state.liquidation_id, Takeover, "takes the position over")
                if not takeover.is_open:
                    workflow.set_current_details("Had ended before")
                    return "OVER"
                await self._liquidate(takeover)
        except (FailureError, asyncio.CancelledError) as error:
            if not is_cancelled_exception(error):
                raise
            status = "ABORTED"
            await self._stop(state.liquidation_id)
        await run_step(RELEASE_INSURANCE, state.liquidation_id, type(None), "claims on the insurance fund end")
        await run_step(FINISH, Ending(state.liquidation_id, status), type(None), status)
        workflow.set_current_details(f"{status} after {self._state.round} rounds")
        return status

    async def _liquidate(self, takeover: Takeover) -> None:
        shortfalls = 0
        while True:
            state, self._settled = self._state, False
            await run_step(CANCEL_ORDERS, takeover, int, f"orders of user {takeover.user_id}")
            plan = await self._plan(PlanRequest(state.liquidation_id, state.after, state.target))
            if plan.action == "DONE":
                return
            if plan.action == "WAIT":
                await self._wait(LOOK_INTERVAL)
            elif plan.action == "PAUSE":
                self._state = LiquidationInput(state.liquidation_id, state.round)
                await self._wait(LOOK_INTERVAL)
            elif plan.fell_short and plan.action == "ORDER":
                # Nobody was left to deleverage against: the book is tried again, some time later.
                self._state = LiquidationInput(state.liquidation_id, state.round)
                shortfalls += 1
                await self._wait(pause_before(shortfalls, LOOK_INTERVAL, PAUSE_MAX))
            else:
                await self._round(plan)
            if workflow.info().is_continue_as_new_suggested():
                workflow.continue_as_new(self._state)

    async def _plan(self, request: PlanRequest) -> Plan:
        plan = await run_step(PLAN, request, Plan)
        workflow.set_current_details(f"Round {self._state.round}: {plan.action}, {plan.why}")
        return plan

    async def _round(self, plan: Plan) -> None:
        liquidation_id, number = self._state.liquidation_id, self._state.round + 1
        self._state = LiquidationInput(liquidation_id, number, plan.action, plan.target)
        if plan.action == "DELEVERAGE":
            await run_step(DELEVERAGE, Submission(liquidation_id, number, plan), int, plan.why)
            return
        claim = claim_of(plan, liquidation_id, number)
        insurance = await run_step(CLAIM_INSURANCE, claim, str, f"up to {plan.insurance} {plan.asset}")
        await run_step(SUBMIT, Submission(liquidation_id, number, plan, insurance), bool, plan.why)

    async def _wait(self, limit: timedelta) -> None:
        """Until settlement has news, or for `limit`."""
        try:
            await workflow.wait_condition(lambda: self._settled, timeout=limit)
        except TimeoutError:
            return

    async def _stop(self, liquidation_id: int) -> None:
        await run_step(STOP, liquidation_id, type(None), "aborted by an operator")
        while True:
            self._settled = False
            if (await self._plan(PlanRequest(liquidation_id))).action == "DONE":
                return
            await self._wait(LOOK_INTERVAL)
            if workflow.info().is_continue_as_new_suggested():
                workflow.continue_as_new(replace(self._state, is_stopping=True))

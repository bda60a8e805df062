"""The order sagas: placement and cancellation, each over a batch of orders."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from temporalio import workflow
from temporalio.exceptions import FailureError, is_cancelled_exception

with workflow.unsafe.imports_passed_through():
    from domain.contracts.orders import (
        ACCEPT_ORDERS,
        CHECK_ORDERS,
        FREEZE_FUNDS,
        ORDER_CANCELLATION,
        ORDER_PLACEMENT,
        RELEASE_ORDERS,
        REQUEST_CANCELS,
        UNFREEZE_FUNDS,
        Acceptance,
        Carried,
        OrderBatch,
        Outcome,
        Refusal,
        StepRequest,
        Verdict,
    )
    from workflows.steps import busy_pause, run_step

# An order refused by the ledger although risk saw the money (it was spent in between) gets one more round.
FUNDING_ROUNDS_MAX = 2
CANCELLED_BY_OPERATOR = "CANCELLED_BY_OPERATOR"
# Runs from before gave back every round they had begun, also those in which they had only waited.
GIVES_BACK_WHAT_IT_RESERVED = "gives-back-what-it-reserved"


@workflow.defn(name=ORDER_PLACEMENT)
class OrderPlacementWorkflow:
    """risk.check_orders -> ledger.freeze_funds -> orders.accept, with risk.release_orders and ledger.unfreeze_funds
    as compensation. Cancelling the workflow fails the orders that are not accepted yet and frees their money. One that
    waits for another saga of a user for long continues as new."""

    @workflow.init
    def __init__(self, batch: OrderBatch) -> None:
        before = batch.carried or Carried(pending=batch.order_ids)
        self._passed = list(before.passed)
        self._refused = list(before.refused)
        self._pending = before.pending
        self._step = StepRequest(batch.saga_id, before.round, [])
        # The rounds that may have put money aside.
        self._reserving = list(before.reserving)
        self._fundings = before.fundings
        self._waits = before.waits
        self._backed = list(before.backed)

    @workflow.run
    async def run(self, batch: OrderBatch) -> Verdict:
        """Place the batch; every order ends ACCEPTED or FAILED."""
        try:
            await self._reserve(batch)
        except (FailureError, asyncio.CancelledError) as error:
            if not is_cancelled_exception(error):
                raise
            workflow.set_current_details("Cancelled: gives the money back")
            await self._give_back(batch)
        workflow.set_current_details(f"{len(self._passed)} orders to the engine, {len(self._refused)} refused")
        return await run_step(
            ACCEPT_ORDERS,
            Acceptance(batch.saga_id, sorted(self._passed), self._refused, self._backed),
            Verdict,
            f"{len(self._passed)} to the engine, {len(self._refused)} refused",
        )

    async def _reserve(self, batch: OrderBatch) -> None:
        while self._pending:
            workflow.set_current_details(f"Reserves the money of {len(self._pending)} orders")
            self._step = StepRequest(batch.saga_id, self._step.round + 1, self._pending)
            self._reserving.append(self._step.round)
            checked = await run_step(CHECK_ORDERS, self._step, Outcome, f"{len(self._pending)} orders")
            self._refused += checked.refused
            self._pending = checked.busy
            # What the ledger refused is checked anew: the last word on an order counts.
            checked_now = set(self._step.order_ids)
            self._backed = [b for b in self._backed if b.order_id not in checked_now] + checked.backed
            if not checked.passed:
                self._reserving.pop()
            else:
                self._fundings += 1
                frozen = await run_step(FREEZE_FUNDS, self._step, Outcome, f"{len(checked.passed)} orders")
                self._passed += frozen.passed
                if frozen.refused:
                    await self._release(StepRequest(batch.saga_id, self._step.round, _ids(frozen.refused)))
                    if self._fundings < FUNDING_ROUNDS_MAX:
                        self._pending = sorted(self._pending + _ids(frozen.refused))
                    else:
                        self._refused += frozen.refused
            if checked.busy:
                # Another saga of the same user is between its check and its freeze.
                self._waits += 1
                workflow.set_current_details(f"{len(checked.busy)} orders wait for another saga of their user")
                await busy_pause(self._waits)
                if workflow.info().is_continue_as_new_suggested():
                    workflow.continue_as_new(replace(batch, carried=self._carried()))

    def _carried(self) -> Carried:
        return Carried(
            waits=self._waits,
            round=self._step.round,
            reserving=self._reserving,
            passed=self._passed,
            refused=self._refused,
            pending=self._pending,
            fundings=self._fundings,
            backed=self._backed,
        )

    async def _release(self, request: StepRequest) -> None:
        await run_step(RELEASE_ORDERS, request, type(None), f"{len(request.order_ids)} orders")
        await run_step(UNFREEZE_FUNDS, request, type(None), f"{len(request.order_ids)} orders")

    async def _give_back(self, batch: OrderBatch) -> None:
        """Undo the reservations of a cancelled placement. Repeats of finished steps answer their first results."""
        refused = set(_ids(self._refused))
        held = [order_id for order_id in batch.order_ids if order_id not in refused]
        rounds: Sequence[int] = range(1, self._step.round + 1)
        if workflow.patched(GIVES_BACK_WHAT_IT_RESERVED):
            rounds = self._reserving
        for round_number in rounds:
            step = StepRequest(batch.saga_id, round_number, held)
            await run_step(CHECK_ORDERS, step, Outcome)
            frozen = await run_step(FREEZE_FUNDS, step, Outcome)
            # Apart, since what the ledger refused may have been released before, and is released only once; and that
            # first, since other sagas may count on these orders as soon as one release of the step is done.
            for order_ids in (_ids(frozen.refused), frozen.passed):
                if order_ids:
                    await self._release(StepRequest(batch.saga_id, round_number, order_ids))
        self._refused += [Refusal(order_id, CANCELLED_BY_OPERATOR) for order_id in held]
        self._passed = []


def _ids(refusals: list[Refusal]) -> list[int]:
    return [refusal.order_id for refusal in refusals]


@workflow.defn(name=ORDER_CANCELLATION)
class OrderCancellationWorkflow:
    """Appends CANCEL commands; the engine's answer, applied by settlement, ends the orders.

    An order still on its way to the engine is waited for; if that takes long, it continues as new.
    """

    @workflow.run
    async def run(self, batch: OrderBatch) -> int:
        """Request the cancellation of the batch; answers how many requests the engine got."""
        before = batch.carried or Carried()
        requested, waits = before.requested, before.waits
        workflow.set_current_details(f"Asks for the end of {len(batch.order_ids)} orders")
        while True:
            outcome = await run_step(REQUEST_CANCELS, batch, Outcome, f"{len(batch.order_ids)} orders")
            requested += len(outcome.passed)
            if not outcome.busy:
                workflow.set_current_details(f"{requested} orders asked to end")
                return requested
            waits += 1
            workflow.set_current_details(f"{len(outcome.busy)} orders are not with the engine yet")
            await busy_pause(waits)
            if workflow.info().is_continue_as_new_suggested():
                workflow.continue_as_new(replace(batch, carried=Carried(waits=waits, requested=requested)))

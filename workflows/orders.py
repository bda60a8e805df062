"""The order sagas: placement and cancellation, each over a batch of orders."""

import asyncio
from datetime import timedelta

from temporalio import workflow
from temporalio.exceptions import FailureError, is_cancelled_exception

with workflow.unsafe.imports_passed_through():
    from domain.sagas import (
        ACCEPT_ORDERS,
        CHECK_ORDERS,
        FREEZE_FUNDS,
        ORDER_CANCELLATION,
        ORDER_PLACEMENT,
        RELEASE_ORDERS,
        REQUEST_CANCELS,
        UNFREEZE_FUNDS,
        Acceptance,
        OrderBatch,
        Outcome,
        Refusal,
        StepRequest,
        Verdict,
    )
    from workflows.steps import run_step

# An order refused by the ledger although risk saw the money (it was spent in between) gets one more round.
FUNDING_ROUNDS_MAX = 2
BUSY_PAUSE_MAX = timedelta(seconds=5)
CANCELLED_BY_OPERATOR = "CANCELLED_BY_OPERATOR"


@workflow.defn(name=ORDER_PLACEMENT)
class OrderPlacementWorkflow:
    """risk.check_orders -> ledger.freeze_funds -> orders.accept, with risk.release_orders and ledger.unfreeze_funds
    as compensation. Cancelling the workflow fails the orders that are not accepted yet and frees their money."""

    def __init__(self) -> None:
        self._passed: list[int] = []
        self._refused: list[Refusal] = []
        self._step = StepRequest("", 0, [])

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
            Acceptance(batch.saga_id, sorted(self._passed), self._refused),
            Verdict,
            f"{len(self._passed)} to the engine, {len(self._refused)} refused",
        )

    async def _reserve(self, batch: OrderBatch) -> None:
        pending, fundings, busy_rounds = batch.order_ids, 0, 0
        while pending:
            workflow.set_current_details(f"Reserves the money of {len(pending)} orders")
            self._step = StepRequest(batch.saga_id, self._step.round + 1, pending)
            checked = await run_step(CHECK_ORDERS, self._step, Outcome, f"{len(pending)} orders")
            self._refused += checked.refused
            pending = checked.busy
            if checked.passed:
                fundings += 1
                frozen = await run_step(FREEZE_FUNDS, self._step, Outcome, f"{len(checked.passed)} orders")
                self._passed += frozen.passed
                if frozen.refused:
                    await self._release(StepRequest(batch.saga_id, self._step.round, _ids(frozen.refused)))
                    if fundings < FUNDING_ROUNDS_MAX:
                        pending = sorted(pending + _ids(frozen.refused))
                    else:
                        self._refused += frozen.refused
            if checked.busy:
                # Another saga of the same user is between its check and its freeze.
                busy_rounds += 1
                workflow.set_current_details(f"{len(checked.busy)} orders wait for another saga of their user")
                await asyncio.sleep(min(0.05 * 2**busy_rounds, BUSY_PAUSE_MAX.total_seconds()))

    async def _release(self, request: StepRequest) -> None:
        await run_step(RELEASE_ORDERS, request, type(None), f"{len(request.order_ids)} orders")
        await run_step(UNFREEZE_FUNDS, request, type(None), f"{len(request.order_ids)} orders")

    async def _give_back(self, batch: OrderBatch) -> None:
        """Undo the reservations of a cancelled placement. Repeats of finished steps answer their first results."""
        refused = set(_ids(self._refused))
        held = [order_id for order_id in batch.order_ids if order_id not in refused]
        for round_number in range(1, self._step.round + 1):
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

    An order still on its way to the engine is waited for.
    """

    @workflow.run
    async def run(self, batch: OrderBatch) -> int:
        """Request the cancellation of the batch; answers how many requests the engine got."""
        requested, waits = 0, 0
        workflow.set_current_details(f"Asks for the end of {len(batch.order_ids)} orders")
        while True:
            outcome = await run_step(REQUEST_CANCELS, batch, Outcome, f"{len(batch.order_ids)} orders")
            requested += len(outcome.passed)
            if not outcome.busy:
                workflow.set_current_details(f"{requested} orders asked to end")
                return requested
            waits += 1
            workflow.set_current_details(f"{len(outcome.busy)} orders are not with the engine yet")
            await asyncio.sleep(min(0.05 * 2**waits, BUSY_PAUSE_MAX.total_seconds()))

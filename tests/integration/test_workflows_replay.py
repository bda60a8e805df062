"""Today's workflow code continues every saved history, and a change that could not is caught."""

import pytest
from temporalio import workflow

from domain.sagas import (
    ACCEPT_ORDERS,
    CHECK_ORDERS,
    FREEZE_FUNDS,
    ORDER_PLACEMENT,
    Acceptance,
    OrderBatch,
    Outcome,
    StepRequest,
    Verdict,
)
from tests.replay import HISTORIES, replay
from workflows.audit import LedgerAuditWorkflow
from workflows.funding import FundingSettlementWorkflow
from workflows.liquidation import LiquidationWorkflow
from workflows.margin import MarginChangeWorkflow
from workflows.orders import OrderCancellationWorkflow, OrderPlacementWorkflow
from workflows.settlement import SettlementWorkflow
from workflows.steps import run_step

WORKFLOWS = [
    OrderPlacementWorkflow,
    OrderCancellationWorkflow,
    SettlementWorkflow,
    FundingSettlementWorkflow,
    LiquidationWorkflow,
    LedgerAuditWorkflow,
    MarginChangeWorkflow,
]
KINDS = ("placement", "cancellation", "settlement", "funding", "liquidation", "ledger_audit", "margin")
SAVED = [path.stem for path in sorted(HISTORIES.glob("*.json")) if path.stem.startswith(KINDS)]


@pytest.mark.parametrize("name", SAVED)
async def test_a_saved_history_replays(name: str) -> None:
    await replay(name, WORKFLOWS)


def test_every_way_through_the_sagas_has_a_saved_history() -> None:
    assert set(SAVED) >= {
        "placement",
        "placement_refused",
        "placement_second_round",
        "placement_busy",
        "placement_retried",
        "placement_cancelled",
        "placement_cancelled_second_round",
        "placement_amendment",
        "placement_amendment_cancelled",
        "cancellation",
        "settlement",
        "settlement_retried",
        "settlement_resumed",
        "settlement_overtaken",
        "settlement_uncovered",
        "settlement_continued",
        "funding",
        "funding_without_rate",
        "funding_behind",
        "funding_retried",
        "funding_scheduled",
        "funding_cancelled",
        "settlement_liquidating",
        "liquidation",
        "liquidation_late",
        "liquidation_deleveraged",
        "liquidation_aborted",
        "liquidation_recovered",
        "ledger_audit",
        "margin_added",
        "margin_refused",
        "margin_refused_by_ledger",
        "margin_busy",
        "margin_retried",
        "margin_uncovered",
    }


@workflow.defn(name=ORDER_PLACEMENT)
class FreezeBeforeCheck:
    """Placement with its first two steps swapped."""

    @workflow.run
    async def run(self, batch: OrderBatch) -> Verdict:
        """The steps in the wrong order."""
        step = StepRequest(batch.saga_id, 1, batch.order_ids)
        frozen = await run_step(FREEZE_FUNDS, step, Outcome)
        await run_step(CHECK_ORDERS, step, Outcome)
        return await run_step(ACCEPT_ORDERS, Acceptance(batch.saga_id, frozen.passed, []), Verdict)


@workflow.defn(name=ORDER_PLACEMENT)
class WithTwoChecks:
    """Placement with one step more."""

    @workflow.run
    async def run(self, batch: OrderBatch) -> Verdict:
        """The check twice."""
        step = StepRequest(batch.saga_id, 1, batch.order_ids)
        await run_step(CHECK_ORDERS, step, Outcome)
        await run_step(CHECK_ORDERS, step, Outcome)
        frozen = await run_step(FREEZE_FUNDS, step, Outcome)
        return await run_step(ACCEPT_ORDERS, Acceptance(batch.saga_id, frozen.passed, []), Verdict)


@pytest.mark.parametrize("changed", [FreezeBeforeCheck, WithTwoChecks])
async def test_a_changed_workflow_does_not_replay(changed: type) -> None:
    with pytest.raises(workflow.NondeterminismError):
        await replay("placement", [changed])

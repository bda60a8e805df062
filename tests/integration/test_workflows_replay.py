"""Today's workflow code continues every saved history, and a change that could not is caught."""

import asyncio
import json
from typing import Any

import pytest
from temporalio import workflow
from temporalio.worker import (
    ExecuteWorkflowInput,
    Interceptor,
    WorkflowInboundInterceptor,
    WorkflowInterceptorClassInput,
)

from domain.contracts.orders import (
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
from tests.replay import HISTORIES, every_workflow, replay
from workflows.steps import run_step

WORKFLOWS = every_workflow()
SAVED = [path.stem for path in sorted(HISTORIES.glob("*.json"))]


def workflow_name(found: type) -> str:
    """Under which name Temporal knows a workflow class."""
    name: str = getattr(found, "__temporal_workflow_definition").name
    return name


def type_of(history: str) -> str:
    """Of which workflow a saved history is."""
    first = json.loads((HISTORIES / f"{history}.json").read_text())["events"][0]
    name: str = first["workflowExecutionStartedEventAttributes"]["workflowType"]["name"]
    return name


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
        "funding_uncovered",
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
        "margin_cancelled",
        "margin_cancelled_waiting",
        "registration",
        "registration_failed",
        "registration_resumer",
    }


def test_every_workflow_has_a_saved_history() -> None:
    assert {workflow_name(found) for found in WORKFLOWS} == {type_of(name) for name in SAVED}


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


class PauseFirst(Interceptor):
    """Changes any workflow: two timers before everything else (one of them some workflow may begin with anyway); if
    `patch` is set, only in runs that begin with it."""

    def __init__(self, patch: str | None) -> None:
        self._patch = patch

    def workflow_interceptor_class(self, input: WorkflowInterceptorClassInput) -> type[WorkflowInboundInterceptor]:  # noqa: A002 - the name is the library's
        """What runs around the workflow."""
        patch = self._patch

        class Pausing(WorkflowInboundInterceptor):
            async def execute_workflow(self, input: ExecuteWorkflowInput) -> Any:  # noqa: A002 - the name is the library's
                if patch is None or workflow.patched(patch):
                    await asyncio.sleep(1)
                    await asyncio.sleep(1)
                return await super().execute_workflow(input)

        return Pausing


@pytest.mark.parametrize("found", WORKFLOWS, ids=workflow_name)
async def test_a_change_of_any_workflow_is_caught_unless_it_is_patched(found: type) -> None:
    histories = [name for name in SAVED if type_of(name) == workflow_name(found)]
    assert histories
    for name in histories:
        with pytest.raises(workflow.NondeterminismError):
            await replay(name, [found], PauseFirst(None))
        await replay(name, [found], PauseFirst("pause-first"))

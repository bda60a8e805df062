"""The ledger audit, run by a schedule."""

from datetime import timedelta

from temporalio import workflow
from temporalio.common import RetryPolicy

with workflow.unsafe.imports_passed_through():
    from domain.contracts.audit import AUDIT, LEDGER_AUDIT, AuditReport


@workflow.defn(name=LEDGER_AUDIT)
class LedgerAuditWorkflow:
    """Checks the ledger's invariants and keeps the report as its result; what is broken is alerted."""

    @workflow.run
    async def run(self) -> AuditReport:
        """One audit."""
        workflow.set_current_details("Checks every invariant")
        report: AuditReport = await workflow.execute_activity(
            AUDIT,
            result_type=AuditReport,
            start_to_close_timeout=timedelta(minutes=10),
            retry_policy=RetryPolicy(maximum_interval=timedelta(minutes=1), maximum_attempts=5),
            summary="Every invariant of the ledger",
        )
        broken = [check.name for check in report.checks if not check.ok]
        workflow.set_current_details("Clean" if report.ok else f"BROKEN: {', '.join(broken)}")
        return report

"""Names and messages of the workflow that audits the ledger."""

from dataclasses import dataclass

LEDGER_AUDIT = "LedgerAuditWorkflow"
AUDIT = "ledger.audit"


@dataclass(frozen=True)
class AuditCheck:
    """One invariant: whether it holds, and what was found."""

    name: str
    ok: bool
    detail: str


@dataclass(frozen=True)
class AuditReport:
    """All invariants of the ledger at one moment (`checked_at`: ISO-8601 UTC)."""

    ok: bool
    checked_at: str
    checks: list[AuditCheck]

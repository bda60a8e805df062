"""Operations of the exchange's own people."""

from fastapi import APIRouter

from activities.audit import run_audit
from api.gateway import Admin
from api.models import ApiModel
from api.state import State

router = APIRouter(prefix="/api/admin", tags=["admin"])


class CheckView(ApiModel):
    """One invariant. `detail` names offenders, or how much was in motion."""

    name: str
    ok: bool
    detail: str


class AuditView(ApiModel):
    """All invariants of the ledger."""

    ok: bool
    checked_at: str
    checks: list[CheckView]


@router.get("/ledger/audit")
async def audit_ledger(state: State, _: Admin) -> AuditView:
    """Audit the ledger now."""
    report = await run_audit(state.pool)
    checks = [CheckView(name=check.name, ok=check.ok, detail=check.detail) for check in report.checks]
    return AuditView(ok=report.ok, checked_at=report.checked_at, checks=checks)

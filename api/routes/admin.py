"""Operations of the exchange's own people."""

from datetime import UTC, datetime

from fastapi import APIRouter

from activities.ledger.audit import run_audit
from activities.matching.steps import change_state
from api.edge.gateway import Admin
from api.schema.models import ApiModel, SafeText
from api.schema.openapi import problems
from api.state import AppState, State
from domain.clock import to_ms
from domain.matching import TradingState
from domain.problems import Problem

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


class InstrumentStateView(ApiModel):
    """TRADING; CANCEL_ONLY and HALTED take no new orders, and let open ones be cancelled."""

    instrument_id: str
    state: TradingState


@router.post("/instruments/{instrument_id}/halt", responses=problems("INSTRUMENT_NOT_FOUND"))
async def halt(state: State, _: Admin, instrument_id: SafeText) -> InstrumentStateView:
    """Stop trading, marks and liquidations in an instrument."""
    return await _change_state(state, instrument_id, "HALTED")


@router.post("/instruments/{instrument_id}/cancel-only", responses=problems("INSTRUMENT_NOT_FOUND"))
async def cancel_only(state: State, _: Admin, instrument_id: SafeText) -> InstrumentStateView:
    """Take no new orders in an instrument."""
    return await _change_state(state, instrument_id, "CANCEL_ONLY")


@router.post("/instruments/{instrument_id}/resume", responses=problems("INSTRUMENT_NOT_FOUND"))
async def resume(state: State, _: Admin, instrument_id: SafeText) -> InstrumentStateView:
    """Trade again."""
    return await _change_state(state, instrument_id, "TRADING")


async def _change_state(state: AppState, instrument_id: str, wanted: TradingState) -> InstrumentStateView:
    async with state.pool.acquire() as conn, conn.transaction():
        if not await change_state(conn, instrument_id, wanted, to_ms(datetime.now(UTC))):
            raise Problem("INSTRUMENT_NOT_FOUND", f"There is no instrument {instrument_id[:64]!r}")
    return InstrumentStateView(instrument_id=instrument_id, state=wanted)


@router.get("/ledger/audit")
async def audit_ledger(state: State, _: Admin) -> AuditView:
    """Audit the ledger now."""
    report = await run_audit(state.pool)
    checks = [CheckView(name=check.name, ok=check.ok, detail=check.detail) for check in report.checks]
    return AuditView(ok=report.ok, checked_at=report.checked_at, checks=checks)

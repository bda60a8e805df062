"""The insurance fund, the exchange's own accounts, and liquidations, for operators."""

from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic import Field

from activities.ledger.insurance import deposit_to_fund
from activities.ledger.views import read_fund, read_fund_entries, read_system_balances
from activities.liquidation.views import liquidation_view, read_liquidations
from activities.matching.views import require_asset
from api.edge.gateway import Admin
from api.schema.models import ApiModel, Page, RequestModel, SafeText, Timestamp, TransferAmount
from api.schema.paging import PageCursor, PageLimit, next_cursor
from api.state import State
from domain.money import AMOUNT_STEP, plain

router = APIRouter(prefix="/api/admin", tags=["admin"])

MOVEMENTS_SHOWN = 50


class MovementView(ApiModel):
    """One movement of the fund, `amount` signed: paid for losses (INSURANCE_FUND), got from liquidations, deposited."""

    entry_id: int
    entry_type: str
    asset: str
    instrument_id: str | None
    amount: str
    reference_type: str
    reference_id: str
    created_at: Timestamp


class FundView(ApiModel):
    """The fund in one asset. `promised` is claimed by liquidations under way, and not to be had by others."""

    asset: str
    balance: str
    promised: str
    open_claims: int


class InsuranceFundView(ApiModel):
    """The fund per asset, and what moved last, newest first."""

    funds: list[FundView]
    movements: list[MovementView]


class AccountView(ApiModel):
    """Balance of one of the exchange's own accounts; those of users sum up to the opposite."""

    account: str
    asset: str
    balance: str


class FundDeposit(RequestModel):
    """The exchange's own money for the fund. The same `reference` again changes nothing and answers the same."""

    asset: Annotated[str, Field(min_length=1, max_length=16)]
    amount: TransferAmount
    reference: Annotated[str, Field(min_length=1, max_length=128)]


class LiquidationView(ApiModel):
    """One liquidation: PENDING, PROCESSING, PROCESSED or ABORTED. Its workflow is found by `workflowId`."""

    liquidation_id: int
    position_id: str
    user_id: str
    instrument_id: str
    margin_mode: str
    reason: str
    status: str
    workflow_id: str
    created_at: str
    updated_at: str


@router.get("/insurance-fund")
async def insurance_fund(state: State, _: Admin) -> InsuranceFundView:
    """What the insurance fund has, has promised, and has done last."""
    funds = [
        FundView(
            asset=fund.asset,
            balance=plain(fund.balance),
            promised=plain(fund.promised),
            open_claims=fund.open_claims,
        )
        for fund in await read_fund(state.pool)
    ]
    movements = [
        MovementView(
            entry_id=row["entry_id"],
            entry_type=row["entry_type"],
            asset=row["asset"],
            instrument_id=row["instrument_id"],
            amount=plain(row["delta_available"]),
            reference_type=row["reference_type"],
            reference_id=row["reference_id"],
            created_at=row["created_at"],
        )
        for row in await read_fund_entries(state.pool, MOVEMENTS_SHOWN)
    ]
    return InsuranceFundView(funds=funds, movements=movements)


@router.post("/insurance-fund/deposits")
async def deposit(state: State, _: Admin, transfer: FundDeposit) -> FundView:
    """Put money into the insurance fund, once per reference; the fund now."""
    async with state.pool.acquire() as conn, conn.transaction():
        await require_asset(conn, transfer.asset)
        await deposit_to_fund(conn, transfer.reference, transfer.asset, transfer.amount.quantize(AMOUNT_STEP))
        [fund] = [fund for fund in await read_fund(conn) if fund.asset == transfer.asset]
    return FundView(
        asset=fund.asset, balance=plain(fund.balance), promised=plain(fund.promised), open_claims=fund.open_claims
    )


@router.get("/accounts")
async def list_accounts(state: State, _: Admin) -> list[AccountView]:
    """Balances of the exchange's own accounts: fees, insurance fund, clearing, rounding, deposits."""
    return [
        AccountView(account=row["account"], asset=row["asset"], balance=plain(row["balance"]))
        for row in await read_system_balances(state.pool)
    ]


@router.get("/liquidations", response_model=Page[LiquidationView])
async def list_liquidations(
    state: State,
    _: Admin,
    status: Annotated[SafeText | None, Query()] = None,
    limit: PageLimit = 100,
    cursor: PageCursor = None,
) -> dict[str, Any]:
    """Liquidations, newest first."""
    rows = await read_liquidations(state.pool, status, cursor, limit)
    items = [liquidation_view(row) for row in rows]
    return {
        "items": items,
        "nextCursor": next_cursor(items, limit, "liquidationId"),
    }

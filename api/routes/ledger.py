"""Balances and entries of a user; deposits and withdrawals by an operator."""

from decimal import Decimal
from typing import Annotated, Any

import asyncpg
from fastapi import APIRouter, Query
from pydantic import Field

from activities.identity.views import is_user
from activities.ledger import views as ledger_views
from activities.ledger.transfers import transfer_external
from activities.ledger.views import balance_view
from activities.matching.views import require_asset
from activities.risk.unfinished import patiently, refused_with
from api.edge.gateway import Admin, ServedUserId
from api.schema.models import ApiModel, Page, RequestModel, SafeText, Timestamp, TransferAmount, UserId
from api.schema.openapi import problems
from api.schema.paging import PageCursor, PageLimit, next_cursor
from api.state import AppState, State
from domain.money import AMOUNT_STEP, plain
from domain.problems import Problem
from storage.db import Connection

router = APIRouter(prefix="/api/ledger", tags=["ledger"])


class BalanceView(ApiModel):
    """A user's money in one asset; `reserved` backs open orders and positions."""

    asset: str
    available: str
    reserved: str
    total: str


class EntryView(ApiModel):
    """One movement of a user's money. `balanceAfter` is what was available after it."""

    entry_id: int
    entry_type: str
    asset: str
    instrument_id: str | None
    delta_available: str
    delta_reserved: str
    balance_after: str
    reference_type: str
    reference_id: str
    created_at: Timestamp


class Transfer(RequestModel):
    """Money that enters or leaves. The same `reference` again changes nothing and answers the same."""

    user_id: UserId
    asset: Annotated[str, Field(min_length=1, max_length=16)]
    amount: TransferAmount
    reference: Annotated[str, Field(min_length=1, max_length=128)]


class TransferView(ApiModel):
    """A transfer done (now or, with the same reference, before), and the balance now."""

    user_id: str
    asset: str
    amount: str
    reference: str
    balance: BalanceView


@router.get("/balances", response_model=list[BalanceView])
async def list_balances(state: State, user_id: ServedUserId) -> list[dict[str, str]]:
    """Balances of the caller; of anybody for operators."""
    rows = await ledger_views.list_balances(state.pool, user_id)
    return [{"asset": row["asset"], **balance_view(row["available"], row["reserved"])} for row in rows]


@router.get("/entries", response_model=Page[EntryView])
async def list_entries(
    state: State,
    user_id: ServedUserId,
    asset: Annotated[SafeText | None, Query()] = None,
    limit: PageLimit = 100,
    cursor: PageCursor = None,
) -> dict[str, Any]:
    """Entries of the caller (of anybody for operators), newest first."""
    rows = await ledger_views.list_entries(state.pool, user_id, asset=asset, before=cursor, limit=limit)
    items = [
        {
            "entryId": row["entry_id"],
            "entryType": row["entry_type"],
            "asset": row["asset"],
            "instrumentId": row["instrument_id"],
            "deltaAvailable": plain(row["delta_available"]),
            "deltaReserved": plain(row["delta_reserved"]),
            "balanceAfter": plain(row["balance_after"]),
            "referenceType": row["reference_type"],
            "referenceId": row["reference_id"],
            "createdAt": row["created_at"],
        }
        for row in rows
    ]
    return {"items": items, "nextCursor": next_cursor(rows, limit, "entry_id")}


@router.post("/deposits", responses=problems("NOT_FOUND"))
async def deposit(state: State, _: Admin, transfer: Transfer) -> TransferView:
    """Credit a user, once per reference."""
    return await _transfer(state, "DEPOSIT", transfer, transfer.amount)


@router.post("/withdrawals", responses=problems("NOT_FOUND", "INSUFFICIENT_FUNDS"))
async def withdraw(state: State, _: Admin, transfer: Transfer) -> TransferView:
    """Debit a user, once per reference: at most what is available and stands for no loss and no funding due."""
    return await _transfer(state, "WITHDRAWAL", transfer, -transfer.amount)


async def _transfer(state: AppState, kind: str, transfer: Transfer, amount: Decimal) -> TransferView:
    async def transfer_now(conn: Connection) -> asyncpg.Record | None:
        if not await is_user(conn, transfer.user_id):
            raise Problem("NOT_FOUND", f"There is no user {transfer.user_id}")
        await require_asset(conn, transfer.asset)
        await transfer_external(
            conn,
            kind,
            transfer.reference,
            transfer.user_id,
            transfer.asset,
            amount.quantize(AMOUNT_STEP),
        )
        return await ledger_views.find_balance(conn, transfer.user_id, transfer.asset)

    # Money that the user was told is free again may leave.
    row = await patiently(state.pool, int(transfer.user_id), transfer_now, refused_with("INSUFFICIENT_FUNDS"))
    assert row is not None
    balance = BalanceView(asset=transfer.asset, **balance_view(row["available"], row["reserved"]))
    return TransferView(
        user_id=str(transfer.user_id),
        asset=transfer.asset,
        amount=plain(transfer.amount),
        reference=transfer.reference,
        balance=balance,
    )

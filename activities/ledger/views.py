"""What the ledger shows of its tables: a user's balances and the entries behind them, and the insurance fund."""

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal

import asyncpg

from activities.ledger.accounts import INSURANCE_FUND
from domain.money import plain
from storage.db import Connection, Pool


def balance_view(available: Decimal, reserved: Decimal) -> dict[str, str]:
    """A balance as clients see it."""
    return {"available": plain(available), "reserved": plain(reserved), "total": plain(available + reserved)}


@dataclass(frozen=True, slots=True)
class FundState:
    """The fund in one asset: its balance, what of it is promised to liquidations, and how many these are."""

    asset: str
    balance: Decimal
    promised: Decimal
    open_claims: int


async def read_fund(conn: Connection | Pool) -> list[FundState]:
    """The insurance fund per asset."""
    rows = await conn.fetch(
        "SELECT s.asset, s.balance, coalesce(sum(c.amount), 0), count(c.liquidation_id)"
        " FROM ledger.system_balances s LEFT JOIN ledger.insurance_claims c ON c.asset = s.asset AND c.is_open"
        " WHERE s.account = $1 GROUP BY s.asset, s.balance ORDER BY s.asset",
        INSURANCE_FUND,
    )
    return [FundState(*row) for row in rows]


async def read_fund_entries(conn: Connection | Pool, limit: int) -> list[asyncpg.Record]:
    """The last movements of the fund, newest first."""
    return await conn.fetch(
        "SELECT entry_id, entry_type, asset, instrument_id, delta_available, reference_type, reference_id, created_at"
        " FROM ledger.ledger_entries WHERE account = 'exchange:insurance_fund' ORDER BY entry_id DESC LIMIT $1",
        limit,
    )


async def read_system_balances(conn: Connection | Pool) -> list[asyncpg.Record]:
    """Balances of the exchange's own accounts: account, asset, balance."""
    return await conn.fetch("SELECT account, asset, balance FROM ledger.system_balances ORDER BY account, asset")


async def list_balances(conn: Connection | Pool, user_id: int) -> Sequence[asyncpg.Record]:
    """What a user has, `available` and `reserved`, by asset."""
    return await conn.fetch(
        "SELECT asset, available, reserved FROM ledger.ledger_balances WHERE user_id = $1 ORDER BY asset", user_id
    )


async def find_balance(conn: Connection | Pool, user_id: int, asset: str) -> asyncpg.Record | None:
    """What a user has of an asset, `available` and `reserved`; None when there never was any."""
    return await conn.fetchrow(
        "SELECT available, reserved FROM ledger.ledger_balances WHERE user_id = $1 AND asset = $2", user_id, asset
    )


async def list_entries(
    conn: Connection | Pool, user_id: int, *, asset: str | None, before: int | None, limit: int
) -> Sequence[asyncpg.Record]:
    """A user's entries with ids below `before`, newest first."""
    return await conn.fetch(
        "SELECT entry_id, entry_type, asset, instrument_id, delta_available, delta_reserved, balance_after,"
        " reference_type, reference_id, created_at FROM ledger.ledger_entries WHERE user_id = $1"
        " AND ($2::text IS NULL OR asset = $2) AND ($3::bigint IS NULL OR entry_id < $3)"
        " ORDER BY entry_id DESC LIMIT $4",
        user_id,
        asset,
        before,
        limit,
    )

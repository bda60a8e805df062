"""The insurance fund: claims of liquidations on it, deposits by the exchange, and what it has done."""

from dataclasses import dataclass
from decimal import Decimal

import asyncpg
from temporalio import activity

from activities.ledger.steps import DEPOSITS, INSURANCE_FUND, SHORTFALL, Book, write_book
from domain.liquidation_saga import CLAIM_INSURANCE, RELEASE_INSURANCE, Claim
from domain.money import ZERO, plain, round_down
from domain.problems import Problem
from storage.db import Connection, Pool
from storage.once import first_result, store_result

# Names the deposit that the fund starts with: once per database.
SEED_REFERENCE = "seed"
DEPOSIT = "INSURANCE_FUND_DEPOSIT"


class InsuranceActivities:
    """Activities on the ledger service's own tables."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    @activity.defn(name=CLAIM_INSURANCE)
    async def claim(self, claim: Claim) -> str:
        """What the fund grants (quote, up to what is asked for): its balance less what it has promised to others."""
        async with self._pool.acquire() as conn, conn.transaction():
            return plain(await _claim(conn, claim))

    @activity.defn(name=RELEASE_INSURANCE)
    async def release(self, liquidation_id: int) -> None:
        """The claims of a liquidation end; what it needed is booked."""
        async with self._pool.acquire() as conn, conn.transaction():
            await _release(conn, liquidation_id)


async def _claim(conn: Connection, claim: Claim) -> Decimal:
    # The fund's row, locked: two claims cannot both see the same money.
    balance = await _lock_fund(conn, claim.asset)
    granted: Decimal | None = await conn.fetchval(
        "SELECT amount FROM ledger.insurance_claims WHERE liquidation_id = $1 AND round = $2",
        claim.liquidation_id,
        claim.round,
    )
    if granted is not None:
        return granted
    await _release(conn, claim.liquidation_id)
    promised = await conn.fetchval(
        "SELECT coalesce(sum(amount), 0) FROM ledger.insurance_claims WHERE asset = $1 AND is_open", claim.asset
    )
    granted = round_down(max(ZERO, min(Decimal(claim.amount), balance - promised)))
    await conn.execute(
        "INSERT INTO ledger.insurance_claims (liquidation_id, round, asset, amount, quantity, mark_price,"
        " bankruptcy_price) VALUES ($1, $2, $3, $4, $5, $6, $7)",
        claim.liquidation_id,
        claim.round,
        claim.asset,
        granted,
        Decimal(claim.quantity),
        Decimal(claim.mark),
        Decimal(claim.bankruptcy_price),
    )
    return granted


async def _lock_fund(conn: Connection, asset: str) -> Decimal:
    balance: Decimal | None = await conn.fetchval(
        "SELECT balance FROM ledger.system_balances WHERE account = $1 AND asset = $2 FOR UPDATE", INSURANCE_FUND, asset
    )
    return ZERO if balance is None else balance


async def _lock_shortfall(conn: Connection, asset: str) -> Decimal:
    """What the fund could not pay so far (>= 0)."""
    # Locked in the order in which `write_book` does it.
    rows = await conn.fetch(
        "SELECT account, balance FROM ledger.system_balances WHERE account = ANY($1::text[]) AND asset = $2"
        " ORDER BY account FOR UPDATE",
        [INSURANCE_FUND, SHORTFALL],
        asset,
    )
    return -sum((row["balance"] for row in rows if row["account"] == SHORTFALL), ZERO)


async def _release(conn: Connection, liquidation_id: int) -> None:
    await conn.execute(
        "UPDATE ledger.insurance_claims SET is_open = FALSE, updated_at = now() WHERE liquidation_id = $1 AND is_open",
        liquidation_id,
    )


async def deposit_to_fund(conn: Connection, reference: str, asset: str, amount: Decimal) -> bool:
    """Put the exchange's own money into the fund, once per reference; False when it was done before.

    What the fund could not pay before is made good with it first.

    Raises Problem VALIDATION_FAILED when `amount` is not above 0 or has more than 8 decimals, or the reference was used
    for something else.
    """
    if amount <= ZERO or amount != round_down(amount):
        raise Problem("VALIDATION_FAILED", f"Expected an amount above 0 with at most 8 decimals, was {amount}")
    # The same reference at the same time waits here and then sees the result.
    await conn.execute("SELECT pg_advisory_xact_lock(hashtextextended($1, 0))", f"{DEPOSIT}:{reference}")
    step_id = f"{DEPOSIT}:{reference}"
    earlier = await first_result(conn, "ledger", step_id, tuple[str, Decimal])
    if earlier is not None:
        if earlier != (asset, amount):
            raise Problem("VALIDATION_FAILED", f"Reference {reference} was used for another deposit")
        return False
    book = Book()
    book.open_journal(DEPOSIT, reference)
    book.post_system(INSURANCE_FUND, asset, DEPOSIT, amount)
    book.post_system(DEPOSITS, asset, DEPOSIT, -amount)
    covered = min(amount, await _lock_shortfall(conn, asset))
    if covered:
        book.post_system(INSURANCE_FUND, asset, "SHORTFALL_COVERED", -covered)
        book.post_system(SHORTFALL, asset, "SHORTFALL_COVERED", covered)
    await write_book(conn, book, {})
    await store_result(conn, "ledger", step_id, (asset, amount))
    return True


async def seed_fund(conn: Connection, asset: str, amount: Decimal) -> None:
    """What the fund starts with; later, and for an amount of 0, nothing happens."""
    seeded = await first_result(conn, "ledger", f"{DEPOSIT}:{SEED_REFERENCE}", tuple[str, Decimal])
    if amount and seeded is None:
        await deposit_to_fund(conn, SEED_REFERENCE, asset, amount)


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

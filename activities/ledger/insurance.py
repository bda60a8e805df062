"""The insurance fund: claims of liquidations on it, what it gives and gets, and deposits by the exchange."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from decimal import Decimal

from activities.ledger.accounts import DEPOSITS, INSURANCE_FUND, SHORTFALL
from activities.ledger.book import Book, write_book
from domain.events import InsuranceFundRequired
from domain.liquidation_saga import Claim
from domain.money import ZERO, plain, round_down
from domain.problems import Problem
from domain.wallet import Settled
from storage.db import Connection
from storage.once import first_result, store_result
from telemetry.alerts import INSURANCE_SHORTFALL, alert

INSURANCE = "INSURANCE_FUND"
# Names the deposit that the fund starts with: once per database.
SEED_REFERENCE = "seed"
DEPOSIT = "INSURANCE_FUND_DEPOSIT"


@dataclass(frozen=True, slots=True)
class Cause:
    """What makes users need the insurance fund, or pay to it: SETTLEMENT or FUNDING_FEE, and in what."""

    reference_type: str
    reference_id: str
    instrument_id: str
    asset: str


async def post_insurance(
    conn: Connection, book: Book, cause: Cause, settled: Mapping[int, Settled], liquidated: Collection[int] = ()
) -> None:
    """A journal of what the insurance fund gave to users and got from them.

    The fund gives no more than it has; what is missing the account SHORTFALL gives, and an operator is called. Each
    draw is written down with the liquidation that justifies it, which only those who are `liquidated` have.
    """
    asset = cause.asset
    book.open_journal(INSURANCE, cause.reference_id)
    for user_id, of_user in settled.items():
        for entry_type, amount in (
            ("LIQUIDATION_FEE", of_user.liquidation_fee),
            ("LIQUIDATION_SURPLUS", of_user.surplus),
        ):
            _between(book, user_id, INSURANCE_FUND, cause, entry_type, -amount)
    draws = {user_id: of_user.insurance for user_id, of_user in settled.items() if of_user.insurance}
    if not draws:
        return
    left = await _lock_up_to_fund(conn, asset) + book.system.get((INSURANCE_FUND, asset), ZERO)
    for user_id, amount in draws.items():
        given = min(amount, max(ZERO, left))
        left -= given
        _between(book, user_id, INSURANCE_FUND, cause, "INSURANCE_FUND", given)
        _between(book, user_id, SHORTFALL, cause, "SHORTFALL", amount - given)
        book.events.append(
            InsuranceFundRequired(
                user_id=str(user_id), instrument_id=cause.instrument_id, asset=asset, amount=plain(amount)
            )
        )
        if given < amount:
            alert(INSURANCE_SHORTFALL, "insurance fund lacks %s %s for user %d", plain(amount - given), asset, user_id)
    await _write_draws(conn, cause, draws, liquidated)


def _between(book: Book, user_id: int, account: str, cause: Cause, entry_type: str, amount: Decimal) -> None:
    """Give `amount` from a system account to a user; below zero the other way."""
    if amount:
        book.post_user(user_id, cause.asset, entry_type, amount, instrument_id=cause.instrument_id)
        book.post_system(account, cause.asset, entry_type, -amount)


async def _lock_up_to_fund(conn: Connection, asset: str) -> Decimal:
    """What the insurance fund has, locked; so are the accounts that `write_book` locks before it."""
    rows = await conn.fetch(
        "SELECT account, balance FROM ledger.system_balances WHERE account <= $1 AND asset = $2"
        " ORDER BY account FOR UPDATE",
        INSURANCE_FUND,
        asset,
    )
    return sum((row["balance"] for row in rows if row["account"] == INSURANCE_FUND), ZERO)


async def _write_draws(
    conn: Connection, cause: Cause, draws: Mapping[int, Decimal], liquidated: Collection[int]
) -> None:
    await conn.execute(
        "INSERT INTO ledger.insurance_draws (reference_type, reference_id, user_id, instrument_id, asset, amount,"
        " liquidation_id, round, mark_price, bankruptcy_price)"
        " SELECT $1, $2, d.user_id, $3, $4, d.amount, q.liquidation_id, k.round, k.mark_price, k.bankruptcy_price"
        " FROM unnest($5::bigint[], $6::numeric[]) AS d (user_id, amount)"
        " LEFT JOIN risk.v_liquidations q ON q.user_id = d.user_id AND q.instrument_id = $3"
        "   AND q.status = 'PROCESSING' AND q.user_id = ANY($7::bigint[])"
        " LEFT JOIN LATERAL (SELECT round, mark_price, bankruptcy_price FROM ledger.insurance_claims c"
        "   WHERE c.liquidation_id = q.liquidation_id ORDER BY round DESC LIMIT 1) k ON TRUE",
        cause.reference_type,
        cause.reference_id,
        cause.instrument_id,
        cause.asset,
        list(draws),
        list(draws.values()),
        list(liquidated),
    )


async def claim_insurance(conn: Connection, claim: Claim) -> Decimal:
    """Promise to a round of a liquidation what is asked for, or what the fund has not promised to others (quote)."""
    # The fund's row, locked: two claims cannot both see the same money.
    balance = await _lock_fund(conn, claim.asset)
    granted: Decimal | None = await conn.fetchval(
        "SELECT amount FROM ledger.insurance_claims WHERE liquidation_id = $1 AND round = $2",
        claim.liquidation_id,
        claim.round,
    )
    if granted is not None:
        return granted
    await release_insurance(conn, claim.liquidation_id)
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


async def release_insurance(conn: Connection, liquidation_id: int) -> None:
    """End the claims of a liquidation."""
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

"""Deposits and withdrawals."""

from decimal import Decimal

from activities.ledger.accounts import DEPOSITS
from activities.ledger.book import open_book, write_book
from activities.risk.collateral import read_collateral
from activities.risk.cover import tell_covers_again
from domain.money import plain, round_down
from domain.problems import Problem
from storage.db import Connection
from storage.once import first_result, store_result


async def transfer_external(
    conn: Connection,
    reference_type: str,
    reference: str,
    user_id: int,
    asset: str,
    amount: Decimal,
) -> bool:
    """Deposit (`amount` > 0) or withdraw (< 0) once per (reference_type, reference); False when it was done before.

    Raises Problem INSUFFICIENT_FUNDS when a withdrawal exceeds the free collateral, VALIDATION_FAILED when `amount` is
    0 or has more than 8 decimals, or the reference was used for something else.
    """
    if not amount or amount != round_down(amount):
        raise Problem("VALIDATION_FAILED", f"Expected an amount other than 0 with at most 8 decimals, was {amount}")
    # The lock on the balance comes first: a repeat that runs at the same time waits for it and then sees the result.
    book = await open_book(conn, [(user_id, asset)])
    step_id = f"{reference_type}:{reference}"
    earlier = await first_result(conn, "ledger", step_id, tuple[int, str, Decimal])
    if earlier is not None:
        if earlier != (user_id, asset, amount):
            raise Problem("VALIDATION_FAILED", f"Reference {reference} was used for another transfer")
        return False
    if amount < 0 and not (await read_collateral(conn, [user_id]))[user_id, asset].covers(-amount):
        raise Problem("INSUFFICIENT_FUNDS", f"Available {asset} does not cover {plain(-amount)}")
    book.open_journal(reference_type, reference)
    book.post_user(user_id, asset, reference_type, amount)
    book.post_system(DEPOSITS, asset, reference_type, -amount)
    await write_book(conn, book, {})
    if amount < 0:
        await tell_covers_again(conn, [user_id])
    await store_result(conn, "ledger", step_id, (user_id, asset, amount))
    return True

"""Funding in the books: a settlement is opened, its payments are booked page by page, and it is closed."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal

from activities.ledger.accounts import FUNDING, ROUNDING
from activities.ledger.book import Book, Hold, draw_from, holds_of, open_book, write_book
from activities.ledger.insurance import Cause, post_insurance
from activities.ledger.margin_commands import announce, await_engine, await_liquidations, read_announced, tell_engine
from domain.funding import FUNDING_PAGE, Charge, FundingPage, FundingRun, FundingTotals, Holding, charge
from domain.money import ZERO, plain
from domain.sagas import Uncovered
from domain.wallet import Settled, Wallet
from storage.db import Connection
from storage.once import NotYetError

FUNDING_FEE = "FUNDING_FEE"
# No user id is greater.
ALL_USERS = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Untold:
    """Nothing was paid: the engine had to be told first."""


async def open_funding(conn: Connection, run: FundingRun) -> bool:
    """Fix rate and price of a settlement; False once it is closed. Raises NotYetError while there is no rate."""
    await conn.execute(
        "INSERT INTO ledger.funding_runs (instrument_id, funding_time, asset, rate, mark_price)"
        " SELECT r.instrument_id, r.effective_at, i.quote_asset, r.rate, r.mark_price FROM market.v_funding_rates r"
        " JOIN matching.v_instruments i USING (instrument_id) WHERE instrument_id = $1 AND r.effective_at = $2"
        " ON CONFLICT DO NOTHING",
        run.instrument_id,
        run.time,
    )
    status = await conn.fetchval(
        "SELECT status FROM ledger.funding_runs WHERE instrument_id = $1 AND funding_time = $2",
        run.instrument_id,
        run.time,
    )
    if status is None:
        raise NotYetError(f"The market has no funding rate of {run.instrument_id} at {run.funding_time} yet")
    return bool(status == "OPEN")


async def settle_page(conn: Connection, page: FundingPage) -> int | Untold | None:
    """Book a page of payments; where the next one starts, None at the end, `Untold` when nothing was paid yet."""
    run = page.run
    asset = await conn.fetchval(
        "SELECT asset FROM ledger.funding_runs WHERE instrument_id = $1 AND funding_time = $2",
        run.instrument_id,
        run.time,
    )
    rows = await conn.fetch(
        "SELECT user_id, payment FROM positions.v_funding_positions"
        " WHERE instrument_id = $1 AND funding_time = $2 AND user_id > $3 ORDER BY user_id LIMIT $4",
        run.instrument_id,
        run.time,
        page.after_user_id,
        FUNDING_PAGE,
    )
    payments = [(row[0], row[1]) for row in rows if row[1]]
    if payments and not await _book_funding(conn, page, asset, payments):
        return Untold()
    next_user_id: int | None = rows[-1][0] if len(rows) == FUNDING_PAGE else None
    # In the transaction that books the page: no payment counts as owed and as paid, or as neither.
    await conn.execute(
        "UPDATE ledger.funding_runs SET collected_user_id = greatest(collected_user_id, $3)"
        " WHERE instrument_id = $1 AND funding_time = $2",
        run.instrument_id,
        run.time,
        ALL_USERS if next_user_id is None else next_user_id,
    )
    return next_user_id


async def _book_funding(
    conn: Connection, page: FundingPage, asset: str, payments: Sequence[tuple[int, Decimal]]
) -> bool:
    """Book the payments of a page, once; False when nothing is paid yet, as the engine had to be told of it first."""
    run, reference_id = page.run, f"{page.run.reference}:{page.after_user_id}"
    book = await open_book(conn, ((user_id, asset) for user_id, _ in payments))
    # Asked for under the locks: a repeat that runs at the same time waits for them and then sees the journal.
    if await conn.fetchval(
        "SELECT EXISTS (SELECT FROM ledger.journals WHERE reference_type = $1 AND reference_id = $2)",
        FUNDING_FEE,
        reference_id,
    ):
        return True
    payers = {user_id: -payment for user_id, payment in payments if payment < ZERO}
    # All that is held for whom what is available does not do: it is locked with the balances.
    short = [user_id for user_id, owed in payers.items() if owed > book.accounts[user_id, asset].available]
    holds = await holds_of(conn, short, asset)
    sources = {
        user_id: _source(owed, book.accounts[user_id, asset].available, run.instrument_id, holds.get(user_id, {}))
        for user_id, owed in payers.items()
    }
    lowered = {
        (user_id, draw.instrument_id): draw.position_margin
        for user_id, source in sources.items()
        for draw in source.draws
        if draw.position_margin
    }
    announced = await read_announced(conn, reference_id)
    if untold := announced.beyond(lowered):
        await announce(conn, reference_id, announced.times, untold)
        return False
    for instrument_id, command_seq in sorted(announced.command_seqs.items()):
        await await_engine(conn, instrument_id, command_seq)
    await await_liquidations(conn, payers, lowered)
    book.open_journal(FUNDING_FEE, reference_id)
    touched = _post_payments(book, run.instrument_id, asset, payments, sources, holds)
    paid = sum(payers.values(), ZERO)
    received = sum((payment for _, payment in payments if payment > ZERO), ZERO)
    if paid != received:
        book.post_system(FUNDING, asset, "FUNDING", paid - received)
    drawn = {user_id: Settled(Wallet(), source.insurance) for user_id, source in sources.items()}
    await post_insurance(conn, book, Cause(FUNDING_FEE, reference_id, run.instrument_id, asset), drawn)
    await conn.execute(
        "UPDATE ledger.funding_runs SET paid = paid + $3, received = received + $4, insurance = insurance + $5,"
        " updated_at = now() WHERE instrument_id = $1 AND funding_time = $2",
        run.instrument_id,
        run.time,
        paid,
        received,
        sum((source.insurance for source in sources.values()), ZERO),
    )
    await write_book(conn, book, touched)
    # What was announced and is not needed, as other money has come in since, backs the position again.
    if spared := announced.spared(lowered):
        await tell_engine(conn, spared)
    return True


def _post_payments(
    book: Book,
    instrument_id: str,
    asset: str,
    payments: Sequence[tuple[int, Decimal]],
    sources: Mapping[int, Charge],
    holds: Mapping[int, Mapping[str, Hold]],
) -> dict[tuple[int, str], Hold]:
    """Post what users pay and get, and what payers need of their holds for it; the holds that this touches."""
    touched: dict[tuple[int, str], Hold] = {}
    for user_id, payment in payments:
        for draw in sources[user_id].draws if payment < ZERO else ():
            touched[user_id, draw.instrument_id] = hold = holds[user_id][draw.instrument_id]
            draw_from(book, (user_id, draw.instrument_id), hold, draw)
        book.post_user(user_id, asset, "FUNDING", payment, instrument_id=instrument_id)
    return touched


def _source(owed: Decimal, available: Decimal, instrument_id: str, held: Mapping[str, Hold]) -> Charge:
    holdings = [Holding(name, hold.order_margin, hold.position_margin) for name, hold in held.items()]
    return charge(owed, available, instrument_id, holdings)


async def funding_uncovered(conn: Connection, page: FundingPage) -> list[Uncovered]:
    """Payers of a page whose open orders are not covered in full, by instrument."""
    rows = await conn.fetch(
        "SELECT h.instrument_id, h.user_id FROM ledger.margin_holds h JOIN (SELECT user_id, payment"
        "   FROM positions.v_funding_positions WHERE instrument_id = $1 AND funding_time = $2 AND user_id > $3"
        "   ORDER BY user_id LIMIT $4) paid USING (user_id)"
        " WHERE h.order_short > 0 AND paid.payment < 0 ORDER BY 1, 2",
        page.run.instrument_id,
        page.run.time,
        page.after_user_id,
        FUNDING_PAGE,
    )
    users: defaultdict[str, list[int]] = defaultdict(list)
    for row in rows:
        users[row["instrument_id"]].append(row["user_id"])
    return [Uncovered(instrument_id, user_ids) for instrument_id, user_ids in users.items()]


async def close_funding(conn: Connection, run: FundingRun) -> FundingTotals:
    """Book what rounding left over, once, and sum the settlement up."""
    row = await conn.fetchrow(
        "SELECT asset, status, paid, received FROM ledger.funding_runs"
        " WHERE instrument_id = $1 AND funding_time = $2 FOR UPDATE",
        run.instrument_id,
        run.time,
    )
    assert row is not None, f"Expected {run} to be open"
    if row["status"] == "OPEN":
        dust = row["paid"] - row["received"]
        if dust:
            book = Book()
            book.open_journal(FUNDING_FEE, f"{run.reference}:rounding")
            book.post_system(FUNDING, row["asset"], "ROUNDING", -dust)
            book.post_system(ROUNDING, row["asset"], "ROUNDING", dust)
            await write_book(conn, book, {})
        await conn.execute(
            "UPDATE ledger.funding_runs r SET status = 'DONE', updated_at = now(), positions = (SELECT count(*)"
            "  FROM positions.v_funding_positions p WHERE (p.instrument_id, p.funding_time) = ($1, $2))"
            " WHERE r.instrument_id = $1 AND r.funding_time = $2",
            run.instrument_id,
            run.time,
        )
        await _advance_funding(conn, run.instrument_id)
    totals = await conn.fetchrow(
        "SELECT positions, paid, received, insurance FROM ledger.funding_runs"
        " WHERE instrument_id = $1 AND funding_time = $2",
        run.instrument_id,
        run.time,
    )
    assert totals is not None
    return FundingTotals(totals["positions"], *(plain(totals[name]) for name in ("paid", "received", "insurance")))


async def _advance_funding(conn: Connection, instrument_id: str) -> None:
    """Move on to the last settled funding time before which no published rate is unsettled."""
    await conn.execute(
        "INSERT INTO ledger.funding_cursors AS c (instrument_id, collected_at)"
        " SELECT $1, settled.at FROM (SELECT max(funding_time) AS at FROM ledger.funding_runs"
        "   WHERE instrument_id = $1 AND status = 'DONE' AND funding_time < coalesce("
        "     (SELECT min(r.effective_at) FROM market.v_funding_rates r"
        "      LEFT JOIN ledger.funding_runs u ON u.instrument_id = r.instrument_id AND u.funding_time = r.effective_at"
        "      WHERE r.instrument_id = $1 AND u.status IS DISTINCT FROM 'DONE' AND r.effective_at > coalesce("
        "        (SELECT collected_at FROM ledger.funding_cursors WHERE instrument_id = $1), '-infinity')),"
        "     'infinity')) settled WHERE settled.at IS NOT NULL"
        " ON CONFLICT (instrument_id) DO UPDATE SET collected_at = greatest(c.collected_at, excluded.collected_at)",
        instrument_id,
    )

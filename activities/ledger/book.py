"""Double-entry bookkeeping: journals that are being written, over balances and holds that are locked.

A journal is named by (reference_type, reference_id), which can exist once. Its rows sum to zero per asset: a user's
row carries two postings (available and reserved), a system account's row one. Balances are updated in the same
transaction, from the same rows.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal

import asyncpg

from activities.ledger.rows import BalanceRow, EntryRow, HoldRow, JournalRow, SystemRow
from activities.ledger.views import balance_view
from domain.events import BusinessEvent, LedgerEntryCreated
from domain.funding import Holding
from domain.money import ZERO, plain
from domain.wallet import Wallet
from storage import outbox
from storage.db import Connection, columns
from storage.outbox import UserPush
from storage.rows import assignments, batch, column_list, unnest

_SET_BALANCES = f"""
    UPDATE ledger.ledger_balances b SET {assignments(BalanceRow, without=["user_id", "asset"])}, updated_at = now()
    FROM {unnest(BalanceRow)} WHERE b.user_id = n.user_id AND b.asset = n.asset
"""
_SET_HOLDS = f"""
    INSERT INTO ledger.margin_holds ({column_list(HoldRow)}) SELECT * FROM {unnest(HoldRow)}
    ON CONFLICT (user_id, instrument_id)
    DO UPDATE SET {assignments(HoldRow, source="excluded", without=["user_id", "instrument_id", "asset"])}
"""
_ADD_TO_SYSTEM = f"""
    INSERT INTO ledger.system_balances AS s ({column_list(SystemRow)}) SELECT * FROM {unnest(SystemRow)}
    ON CONFLICT (account, asset) DO UPDATE SET balance = s.balance + excluded.balance, updated_at = now()
"""


@dataclass(slots=True)
class Account:
    """A user's balance in one asset while a batch is worked on."""

    available: Decimal = ZERO
    reserved: Decimal = ZERO


@dataclass(slots=True)
class Hold:
    """What is held for one instrument while a batch is worked on (see `domain.wallet.Wallet`)."""

    asset: str
    order_margin: Decimal = ZERO
    position_margin: Decimal = ZERO
    order_short: Decimal = ZERO
    # Counts the changes of `position_margin`: whoever copied it knows by this which one.
    margin_version: int = 0


@dataclass(slots=True)
class Book:
    """Journals being written, over balances that are locked: rows and balances cannot come apart."""

    accounts: dict[tuple[int, str], Account] = field(default_factory=dict)
    system: dict[tuple[str, str], Decimal] = field(default_factory=dict)
    journals: list[JournalRow] = field(default_factory=list)
    entries: list[EntryRow] = field(default_factory=list)
    events: list[BusinessEvent] = field(default_factory=list)
    _reference: JournalRow = field(default_factory=lambda: JournalRow("", ""))
    _sums: dict[str, Decimal] = field(default_factory=dict)

    def open_journal(self, reference_type: str, reference_id: str) -> None:
        """Start a journal; the rows that follow belong to it."""
        self.close_journal()
        self._reference = JournalRow(reference_type, reference_id)
        self.journals.append(self._reference)

    def close_journal(self) -> None:
        """Raises AssertionError when the open journal does not sum to zero in every asset."""
        assert not any(self._sums.values()), f"Expected journal {tuple(self._reference)} to sum to 0, was {self._sums}"
        self._sums.clear()

    def post_user(
        self,
        user_id: int,
        asset: str,
        entry_type: str,
        available: Decimal,
        reserved: Decimal = ZERO,
        instrument_id: str | None = None,
    ) -> None:
        """One row of a user: what `available` and `reserved` change by."""
        account = self.accounts[user_id, asset]
        account.available += available
        account.reserved += reserved
        self._sums[asset] = self._sums.get(asset, ZERO) + available + reserved
        self.entries.append(
            EntryRow(
                reference_type=self._reference.reference_type,
                reference_id=self._reference.reference_id,
                entry_type=entry_type,
                account=f"user:{user_id}",
                user_id=user_id,
                asset=asset,
                instrument_id=instrument_id,
                delta_available=available,
                delta_reserved=reserved,
                balance_after=account.available,
            )
        )
        self.events.append(
            LedgerEntryCreated(
                user_id=str(user_id),
                instrument_id=instrument_id,
                asset=asset,
                delta_available=plain(available),
                delta_reserved=plain(reserved),
                balance_after=plain(account.available),
                entry_type=entry_type,
                reference_type=self._reference.reference_type,
                reference_id=self._reference.reference_id,
            )
        )

    def post_system(self, account: str, asset: str, entry_type: str, amount: Decimal) -> None:
        """One row of a system account; no running balance, since all instruments book on these at the same time."""
        self.system[account, asset] = self.system.get((account, asset), ZERO) + amount
        self._sums[asset] = self._sums.get(asset, ZERO) + amount
        self.entries.append(
            EntryRow(
                reference_type=self._reference.reference_type,
                reference_id=self._reference.reference_id,
                entry_type=entry_type,
                account=account,
                user_id=None,
                asset=asset,
                instrument_id=None,
                delta_available=amount,
                delta_reserved=ZERO,
                balance_after=None,
            )
        )


def draw_from(book: Book, key: tuple[int, str], hold: Hold, draw: Holding) -> None:
    """Release what a payment takes of a hold. What orders require stays: they are uncovered, and cancelled for it."""
    hold.order_margin -= draw.order_margin
    hold.order_short += draw.order_margin
    hold.position_margin -= draw.position_margin
    hold.margin_version += draw.position_margin > ZERO
    taken = draw.total
    book.post_user(key[0], hold.asset, "MARGIN", taken, -taken, key[1])


async def holds_of(conn: Connection, user_ids: Sequence[int], asset: str) -> dict[int, dict[str, Hold]]:
    """All holds of users in one asset, by instrument; their balances are locked already, which locks these too."""
    holds: defaultdict[int, dict[str, Hold]] = defaultdict(dict)
    if user_ids:
        for row in await conn.fetch(
            "SELECT * FROM ledger.margin_holds WHERE user_id = ANY($1) AND asset = $2", user_ids, asset
        ):
            holds[row["user_id"]][row["instrument_id"]] = _hold(row)
    return holds


def set_hold(book: Book, key: tuple[int, str], hold: Hold, wallet: Wallet, entry_type: str = "MARGIN") -> None:
    """Post what `wallet` holds more or less than `hold`, and make the hold equal to it."""
    change = wallet.reserved - hold.order_margin - hold.position_margin
    if change:
        book.post_user(key[0], hold.asset, entry_type, -change, change, key[1])
    hold.margin_version += wallet.position_margin != hold.position_margin
    hold.order_margin, hold.position_margin = wallet.order_margin, wallet.position_margin
    hold.order_short = wallet.order_short


def wallet_of(account: Account, hold: Hold) -> Wallet:
    """A user's money as `domain.wallet` divides it: what is available, and what one hold keeps."""
    return Wallet(account.available, hold.order_margin, hold.position_margin, hold.order_short)


async def open_book(conn: Connection, owners: Iterable[tuple[int, str]]) -> Book:
    """A book over the balances of `owners`, created when missing and locked in (user, asset) order."""
    rows = sorted(set(owners))
    await conn.execute(
        "INSERT INTO ledger.ledger_balances (user_id, asset) SELECT * FROM unnest($1::bigint[], $2::text[])"
        " ON CONFLICT DO NOTHING",
        *columns(rows, 2),
    )
    balances = await conn.fetch(
        "SELECT b.user_id, b.asset, b.available, b.reserved FROM ledger.ledger_balances b"
        " JOIN unnest($1::bigint[], $2::text[]) AS k (user_id, asset) USING (user_id, asset)"
        " ORDER BY b.user_id, b.asset FOR UPDATE OF b",
        *columns(rows, 2),
    )
    return Book({(row[0], row[1]): Account(row[2], row[3]) for row in balances})


async def lock_money(
    conn: Connection, user_id: int, instrument_id: str, asset: str
) -> tuple[Decimal, Decimal, Decimal]:
    """What of a user's money is available, and held for orders and for the position in an instrument (quote), locked
    until the caller's transaction ends: a liquidation counts on it (see `margin_commands.await_liquidations`)."""
    book = await open_book(conn, [(user_id, asset)])
    hold = (await lock_holds(conn, [(user_id, instrument_id, asset)]))[user_id, instrument_id]
    return book.accounts[user_id, asset].available, hold.order_margin, hold.position_margin


async def lock_holds(conn: Connection, keys: Sequence[tuple[int, str, str]]) -> dict[tuple[int, str], Hold]:
    """Holds of (user, instrument, asset); their users' balances are locked already, which locks these too."""
    rows = await conn.fetch(
        "SELECT h.* FROM ledger.margin_holds h JOIN unnest($1::bigint[], $2::text[]) AS k (user_id, instrument_id)"
        " USING (user_id, instrument_id)",
        *columns([key[:2] for key in keys], 2),
    )
    holds = {(user_id, instrument_id): Hold(asset) for user_id, instrument_id, asset in keys}
    for row in rows:
        holds[row["user_id"], row["instrument_id"]] = _hold(row)
    return holds


def _hold(row: asyncpg.Record) -> Hold:
    return Hold(row["asset"], row["order_margin"], row["position_margin"], row["order_short"], row["margin_version"])


async def write_book(conn: Connection, book: Book, holds: dict[tuple[int, str], Hold]) -> None:
    """Write journals, entries, balances, holds and events of a finished book."""
    book.close_journal()
    used = {(entry.reference_type, entry.reference_id) for entry in book.entries}
    journals = [journal for journal in book.journals if journal in used]
    await conn.copy_records_to_table("journals", schema_name="ledger", columns=JournalRow._fields, records=journals)
    await conn.copy_records_to_table(
        "ledger_entries", schema_name="ledger", columns=EntryRow._fields, records=book.entries
    )
    balances = [BalanceRow(*key, a.available, a.reserved) for key, a in book.accounts.items()]
    await conn.execute(_SET_BALANCES, *batch(BalanceRow, balances))
    await conn.execute(_SET_HOLDS, *batch(HoldRow, [_hold_row(key, hold) for key, hold in holds.items()]))
    # Last, because everybody's fees end here: the row lock is held for as short as can be. Sorted against deadlocks.
    if book.system:
        changes = [SystemRow(*key, amount) for key, amount in sorted(book.system.items())]
        await conn.execute(_ADD_TO_SYSTEM, *batch(SystemRow, changes))
    pushes = [
        UserPush(user_id, "balance", {"asset": asset, **balance_view(account.available, account.reserved)})
        for (user_id, asset), account in book.accounts.items()
    ]
    await outbox.emit(conn, book.events, pushes)


def _hold_row(key: tuple[int, str], hold: Hold) -> HoldRow:
    return HoldRow(
        user_id=key[0],
        instrument_id=key[1],
        asset=hold.asset,
        order_margin=hold.order_margin,
        position_margin=hold.position_margin,
        order_short=hold.order_short,
        margin_version=hold.margin_version,
    )

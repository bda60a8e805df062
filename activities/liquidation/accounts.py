"""Cross accounts: all positions of a user in one asset, and what stands behind them together."""

from collections import defaultdict
from collections.abc import Mapping, Set
from dataclasses import dataclass
from decimal import Decimal

from activities.liquidation.rows import CrossPositionRow
from activities.liquidation.sql import CROSS_POSITIONS
from domain.liquidation import Holding
from domain.money import ZERO
from storage.db import Connection, Pool

Marks = Mapping[str, Decimal]


@dataclass(frozen=True, slots=True)
class Account:
    """A user's cross positions in one asset, valued at the last marks, and what stands behind them all (quote).

    `live`: the instruments whose mark is live; nothing is closed in others, nor where trading stands still.
    """

    rows: list[CrossPositionRow]
    live: Set[str]

    @property
    def equity(self) -> Decimal:
        """Available, held for cross instruments, and unrealised."""
        held = sum((row.held + row.pnl for row in self.rows), ZERO)
        return self.rows[0].available + self.rows[0].idle_held + held

    @property
    def maintenance(self) -> Decimal:
        """Maintenance margin of all positions."""
        return sum((row.maintenance for row in self.rows), ZERO)

    @property
    def is_unsettled(self) -> bool:
        """Whether its equity is in between: fills are in the positions, and perhaps not in the ledger yet."""
        return any(row.unsettled for row in self.rows)

    @property
    def is_due(self) -> bool:
        """Whether equity is down to the maintenance margin."""
        return self.equity <= self.maintenance

    def can_close(self, row: CrossPositionRow) -> bool:
        """Whether a position can be closed now."""
        return row.state == "TRADING" and row.instrument_id in self.live

    def next_to_close(self) -> CrossPositionRow | None:
        """The position with the largest maintenance margin of those that can be closed now; None if none can.

        Those whose loss the account can pay come first: of one that is paid for by the profit of another, the insurance
        fund would have to advance what that brings in later.
        """
        rows = [row for row in self.rows if self.can_close(row)]
        order = [(self.holding(row.instrument_id).margin + row.pnl >= ZERO, row.maintenance) for row in rows]
        return max(zip(order, rows, strict=True), key=lambda pair: pair[0])[1] if rows else None

    def backing(self, row: CrossPositionRow) -> Decimal:
        """What one position may lose until the account is due, and its own maintenance margin."""
        own = row.pnl - row.maintenance
        return self.equity - self.maintenance - own

    def money(self, instrument_id: str) -> Decimal:
        """What the ledger takes from when it books fills of one position: available, and held for the instrument."""
        [mine] = [row for row in self.rows if row.instrument_id == instrument_id]
        return mine.available + mine.held

    def holding(self, instrument_id: str) -> Holding:
        """One position with what its user can lose with it: what the ledger takes from when it books its fills
        (available, and held for the instrument), less what the other positions lose beyond their own holds."""
        [mine] = [row for row in self.rows if row.instrument_id == instrument_id]
        others = sum((max(ZERO, -row.pnl - row.held) for row in self.rows if row is not mine), ZERO)
        return Holding(mine.signed_quantity, mine.entry_notional, max(ZERO, mine.available + mine.held - others))


async def cross_backing(conn: Connection | Pool, marks: Marks, user_id: int) -> dict[str, Decimal]:
    """What stands behind each open cross position of a user (quote), by instrument: the account's equity without the
    position's own profit, less the others' maintenance margin. What `marks` leave out is valued at its last mark, or at
    entry if it never had one.

    Source: Binance, liquidation price of USD-M futures in cross margin.
    """
    accounts = (await read_accounts(conn, marks, user_id)).values()
    return {row.instrument_id: account.backing(row) for account in accounts for row in account.rows}


async def read_accounts(
    conn: Connection | Pool, marks: Marks, user_id: int | None = None
) -> dict[tuple[int, str], Account]:
    """Cross accounts by user and asset; `marks` are live, what they leave out is valued at its last mark."""
    rows = await conn.fetch(CROSS_POSITIONS, list(marks), list(marks.values()), user_id)
    found: defaultdict[tuple[int, str], list[CrossPositionRow]] = defaultdict(list)
    for record in rows:
        row = CrossPositionRow(**record)
        found[row.user_id, row.quote_asset].append(row)
    return {key: Account(of_user, marks.keys()) for key, of_user in found.items()}

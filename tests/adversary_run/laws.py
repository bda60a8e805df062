"""All laws at a quiet moment."""

from collections.abc import Set
from decimal import Decimal

from storage.db import Connection
from tests.adversary_run.books import broken_books
from tests.adversary_run.draws import broken_draws
from tests.adversary_run.equity import Equity
from tests.adversary_run.fills import broken_fills
from tests.adversary_run.findings import Finding


class Laws:
    """Judges what has come since the last look."""

    def __init__(self, colluders: Set[int], seed: Decimal) -> None:
        self._equity = Equity(colluders, seed)
        self._booking_id = 0
        self._draw_id = 0
        self.opened = 0

    async def broken(self, conn: Connection, given: Decimal, *, mark_stood: bool) -> list[Finding]:
        """What does not hold now (see `Equity.broken`)."""
        books = await broken_books(conn)
        equity = await self._equity.broken(conn, given, mark_stood=mark_stood)
        fills, self._booking_id, opened = await broken_fills(conn, self._booking_id)
        draws, self._draw_id = await broken_draws(conn, self._draw_id)
        self.opened += opened
        return [*books, *equity, *fills, *draws]

    @property
    def draws(self) -> int:
        """How often the fund has paid."""
        return self._draw_id

"""Law 2: no money from nothing, between two moments at which nothing was under way."""

from collections.abc import Set
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal

from storage.db import Connection
from tests.adversary_run.findings import ROUNDING, Finding
from tests.adversary_run.standing import ZERO, Stands, read_standing

# The exchange's own accounts, without those that stand for what is outside or between users.
_OWN = ("exchange:fees", "exchange:insurance_fund", "exchange:shortfall", "exchange:funding", "exchange:rounding")
_FUNDED = """
    SELECT coalesce(-sum(delta_available), 0) FROM ledger.ledger_entries
    WHERE entry_type = 'FUNDING' AND delta_available < 0 AND user_id = ANY($1) AND created_at > $2
"""
_DRAWN = "SELECT DISTINCT user_id FROM ledger.insurance_draws WHERE created_at > $1"


@dataclass(frozen=True)
class Point:
    """A quiet moment: what the colluders had together, and what they had been given (deposits less withdrawals)."""

    at: datetime
    equity: Decimal
    given: Decimal


class Equity:
    """Compares a quiet moment with the one before."""

    def __init__(self, colluders: Set[int], seed: Decimal) -> None:
        self._colluders = colluders
        self._seed = seed
        self._last: Point | None = None

    async def broken(self, conn: Connection, given: Decimal, *, mark_stood: bool) -> list[Finding]:
        """`given`: what the colluders were given so far, by the answers they got; `mark_stood`: since the last look."""
        users = await read_standing(conn)
        found = await self._out_of_balance(conn, users, given)
        equity = sum((users[user_id].equity for user_id in self._colluders & users.keys()), ZERO)
        now = Point(await conn.fetchval("SELECT now()"), equity, given)
        if mark_stood and self._last is not None:
            gained = (now.equity - now.given) - (self._last.equity - self._last.given)
            # Whoever funding has ruined leaves the rest to the fund, as one does whom the mark has ruined.
            ruined = [row[0] for row in await conn.fetch(_DRAWN, self._last.at)]
            borne = await conn.fetchval(_FUNDED, ruined, self._last.at)
            if gained > borne + ROUNDING:
                detail = f"{gained:f} since {self._last.at:%H:%M:%S.%f}, funding of the ruined {borne:f}"
                found.append(Finding("2", "the colluders gained while the marks stood still", detail))
        self._last = now
        return found

    async def _out_of_balance(self, conn: Connection, users: dict[int, Stands], given: Decimal) -> list[Finding]:
        rows = await conn.fetch("SELECT account, balance FROM ledger.system_balances")
        system = {row[0]: row[1] for row in rows}
        own = sum((system.get(account, ZERO) for account in _OWN), ZERO)
        there = own + sum((stands.equity for stands in users.values()), ZERO)
        paid_in = given + self._seed
        found = []
        if there != paid_in:
            found.append(Finding("2", "what there is is not what was paid in", f"{there:f}, paid in {paid_in:f}"))
        if -system["external:deposits"] != paid_in:
            found.append(Finding("2", "deposits are not as answered", f"{system['external:deposits']:f}, {paid_in:f}"))
        return found

"""How everybody stands at the last marks, out of the raw tables."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal

from storage.db import Connection

ZERO = Decimal(0)
# (from which notional on, maintenance margin rate, cumulative), ascending.
Tiers = Sequence[tuple[Decimal, Decimal, Decimal]]


@dataclass(frozen=True)
class Held:
    """An open position at a mark: signed base, and quote for the rest; `margin` is what the ledger holds for it."""

    instrument_id: str
    quantity: Decimal
    entry: Decimal
    margin: Decimal
    mark: Decimal
    tiers: Tiers

    @property
    def pnl(self) -> Decimal:
        """Unrealised profit, exact."""
        return self.quantity * self.mark - (self.entry if self.quantity > 0 else -self.entry)

    @property
    def maintenance(self) -> Decimal:
        """Maintenance margin at the mark."""
        notional = abs(self.quantity) * self.mark
        _, rate, cumulative = [tier for tier in self.tiers if tier[0] <= notional][-1]
        return notional * rate - cumulative


@dataclass
class Stands:
    """A user's money and positions. `apart`: what isolated positions and orders hold, which backs nothing else."""

    balance: Decimal
    apart: Decimal = ZERO
    isolated: list[Held] = field(default_factory=list)
    cross: list[Held] = field(default_factory=list)

    @property
    def pool(self) -> Decimal:
        """Equity of the cross account: all money that is not apart, and what cross positions have won or lost."""
        return self.balance - self.apart + sum((held.pnl for held in self.cross), ZERO)

    @property
    def equity(self) -> Decimal:
        """All that the user has at the marks."""
        return self.balance + sum((held.pnl for held in self.isolated + self.cross), ZERO)

    def __str__(self) -> str:
        positions = [
            f"{mode} {h.instrument_id} {h.quantity:f} entered for {h.entry:f}, margin {h.margin:f}, mark {h.mark:f}"
            for mode, held in (("isolated", self.isolated), ("cross", self.cross))
            for h in held
        ]
        money = f"balance {self.balance:f} ({self.apart:f} apart), cross equity {self.pool:f}"
        return "; ".join([money, *positions])

    def due(self) -> Iterable[str]:
        """What is down to the maintenance margin."""
        for held in self.isolated:
            if held.margin + held.pnl <= held.maintenance:
                yield f"{held.instrument_id}: equity {held.margin + held.pnl:f}, maintenance {held.maintenance:f}"
        needed = sum((held.maintenance for held in self.cross), ZERO)
        if self.cross and self.pool <= needed:
            yield f"cross: equity {self.pool:f}, maintenance {needed:f}"


async def read_tiers(conn: Connection) -> dict[str, Tiers]:
    """The leverage tiers of every instrument."""
    tiers: defaultdict[str, list[tuple[Decimal, Decimal, Decimal]]] = defaultdict(list)
    for row in await conn.fetch(
        "SELECT instrument_id, notional_from, maintenance_margin_rate, cumulative FROM risk.leverage_tiers"
        " ORDER BY instrument_id, notional_from"
    ):
        tiers[row[0]].append((row[1], row[2], row[3]))
    return dict(tiers)


async def read_marks(conn: Connection) -> dict[str, Decimal]:
    """The last mark of every instrument that has one."""
    rows = await conn.fetch(
        "SELECT i.instrument_id, m.mark_price FROM matching.instruments i CROSS JOIN LATERAL (SELECT mark_price"
        " FROM market.mark_prices m WHERE m.instrument_id = i.instrument_id ORDER BY calculated_at DESC LIMIT 1) m"
    )
    return {row[0]: row[1] for row in rows}


async def read_standing(conn: Connection) -> dict[int, Stands]:
    """Everybody who has a balance."""
    tiers, marks = await read_tiers(conn), await read_marks(conn)
    rows = await conn.fetch("SELECT user_id, available + reserved FROM ledger.ledger_balances")
    users = {row[0]: Stands(row[1]) for row in rows}
    for row in await conn.fetch(
        "SELECT e.user_id, e.instrument_id, e.margin_mode, coalesce(p.signed_quantity, 0) AS quantity,"
        " coalesce(p.entry_notional, 0) AS entry, coalesce(h.order_margin, 0) AS orders,"
        " coalesce(h.position_margin, 0) AS margin FROM risk.exposures e"
        " LEFT JOIN positions.positions p USING (user_id, instrument_id)"
        " LEFT JOIN ledger.margin_holds h USING (user_id, instrument_id)"
    ):
        stands = users.setdefault(row["user_id"], Stands(ZERO))
        name = row["instrument_id"]
        is_isolated = row["margin_mode"] == "ISOLATED"
        if is_isolated:
            stands.apart += row["orders"] + row["margin"]
        if row["quantity"]:
            held = Held(name, row["quantity"], row["entry"], row["margin"], marks[name], tiers[name])
            (stands.isolated if is_isolated else stands.cross).append(held)
    return users

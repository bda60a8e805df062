"""What the services know of a user of the exchange in memory: money, positions and orders of two instruments."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal

from domain.collateral import Collateral
from domain.exposure import Exposure
from domain.instruments import SHIPPED
from domain.liquidation import Holding, insurance_needed
from domain.margin import Tier, maintenance_margin, unrealized_pnl
from domain.matching import SetTerms
from domain.money import ZERO
from domain.positions import Position
from domain.wallet import Wallet

BTC, ETH = SHIPPED[:2]
INSTRUMENTS = {instrument.instrument_id: instrument for instrument in (BTC, ETH)}
UNITS = {name: i.tick_size * i.lot_size for name, i in INSTRUMENTS.items()}
TIERS = [
    Tier(Decimal(0), Decimal("0.005"), Decimal(0), 100),
    Tier(Decimal(250_000), Decimal("0.01"), Decimal(1_250), 50),
    Tier(Decimal(1_000_000), Decimal("0.025"), Decimal(16_250), 20),
    Tier(Decimal(5_000_000), Decimal("0.05"), Decimal(141_250), 10),
    Tier(Decimal(20_000_000), Decimal("0.1"), Decimal(1_141_250), 5),
    Tier(Decimal(50_000_000), Decimal("0.25"), Decimal(8_641_250), 2),
]
Marks = Mapping[str, Decimal]


@dataclass
class Stake:
    """A user's part in one instrument; what is held is quote. `told` is what the engine was told last."""

    exposure: Exposure = field(default_factory=lambda: Exposure(10))
    position: Position = field(default_factory=Position)
    order_margin: Decimal = ZERO
    position_margin: Decimal = ZERO
    order_short: Decimal = ZERO
    told: SetTerms | None = None
    is_liquidated: bool = False

    @property
    def quantity(self) -> Decimal:
        """Of the position, signed."""
        return self.position.signed_quantity

    @property
    def holding(self) -> Holding:
        """The position with its own margin."""
        return Holding(self.quantity, self.position.entry_notional, self.position_margin)

    def pnl(self, mark: Decimal) -> Decimal:
        """What the position has won or lost at `mark`."""
        return unrealized_pnl(self.quantity, self.position.entry_notional, mark)

    def equity(self, mark: Decimal) -> Decimal:
        """Of the position: its margin, and what it has won or lost."""
        return self.position_margin + self.pnl(mark)

    def maintenance(self, mark: Decimal) -> Decimal:
        """Maintenance margin of the position."""
        return maintenance_margin(abs(self.quantity) * mark, TIERS)


@dataclass
class Account:
    """A user: what nothing holds, and the stakes by instrument. `owed` is funding that is due and not collected."""

    available: Decimal = ZERO
    stakes: defaultdict[str, Stake] = field(default_factory=lambda: defaultdict(Stake))
    owed: Decimal = ZERO

    def wallet(self, name: str) -> Wallet:
        """The balance as one instrument sees it."""
        stake = self.stakes[name]
        return Wallet(self.available, stake.order_margin, stake.position_margin, stake.order_short)

    def keep(self, name: str, wallet: Wallet) -> None:
        """Book what an instrument made of the balance."""
        stake = self.stakes[name]
        self.available = wallet.available
        stake.order_margin, stake.position_margin = wallet.order_margin, wallet.position_margin
        stake.order_short = wallet.order_short

    def crossed(self) -> Iterator[tuple[str, Stake]]:
        """The stakes with open cross positions."""
        return ((name, stake) for name, stake in self.stakes.items() if stake.exposure.cross and stake.quantity)

    def collateral(self, marks: Marks, unbooked: Decimal = ZERO) -> Collateral:
        """What may leave; `unbooked` is realised profit of cross fills that is not in the balance yet."""
        pnl = sum((stake.pnl(marks[name]) for name, stake in self.crossed()), unbooked)
        return Collateral(self.available, -pnl, self.owed)

    def cover(self, of: str, marks: Marks) -> Decimal:
        """What the account has for its cross position in `of` beyond that position's own margin (quote): as
        `activities.risk.cover`, but that nothing is kept back."""
        others = (
            stake.position_margin + min(ZERO, stake.pnl(marks[name]) - stake.maintenance(marks[name]))
            for name, stake in self.crossed()
            if name != of
        )
        own, losses = self.stakes[of], self.stakes[of].exposure
        orders = max(ZERO, own.order_margin - losses.bid_loss - losses.ask_loss)
        return sum(others, self.available - self.owed + orders)

    def cross_equity(self, marks: Marks) -> Decimal:
        """What stands behind the cross positions, valued at the marks."""
        held = (s.order_margin + s.position_margin for s in self.stakes.values() if s.exposure.cross)
        return sum(held, self.available) + sum((s.pnl(marks[name]) for name, s in self.crossed()), ZERO)

    def cross_maintenance(self, marks: Marks) -> Decimal:
        """Maintenance margin of all cross positions."""
        return sum((s.maintenance(marks[name]) for name, s in self.crossed()), ZERO)

    def cross_holding(self, of: str, marks: Marks) -> Holding:
        """A cross position with what the ledger takes from for its fills, less what the others lose beyond their own
        holds (as `activities.liquidation.accounts`)."""
        stake = self.stakes[of]
        others = (
            max(ZERO, -s.pnl(marks[name]) - s.order_margin - s.position_margin)
            for name, s in self.crossed()
            if name != of
        )
        backing = self.available + stake.order_margin + stake.position_margin - sum(others, ZERO)
        return Holding(stake.quantity, stake.position.entry_notional, max(ZERO, backing))

    def backing(self, name: str, marks: Marks) -> Holding:
        """A position with what its user can lose with it."""
        return self.cross_holding(name, marks) if self.stakes[name].exposure.cross else self.stakes[name].holding

    def insurance(self, name: str, closing: Decimal, marks: Marks) -> Decimal:
        """What the fund may be asked for to close so much of a position."""
        needed = insurance_needed(self.backing(name, marks), closing, marks[name])
        if not self.stakes[name].exposure.cross:
            return needed
        return min(needed, max(ZERO, -self.cross_equity(marks)))

"""What of a user's money may leave: the one rule that orders, withdrawals, margin moves and leverage changes ask."""

from dataclasses import dataclass
from decimal import Decimal

from domain.money import ZERO


@dataclass(frozen=True, slots=True)
class Collateral:
    """A user's money in one asset, and what stands against it.

    `available` is what nothing holds. `cross_loss` is what cross positions have lost at the last mark, those of their
    fills included that the ledger has not booked (below 0: a profit). `funding_owed` (>= 0) is what is due of funding
    and not collected yet.
    """

    available: Decimal
    cross_loss: Decimal = ZERO
    funding_owed: Decimal = ZERO

    @property
    def free(self) -> Decimal:
        """What may leave `available`: into an order, an isolated position, or out of the exchange.

        Below 0, nothing may. A profit is no money before it is booked.
        """
        return self.available - max(ZERO, self.cross_loss) - self.funding_owed

    def covers(self, amount: Decimal) -> bool:
        """Whether `amount` may leave; what leaves nothing (<= 0) always may."""
        return amount <= max(ZERO, self.free)

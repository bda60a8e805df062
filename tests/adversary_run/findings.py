"""What a run reports: the laws that were broken."""

from dataclasses import dataclass
from decimal import Decimal

# Every fill rounds its fee and its shares to 8 decimals.
ROUNDING = Decimal("0.00001")


@dataclass(frozen=True)
class Finding:
    """A broken law of docs/solvency.md, which kind of break it is, and the figures."""

    law: str
    kind: str
    detail: str

    def __str__(self) -> str:
        return f"law {self.law}, {self.kind}: {self.detail}"

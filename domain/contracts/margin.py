"""Names and messages of the workflow by which a user changes the margin of an instrument that is in use."""

from dataclasses import dataclass, field
from typing import Literal

MARGIN_CHANGE = "MarginChangeWorkflow"
PLAN_MARGIN_CHANGE = "risk.plan_margin_change"
MOVE_MARGIN = "ledger.move_margin"
ADOPT_MARGIN = "positions.adopt_margin"


@dataclass(frozen=True)
class MarginChange:
    """LEVERAGE: the new leverage is `value`; MARGIN: `value` quote more (or, below 0, less) behind the position.

    `change_id` is the workflow id and names the steps; `waits` is how often it has waited before it continued as new.
    """

    change_id: str
    user_id: int
    instrument_id: str
    kind: Literal["LEVERAGE", "MARGIN"]
    value: str
    waits: int = 0


@dataclass(frozen=True)
class MarginVerdict:
    """What risk said: why not, if so. `is_busy`: another saga of the user is under way, so ask again."""

    refusal: str | None = None
    is_busy: bool = False


@dataclass(frozen=True)
class MarginMoved:
    """What the ledger did: a refusal if the money was gone; whether open orders are left uncovered."""

    refused: list[str] = field(default_factory=list)
    is_uncovered: bool = False

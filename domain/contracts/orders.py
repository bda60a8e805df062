"""Names and messages of the workflows that place and cancel orders: one dataclass in, one out."""

from dataclasses import dataclass, field

ORDER_PLACEMENT = "OrderPlacementWorkflow"
ORDER_CANCELLATION = "OrderCancellationWorkflow"
CHECK_ORDERS = "risk.check_orders"
RELEASE_ORDERS = "risk.release_orders"
UNFREEZE_FUNDS = "ledger.unfreeze_funds"
FREEZE_FUNDS = "ledger.freeze_funds"
ACCEPT_ORDERS = "orders.accept"
REQUEST_CANCELS = "orders.request_cancels"
CANCEL_UNCOVERED = "orders.cancel_uncovered"


@dataclass(frozen=True)
class Refusal:
    """An order that may not go on, and why (a contract failure reason)."""

    order_id: int
    reason: str


@dataclass(frozen=True)
class Backing:
    """For how many lots of an order (or of what an amendment adds) the check held initial margin, if not for all: the
    rest can only reduce a position."""

    order_id: int
    lots: int


@dataclass(frozen=True)
class Carried:
    """What a saga has done that waits for so long that it continues as new.

    Of a placement: rounds begun, those of them that may have put money aside, orders passed (and what backs them) and
    refused, those still to be checked, and how often the ledger was asked; of a cancellation: how many requests the
    engine got. Of both: how often it has waited.
    """

    waits: int = 0
    round: int = 0
    reserving: list[int] = field(default_factory=list)
    passed: list[int] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
    pending: list[int] = field(default_factory=list)
    fundings: int = 0
    requested: int = 0
    backed: list[Backing] = field(default_factory=list)


@dataclass(frozen=True)
class OrderBatch:
    """The orders of one placement or cancellation saga. `saga_id` is the workflow id and names its steps."""

    saga_id: str
    order_ids: list[int]
    carried: Carried | None = None


@dataclass(frozen=True)
class StepRequest:
    """One step over some orders of a saga. A refused order may be tried again, in another round."""

    saga_id: str
    round: int
    order_ids: list[int]

    @property
    def step_id(self) -> str:
        """Names the step's stored result."""
        return f"{self.saga_id}:{self.round}"

    @property
    def release_id(self) -> str:
        """Names the stored result of a compensation; a step may be undone in disjoint parts, at different times."""
        return f"{self.step_id}:{self.order_ids[0]}"


@dataclass(frozen=True)
class Outcome:
    """What a step said of each order: may go on, may not, or must wait for another saga of the same user."""

    passed: list[int] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
    busy: list[int] = field(default_factory=list)
    backed: list[Backing] = field(default_factory=list)


@dataclass(frozen=True)
class Acceptance:
    """The last step of a placement: `passed` orders go to the engine, `refused` ones end as FAILED."""

    saga_id: str
    passed: list[int]
    refused: list[Refusal]
    backed: list[Backing] = field(default_factory=list)


@dataclass(frozen=True)
class Verdict:
    """How a saga ended: how many orders the engine got, and the refusals."""

    accepted: int
    refused: list[Refusal] = field(default_factory=list)


@dataclass(frozen=True)
class Uncovered:
    """Users whose open orders in an instrument are no longer backed by money."""

    instrument_id: str
    user_ids: list[int]

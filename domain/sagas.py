"""Names and messages of the order and settlement workflows: one dataclass in, one out.

Workflows import these and nothing else of ours; ids travel, rows hold the data.
"""

from dataclasses import dataclass, field

ORDER_PLACEMENT = "OrderPlacementWorkflow"
ORDER_CANCELLATION = "OrderCancellationWorkflow"
SETTLEMENT = "SettlementWorkflow"
LEDGER_AUDIT = "LedgerAuditWorkflow"

CHECK_ORDERS = "risk.check_orders"
RELEASE_ORDERS = "risk.release_orders"
FREEZE_FUNDS = "ledger.freeze_funds"
ACCEPT_ORDERS = "orders.accept"
REQUEST_CANCELS = "orders.request_cancels"

APPLY_TRADES = "positions.apply_trades"
APPLY_RISK_EVENTS = "risk.apply_events"
SETTLE = "ledger.settle"
CONFIRM_POSITIONS = "positions.confirm"
APPLY_ORDER_EVENTS = "orders.apply_events"
ACKNOWLEDGE = "matching.acknowledge"

AUDIT = "ledger.audit"
ADVANCE_SIGNAL = "advance"


@dataclass(frozen=True)
class OrderBatch:
    """The orders of one placement or cancellation saga. `saga_id` is the workflow id and names its steps."""

    saga_id: str
    order_ids: list[int]


@dataclass(frozen=True)
class Outcome:
    """What a step said of each order: those that may go on, and why the others may not."""

    passed: list[int] = field(default_factory=list)
    failed: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Placement:
    """Final word on a batch: `accepted` orders are in the command log, `failed` ones carry their reason."""

    saga_id: str
    round: int
    passed: list[int] = field(default_factory=list)
    failed: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class SettlementInput:
    """State of the entity workflow of one instrument, carried through continue-as-new."""

    instrument_id: str
    target_seq: int = 0


@dataclass(frozen=True)
class EventRange:
    """Engine events of one instrument with `after_seq` < seq <= `to_seq`."""

    instrument_id: str
    after_seq: int
    to_seq: int


@dataclass(frozen=True)
class Progress:
    """How far settlement has got (`settled_seq`) and how far the engine has (`engine_seq`)."""

    settled_seq: int
    engine_seq: int

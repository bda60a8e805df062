"""Names and messages of the settlement workflow: one dataclass in, one out."""

from dataclasses import dataclass

SETTLEMENT = "SettlementWorkflow"
APPLY_TRADES = "positions.apply_trades"
APPLY_RISK_EVENTS = "risk.apply_events"
SETTLE = "ledger.settle"
CONFIRM_POSITIONS = "positions.confirm"
APPLY_ORDER_EVENTS = "orders.apply_events"
ACKNOWLEDGE = "matching.acknowledge"
ADVANCE_SIGNAL = "advance"
CURSOR_GAP = "CursorGap"


@dataclass(frozen=True)
class SettlementInput:
    """State of the entity workflow of one instrument, carried through continue-as-new."""

    instrument_id: str
    target_seq: int = 0
    settled_seq: int = 0


@dataclass(frozen=True)
class EventRange:
    """Engine events of one instrument with `after_seq` < seq <= `to_seq`."""

    instrument_id: str
    after_seq: int
    to_seq: int


@dataclass(frozen=True)
class Progress:
    """How far settlement has got in full (`settled_seq`), in its first step (`applied_seq`), and the engine."""

    settled_seq: int
    applied_seq: int
    engine_seq: int

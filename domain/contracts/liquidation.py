"""Names and messages of the liquidation workflow: one dataclass in, one out. Figures travel as decimal strings."""

from dataclasses import dataclass

LIQUIDATION = "LiquidationWorkflow"
SETTLED_SIGNAL = "settled"
BEGIN = "risk.begin_liquidation"
CANCEL_ORDERS = "orders.cancel_for_liquidation"
PLAN = "risk.plan_liquidation"
CLAIM_INSURANCE = "ledger.claim_insurance"
SUBMIT = "risk.submit_liquidation"
DELEVERAGE = "risk.deleverage"
STOP = "risk.stop_liquidation"
RELEASE_INSURANCE = "ledger.release_insurance"
FINISH = "risk.finish_liquidation"


def liquidation_workflow_id(position_id: int, liquidation_id: int) -> str:
    """The id of the workflow of one liquidation of a position."""
    return f"liquidation-{position_id}-{liquidation_id}"


@dataclass(frozen=True)
class LiquidationInput:
    """State of a liquidation, carried through continue-as-new: rounds done, what the last one left undone, and whether
    an operator has aborted it."""

    liquidation_id: int
    round: int = 0
    after: str = ""
    target: str = "0"
    is_stopping: bool = False


@dataclass(frozen=True)
class Takeover:
    """Whose orders have to go, and where; `is_open`: there is something to be done at all."""

    liquidation_id: int
    is_open: bool
    user_id: int = 0
    instrument_ids: tuple[str, ...] = ()


@dataclass(frozen=True)
class PlanRequest:
    """Asks what is next, after a round (ORDER or DELEVERAGE, "" before the first) meant to leave `target` open."""

    liquidation_id: int
    after: str = ""
    target: str = "0"


@dataclass(frozen=True)
class Plan:
    """What is next: WAIT for an answer, PAUSE (nothing may be liquidated now; afterwards the book is tried anew),
    ORDER, DELEVERAGE, or DONE. `why` is for people.

    For an order or a deleveraging: the position (signed, base), its entry notional and what backs it (quote), the mark
    price, how much to close (base), what the insurance fund could have to add (quote, `asset`), what is meant to stay
    open (`target`, base), and the price at which what is closed is worth nothing any more. `money`: what the ledger
    held behind it then, the position's margin or, in cross mode, all that is available or held there (quote; "": not
    known). `fell_short`: more is open than the round before was meant to leave.
    """

    action: str
    why: str
    signed_quantity: str = "0"
    entry_notional: str = "0"
    margin: str = "0"
    mark: str = "0"
    closing: str = "0"
    asset: str = ""
    insurance: str = "0"
    target: str = "0"
    fell_short: bool = False
    bankruptcy_price: str = "0"
    money: str = ""


@dataclass(frozen=True)
class Claim:
    """Asks the insurance fund for up to `amount` of `asset` for one round; earlier rounds' claims end with it.

    What justifies it: how much is closed (base, with the sign of the position), the mark price, and the price at which
    that is worth nothing any more.
    """

    liquidation_id: int
    round: int
    asset: str
    amount: str
    quantity: str = "0"
    mark: str = "0"
    bankruptcy_price: str = "0"


def claim_of(plan: Plan, liquidation_id: int, number: int) -> Claim:
    """The claim of a planned order."""
    sign = "-" if plan.signed_quantity.startswith("-") else ""
    justification = (sign + plan.closing, plan.mark, plan.bankruptcy_price)
    return Claim(liquidation_id, number, plan.asset, plan.insurance, *justification)


@dataclass(frozen=True)
class Submission:
    """One round as planned; `insurance` is what the fund granted."""

    liquidation_id: int
    round: int
    plan: Plan
    insurance: str = "0"


@dataclass(frozen=True)
class Ending:
    """How a liquidation ends: PROCESSED or ABORTED."""

    liquidation_id: int
    status: str

"""Results that one service stores and another reads: by how much the margin of orders moved."""

from decimal import Decimal

import msgspec

from domain.contracts.orders import Backing, Refusal
from domain.contracts.settlement import EventRange
from domain.money import ZERO


class OrderMargin(msgspec.Struct, frozen=True):
    """By how much one order (or its end) moved the margin required of its user in its instrument, in `asset`."""

    order_id: int
    user_id: int
    instrument_id: str
    asset: str
    amount: Decimal


class CheckResult(msgspec.Struct, frozen=True):
    """Of `risk.check_orders`, under `check:{saga}:{round}`.

    `unfinished` are the engine events that risk or the ledger had not applied then (None: not looked for). `backed`:
    of the orders that passed, those that have initial margin for a part of their lots, or for none."""

    passed: list[OrderMargin]
    refused: list[Refusal]
    busy: list[int]
    unfinished: list[EventRange] | None = None
    backed: list[Backing] = []


class MarginMove(msgspec.Struct, frozen=True):
    """By how much the order margin required of a user in an instrument changed, all told, in `asset`."""

    user_id: int
    instrument_id: str
    asset: str
    amount: Decimal


class MarginMoves(msgspec.Struct, frozen=True):
    """Of `risk.release_orders` and `risk.apply_events`; `ended` are the orders that freed margin."""

    moves: list[MarginMove]
    ended: list[OrderMargin]


class MarginPlan(msgspec.Struct, frozen=True):
    """Of `risk.plan_margin_change`, under `adjust:{change}`: by how much the margins of a position and of its user's
    open orders change (quote, in `asset`), or why they do not. The position is the one of `margin_version`.

    What lowers a margin is told to the engine first: the ledger waits until what `command_seq` and the commands before
    it led to is settled (0: nothing was told)."""

    position_delta: Decimal = ZERO
    order_delta: Decimal = ZERO
    asset: str = ""
    margin_version: int = 0
    refusal: str | None = None
    command_seq: int = 0


class MarginDraw(msgspec.Struct, frozen=True):
    """What is taken of the margin of a user's position (quote, above 0)."""

    user_id: int
    instrument_id: str
    amount: Decimal


class FundingDraws(msgspec.Struct, frozen=True):
    """Of `ledger.settle_funding`, under `funding:{page}:{number}`: what the engine was told that a page's payments will
    take of margins, and with which command of each instrument's log it was told last."""

    draws: list[MarginDraw]
    command_seqs: dict[str, int]


def settle_step(events: EventRange) -> str:
    """Name of the stored margin moves of a range of engine events."""
    return f"settle:{events.instrument_id}:{events.to_seq}"

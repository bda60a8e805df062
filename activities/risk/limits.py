"""Limits, and why an order is refused."""

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal

from activities.risk.rows import Key
from domain.exposure import Exposure, Side
from domain.margin import Tier, tier_of
from domain.money import ZERO
from storage.db import Connection


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of one user in one instrument (quantity in base, notional in quote)."""

    max_order_quantity: Decimal
    max_position_notional: Decimal
    max_open_orders: int
    max_leverage: int


def refusal_reason(
    after: Exposure,
    reduces: Side | None,
    quantity: Decimal,
    added_margin: Decimal,
    added_loss: Decimal,
    budget: Decimal,
    limits: Limits,
    tiers: Sequence[Tier],
) -> str | None:
    """Why an order that would lead to `after` may not go on, or None.

    `reduces` is the side of a reduce-only order, `added_margin` what the order needs of `budget`, the money its user
    has left, and `added_loss` how much of that is open loss (all quote).
    """
    if reduces is not None and not after.can_reduce(reduces):
        return "REDUCE_ONLY_REJECTED"
    if quantity > limits.max_order_quantity or after.open_orders > limits.max_open_orders:
        return "RISK_LIMIT_EXCEEDED"
    worst = after.worst_notional
    if added_margin > 0 and (
        worst > limits.max_position_notional or after.leverage > tier_of(worst, tiers).max_leverage
    ):
        return "RISK_LIMIT_EXCEEDED"
    if added_margin > max(budget, ZERO):
        return "OPEN_LOSS_NOT_COVERED" if added_margin - added_loss <= max(budget, ZERO) else "INSUFFICIENT_MARGIN"
    return None


async def read_limits(conn: Connection, keys: Sequence[Key]) -> dict[Key, Limits]:
    rows = await conn.fetch(
        "SELECT user_id, instrument_id, max_order_quantity, max_position_notional, max_open_orders, max_leverage"
        " FROM risk.risk_limits WHERE instrument_id = ANY($1) AND (user_id IS NULL OR user_id = ANY($2))",
        list({key[1] for key in keys}),
        list({key[0] for key in keys}),
    )
    found = {(row["user_id"], row["instrument_id"]): Limits(*row[2:]) for row in rows}
    return {key: found.get(key) or found[None, key[1]] for key in keys}

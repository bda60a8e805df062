"""Amounts of money: `Decimal`, 8 decimals in the ledger, never a float.

What a user pays rounds up, what a user gets rounds down, so that dust stays with the exchange.
"""

from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal

AMOUNT_STEP = Decimal("0.00000001")
ZERO = Decimal(0)


def round_up(amount: Decimal) -> Decimal:
    """`amount` at 8 decimals, toward +infinity: for what a user pays or must reserve."""
    return amount.quantize(AMOUNT_STEP, ROUND_CEILING)


def round_down(amount: Decimal) -> Decimal:
    """`amount` at 8 decimals, toward -infinity: for what a user gets."""
    return amount.quantize(AMOUNT_STEP, ROUND_FLOOR)


def plain(value: Decimal) -> str:
    """`value` as the shortest plain decimal string: no exponent, no trailing zeros."""
    text = f"{value:f}"
    if "." in text:
        text = text.rstrip("0").rstrip(".")
    return "0" if text in ("-0", "") else text

"""Funding: what holders of positions pay one another."""

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal

from domain.money import ZERO, round_down


def funding_payment(signed_quantity: Decimal, mark_price: Decimal, rate: Decimal) -> Decimal:
    """What a position gets (> 0) or pays (< 0) in quote: -signed quantity * mark * rate, rounded toward -infinity.

    Longs pay shorts when `rate` is positive and the reverse. As positions sum to zero, payments sum to zero or, by the
    rounding, to less: that dust stays with the exchange.
    Source: Bybit and Binance, funding fee of linear contracts; the rounding is dYdX v4's.
    """
    return round_down(-signed_quantity * mark_price * rate)


@dataclass(frozen=True, slots=True)
class Holding:
    """What is held of a user's money for one instrument: margin of open orders and of the position (quote, >= 0)."""

    instrument_id: str
    order_margin: Decimal = ZERO
    position_margin: Decimal = ZERO

    @property
    def total(self) -> Decimal:
        """All of it."""
        return self.order_margin + self.position_margin


@dataclass(frozen=True, slots=True)
class Charge:
    """Where a payment comes from (each >= 0): available, what is taken of the holdings, the insurance fund.

    `draws` names only instruments of which something is taken, the position's own first.
    """

    available: Decimal
    draws: tuple[Holding, ...]
    insurance: Decimal


def charge(owed: Decimal, available: Decimal, instrument_id: str, holdings: Sequence[Holding]) -> Charge:
    """Take `owed` (>= 0), due of the position in `instrument_id`, from wherever its user has money.

    First what is available, then the position's margin, then what open orders hold (those are cancelled for it), then
    the margin of the other positions, each in order of instrument, the position's own first; the fund pays only what is
    missing after all that. Less margin brings the liquidation price nearer: who cannot pay is liquidated by the margin
    rules, and never owes.
    """
    ordered = sorted(holdings, key=lambda holding: (holding.instrument_id != instrument_id, holding.instrument_id))
    left = owed - min(owed, available)
    orders: dict[str, Decimal] = {}
    margins: dict[str, Decimal] = {}
    steps = [(margins, h.instrument_id, h.position_margin) for h in ordered if h.instrument_id == instrument_id]
    steps += [(orders, h.instrument_id, h.order_margin) for h in ordered]
    steps += [(margins, h.instrument_id, h.position_margin) for h in ordered if h.instrument_id != instrument_id]
    for taken, name, held in steps:
        taken[name] = min(left, held)
        left -= taken[name]
    draws = (Holding(h.instrument_id, orders[h.instrument_id], margins[h.instrument_id]) for h in ordered)
    return Charge(min(owed, available), tuple(d for d in draws if d.order_margin or d.position_margin), left)


def draw_margin_first(owed: Decimal, holdings: Sequence[Holding]) -> list[Holding]:
    """Take up to `owed` (>= 0) from `holdings`: from the margin of positions first, then from what orders hold, each in
    order of instrument. Only holdings of which something is taken."""
    ordered = sorted(holdings, key=lambda holding: holding.instrument_id)
    margins = charge(owed, ZERO, "", [Holding(h.instrument_id, ZERO, h.position_margin) for h in ordered])
    orders = charge(margins.insurance, ZERO, "", [Holding(h.instrument_id, h.order_margin) for h in ordered])
    taken: dict[str, Holding] = {draw.instrument_id: draw for draw in margins.draws}
    for draw in orders.draws:
        before = taken.get(draw.instrument_id, Holding(draw.instrument_id))
        taken[draw.instrument_id] = Holding(draw.instrument_id, draw.order_margin, before.position_margin)
    return [taken[name] for name in sorted(taken)]

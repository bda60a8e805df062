"""What the reference matcher keeps of an order, what its terms say about it alone, and how events tell of it."""

from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from typing import Any

from domain.instruments import Instrument
from domain.matching import Amended, New, Trade


@dataclass
class Live:
    """An order that has not ended; those in a list stand in order of entry."""

    new: New
    price: int
    remaining: int
    filled: int = 0

    @property
    def terms(self) -> dict[str, Any]:
        """What nearly every event about an order says."""
        return {
            "order_id": self.new.order_id,
            "user_id": self.new.user_id,
            "side": self.new.side,
            "price": self.price,
            "quantity": self.remaining,
            "reduce_only": self.new.reduce_only,
        }

    @property
    def held(self) -> dict[str, Any]:
        """What is held for an order, as the events say by which that may change."""
        return {"basis": self.new.basis, "loss": self.new.loss}


def is_rising(new: New) -> bool:
    """Whether a stop waits for a price from below."""
    return (new.type in ("STOP_LIMIT", "STOP_MARKET")) == (new.side == "BUY")


def is_sensible(new: New) -> bool:
    """Whether an order's terms go together."""
    if new.post_only and (new.type.endswith("MARKET") or new.time_in_force != "GTC"):
        return False
    is_stop = new.type not in ("LIMIT", "MARKET")
    return new.price > 0 and new.quantity > 0 and (new.stop_price > 0 or not is_stop)


def amended(
    at: int, order: Live, old: Live, was_resting: bool, resting: bool, reason: str, amendment_id: int = 0
) -> Amended:
    """An order that was `old` until now."""
    return Amended(
        at=at,
        **order.terms,
        **order.held,
        old_price=old.price,
        old_quantity=old.remaining,
        old_basis=old.new.basis,
        old_loss=old.new.loss,
        reason=reason,
        was_resting=was_resting,
        resting=resting,
        amendment_id=amendment_id,
    )


def trade_id(seq: int, instrument: Instrument) -> int:
    """The id of the trade that is event `seq`."""
    return seq * 1024 + instrument.number


def trade(
    at: int, seq: int, instrument: Instrument, taker: Live, maker: Live, quantity: int, guards: dict[str, Any]
) -> Trade:
    """The trade of `quantity` lots that both orders have just made; `guards` are the fields that tell of those."""
    # Quote, exact.
    notional = maker.price * Fraction(instrument.tick_size) * quantity * Fraction(instrument.lot_size)
    return Trade(
        at=at,
        trade_id=trade_id(seq, instrument),
        price=maker.price,
        quantity=quantity,
        taker_side=taker.new.side,
        maker_order_id=maker.new.order_id,
        maker_user_id=maker.new.user_id,
        maker_remaining=maker.remaining,
        maker_fee=ceil(notional * Fraction(instrument.maker_fee_rate) * 10**8),
        taker_order_id=taker.new.order_id,
        taker_user_id=taker.new.user_id,
        taker_remaining=taker.remaining,
        taker_fee=ceil(notional * Fraction(instrument.taker_fee_rate) * 10**8),
        taker_price=taker.price,
        taker_liquidation=taker.new.liquidation,
        maker_reduce_only=maker.new.reduce_only,
        taker_reduce_only=taker.new.reduce_only,
        **guards,
    )

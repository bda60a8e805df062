"""Orders and amendments as the engine gets them: ticks, lots and millionths."""

from decimal import Decimal

from activities.orders.rows import AmendmentRow, OrderRow
from domain.clock import to_ms
from domain.instruments import Instrument
from domain.matching import Amend, New
from domain.order_entry import protection

# The engine has protection in millionths.
PROTECTION_UNITS = 1_000_000
# Of an order or amendment (`domain.matching.New.backed`).
ALL_BACKED = -1


def amend_command(row: AmendmentRow, instrument: Instrument, backed: int) -> Amend:
    """The command for an accepted amendment; of its order, `backed` lots have initial margin."""
    price, quantity = row.price, row.quantity
    return Amend(
        at=to_ms(row.updated_at),
        order_id=row.order_id,
        user_id=row.user_id,
        price=None if price is None else instrument.price_to_ticks(price),
        quantity=None if quantity is None else instrument.quantity_to_lots(quantity),
        amendment_id=row.amendment_id,
        basis=_ticks(row.margin_price, instrument),
        loss=_ticks(row.open_loss, instrument),
        backed=backed,
    )


def _ticks(price: Decimal | None, instrument: Instrument) -> int:
    """`price` in ticks, 0 for none."""
    return instrument.price_to_ticks(price) if price else 0


def new_command(row: OrderRow, instrument: Instrument, backed: int = ALL_BACKED) -> New:
    """The command for an accepted order; `backed` lots of it have initial margin."""
    price, basis = instrument.price_to_ticks(row.bound_price), _ticks(row.margin_price, instrument)
    waits_for_market = row.type in ("STOP_MARKET", "TAKE_PROFIT_MARKET")
    return New(
        at=to_ms(row.updated_at),
        order_id=row.order_id,
        user_id=row.user_id,
        side=row.side,
        type=row.type,
        time_in_force=row.time_in_force,
        price=price,
        quantity=instrument.quantity_to_lots(row.quantity),
        stp_mode=row.stp_mode,
        liquidation=row.is_liquidation,
        post_only=row.post_only,
        reduce_only=row.reduce_only,
        stop_price=_ticks(row.stop_price, instrument),
        working_type=row.working_type or "MARK",
        basis=0 if basis == price else basis,
        loss=_ticks(row.open_loss, instrument),
        protection=int(protection(instrument) * PROTECTION_UNITS) if waits_for_market else 0,
        backed=backed,
    )

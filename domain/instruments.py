"""Instruments: what may be traded, in which steps, at which fees."""

from dataclasses import dataclass
from decimal import Decimal

from domain.money import round_up
from domain.problems import Problem


@dataclass(frozen=True, slots=True)
class Instrument:
    """A linear perpetual. Prices are multiples of `tick_size` (quote per base), quantities of `lot_size` (base).

    No order may buy above, or sell below, the mark price by more than `price_band`, a fraction.
    """

    instrument_id: str
    number: int
    base_asset: str
    quote_asset: str
    tick_size: Decimal
    lot_size: Decimal
    min_notional: Decimal
    maker_fee_rate: Decimal
    taker_fee_rate: Decimal
    max_leverage: int
    default_leverage: int
    state: str = "TRADING"
    price_band: Decimal = Decimal("0.5")

    def price_to_ticks(self, price: Decimal) -> int:
        """`price` in ticks. Raises Problem PRICE_NOT_ON_TICK."""
        ticks, rest = divmod(price, self.tick_size)
        if rest:
            raise Problem("PRICE_NOT_ON_TICK", f"Expected a multiple of {self.tick_size}, was {price}")
        return int(ticks)

    def quantity_to_lots(self, quantity: Decimal) -> int:
        """`quantity` in lots. Raises Problem QUANTITY_NOT_ON_LOT."""
        lots, rest = divmod(quantity, self.lot_size)
        if rest:
            raise Problem("QUANTITY_NOT_ON_LOT", f"Expected a multiple of {self.lot_size}, was {quantity}")
        return int(lots)

    def ticks_to_price(self, ticks: int) -> Decimal:
        """Price in quote per base."""
        return ticks * self.tick_size

    def lots_to_quantity(self, lots: int) -> Decimal:
        """Quantity in base."""
        return lots * self.lot_size

    def fee(self, ticks: int, lots: int, rate: Decimal) -> Decimal:
        """Fee of one side of a trade in quote: notional times `rate`, rounded up to 8 decimals."""
        return round_up(self.ticks_to_price(ticks) * self.lots_to_quantity(lots) * rate)


def choose(instruments: dict[str, Instrument], wanted: str) -> list[Instrument]:
    """The instruments named in `wanted`, comma-separated; all if it is empty. Raises RuntimeError for others."""
    names = [name.strip() for name in wanted.split(",") if name.strip()] or list(instruments)
    unknown = sorted(set(names) - set(instruments))
    if unknown:
        raise RuntimeError(f"Expected instruments out of {sorted(instruments)}, was {unknown}")
    return [instruments[name] for name in dict.fromkeys(names)]


def _perpetual(number: int, base: str, tick: str, lot: str, max_leverage: int, band: str) -> Instrument:
    return Instrument(
        instrument_id=f"{base}-USDT-PERP",
        number=number,
        base_asset=base,
        quote_asset="USDT",
        tick_size=Decimal(tick),
        lot_size=Decimal(lot),
        min_notional=Decimal(5),
        maker_fee_rate=Decimal("0.0002"),
        taker_fee_rate=Decimal("0.0005"),
        max_leverage=max_leverage,
        default_leverage=10,
        price_band=Decimal(band),
    )


SHIPPED = (
    _perpetual(1, "BTC", "0.1", "0.001", 100, "0.05"),
    _perpetual(2, "ETH", "0.01", "0.001", 100, "0.075"),
    _perpetual(3, "SOL", "0.001", "0.1", 50, "0.1"),
)

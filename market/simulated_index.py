"""The simulated index: recorded prices or a seeded random walk, which an operator may hold at a price."""

import random
from collections.abc import Mapping, Sequence
from datetime import datetime
from decimal import Decimal

from domain.index_price import IndexPrice
from domain.instruments import Instrument
from market.replay import Recording

START_PRICES = {"BTC": Decimal(60_000), "ETH": Decimal(3_000), "SOL": Decimal(150)}
START_PRICE_OTHERS = Decimal(100)
# A step moves the price by at most one basis point, drawn in steps of a ten-thousandth of that.
_STEP_MAX = 10_000
_STEP_UNIT = Decimal("1e-8")


class SimulatedIndex:
    """Same seed, same walk. `last_prices` are the levels of a former run, from which it goes on.

    Instruments in `recording` follow it instead, from the first reading on, again from its start at its end.
    """

    label = "simulated"
    can_be_held = True

    def __init__(
        self,
        instruments: Sequence[Instrument],
        last_prices: Mapping[str, Decimal],
        seed: int,
        recording: Recording | None = None,
    ) -> None:
        self._instruments = instruments
        self._random = {i.instrument_id: random.Random(f"{seed}:{i.instrument_id}") for i in instruments}
        self._prices = {
            i.instrument_id: last_prices.get(i.instrument_id, START_PRICES.get(i.base_asset, START_PRICE_OTHERS))
            for i in instruments
        }
        self._recording = recording
        self._started: datetime | None = None

    async def run(self) -> None:
        """Nothing to collect."""

    async def warm_up(self) -> None:
        """Nothing to wait for."""

    def read(self, now: datetime, held: Mapping[str, Decimal]) -> dict[str, IndexPrice]:
        """The next price of every instrument, a walking one on its tick; those in `held` stand exactly there."""
        self._started = self._started or now
        fixed = {**(self._recording.prices(now - self._started) if self._recording else {}), **held}
        for instrument in self._instruments:
            name = instrument.instrument_id
            self._prices[name] = fixed[name] if name in fixed else self._walk(instrument)
        return {name: IndexPrice(price) for name, price in self._prices.items()}

    def _walk(self, instrument: Instrument) -> Decimal:
        move = self._random[instrument.instrument_id].randint(-_STEP_MAX, _STEP_MAX) * _STEP_UNIT
        moved = self._prices[instrument.instrument_id] * (1 + move)
        ticks = (moved / instrument.tick_size).to_integral_value()
        return max(ticks, Decimal(1)) * instrument.tick_size

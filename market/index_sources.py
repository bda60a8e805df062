"""Where the index comes from: one interface over the sources, chosen by `EXCHANGE_INDEX_SOURCE`."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from typing import Protocol

from domain.index_price import IndexPrice
from domain.instruments import Instrument
from market.replay import read_recording
from market.simulated_index import SimulatedIndex
from settings import Settings


class IndexSource(Protocol):
    """An index of every instrument. `label` is what the public is told about it, wherever its prices show."""

    @property
    def label(self) -> str: ...

    @property
    def can_be_held(self) -> bool:
        """Whether an operator may fix it at a price."""

    async def run(self) -> None:
        """Collect prices in the background, until cancelled; returns at once when there is nothing to collect."""

    async def warm_up(self) -> None:
        """Return when there is something to read, or when it has taken so long that this is worth an alert."""

    def read(self, now: datetime, held: Mapping[str, Decimal]) -> dict[str, IndexPrice]:
        """The index of every instrument at `now`, from what is known already; those in `held` stand exactly there."""


def choose_index(
    settings: Settings, instruments: Sequence[Instrument], last_prices: Mapping[str, Decimal]
) -> IndexSource:
    """The source that `settings` name. Raises ValueError, in one line for the operator, when they name none."""
    if settings.index_source == "ccxt":
        # The library takes half a second and 60 MB to import: only who uses it pays.
        from market.ccxt_index import CcxtIndex

        return CcxtIndex(instruments, settings)
    recording = read_recording(settings.index_replay_file) if settings.index_replay_file else None
    return SimulatedIndex(instruments, last_prices, settings.index_seed, recording)

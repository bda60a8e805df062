"""Instruments and their leverage tiers, read from what the matching and risk services publish."""

import time
from collections import defaultdict
from dataclasses import dataclass

from domain.instruments import Instrument
from domain.margin import Tier
from storage.db import Connection, Pool

FRESH_SECONDS = 1.0


async def read_instruments(conn: Connection | Pool) -> dict[str, Instrument]:
    """All instruments by id. A handful of rows: read when needed, so that a change of state is seen at once."""
    rows = await conn.fetch(
        "SELECT instrument_id, number, base_asset, quote_asset, tick_size, lot_size, min_notional, maker_fee_rate,"
        " taker_fee_rate, max_leverage, default_leverage, state, price_band"
        " FROM matching.v_instruments JOIN risk.v_price_bands USING (instrument_id) ORDER BY number"
    )
    return {row["instrument_id"]: Instrument(**row) for row in rows}


async def read_tiers(conn: Connection | Pool) -> dict[str, list[Tier]]:
    """Leverage tiers of every instrument, ascending."""
    tiers: dict[str, list[Tier]] = defaultdict(list)
    for row in await conn.fetch(
        "SELECT instrument_id, notional_from, maintenance_margin_rate, cumulative, max_leverage"
        " FROM risk.v_leverage_tiers ORDER BY instrument_id, tier"
    ):
        tiers[row[0]].append(Tier(*row[1:]))
    return dict(tiers)


@dataclass(frozen=True, slots=True)
class Rules:
    """What the steps know of every instrument."""

    instruments: dict[str, Instrument]
    tiers: dict[str, list[Tier]]


class RuleBook:
    """The rules, read again when they are older than a second: every step needs them, and they hardly ever change.

    Only what is fixed for an instrument may be taken from here (steps, fees, tiers), not its trading state.
    """

    def __init__(self) -> None:
        self._rules: Rules | None = None
        self._read_at = 0.0

    async def rules(self, conn: Connection) -> Rules:
        """Rules of at most FRESH_SECONDS ago."""
        now = time.monotonic()
        if self._rules is None or now - self._read_at > FRESH_SECONDS:
            self._rules = Rules(await read_instruments(conn), await read_tiers(conn))
            self._read_at = now
        return self._rules

"""Says what the mark is, as the market process does: a row for the services, a command for the engine."""

from datetime import UTC, datetime
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal

from activities.matching.steps import append_commands
from domain.clock import to_ms
from domain.instruments import Instrument
from domain.matching import MarkPrice
from storage.db import Pool


async def say_mark(pool: Pool, instrument: Instrument, price: Decimal) -> None:
    """The mark of an instrument is `price` now, for everybody."""
    ticks = price / instrument.tick_size
    floor, ceiling = (int(ticks.to_integral_value(rounding)) for rounding in (ROUND_FLOOR, ROUND_CEILING))
    async with pool.acquire() as conn, conn.transaction():
        await conn.execute(
            "INSERT INTO market.mark_prices (instrument_id, calculated_at, index_price, mark_price, fair_price,"
            " premium_index, funding_basis, source) VALUES ($1, clock_timestamp(), $2, $2, $2, 0, 0, 'simulated')",
            instrument.instrument_id,
            price,
        )
        command = MarkPrice(at=to_ms(datetime.now(UTC)), price=floor, ceiling=ceiling)
        await append_commands(conn, {instrument.instrument_id: [command]})

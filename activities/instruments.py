"""The instruments, read from the matching service's published view."""

from domain.instruments import Instrument
from storage.db import Connection, Pool


async def read_instruments(conn: Connection | Pool) -> dict[str, Instrument]:
    """All instruments by id. A handful of rows: read when needed, so that a change of state is seen at once."""
    rows = await conn.fetch(
        "SELECT instrument_id, number, base_asset, quote_asset, tick_size, lot_size, min_notional, maker_fee_rate,"
        " taker_fee_rate, max_leverage, default_leverage, state FROM matching.v_instruments ORDER BY number"
    )
    return {row["instrument_id"]: Instrument(**row) for row in rows}

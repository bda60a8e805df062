"""What the matching service shows of its instruments."""

from activities.matching.instruments import read_instruments
from domain.problems import Problem
from storage.db import Connection, Pool


async def require_asset(conn: Connection | Pool, asset: str) -> None:
    """Raises Problem VALIDATION_FAILED unless some instrument is settled in this asset."""
    if not await conn.fetchval("SELECT EXISTS (SELECT FROM matching.v_instruments WHERE quote_asset = $1)", asset):
        raise Problem("VALIDATION_FAILED", f"{asset} is not an asset of this exchange")


async def require_instrument(conn: Connection | Pool, instrument_id: str) -> None:
    """Raises Problem INSTRUMENT_NOT_FOUND unless there is this instrument."""
    if instrument_id not in await read_instruments(conn):
        raise Problem("INSTRUMENT_NOT_FOUND", f"There is no instrument {instrument_id!r}")

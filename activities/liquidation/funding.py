"""Funding that is due comes before what may be lost in a liquidation."""

from decimal import Decimal

from activities.risk.collateral import read_collateral
from domain.money import ZERO
from storage.db import Connection


async def less_funding(conn: Connection, user_id: int, asset: str, held: Decimal, *, is_cross: bool) -> Decimal:
    """What is left of what is `held` behind a position (>= 0) once its user has paid the funding that is due: from the
    margin of an isolated one only what nothing else is available for."""
    collateral = (await read_collateral(conn, [user_id]))[user_id, asset]
    owed = collateral.funding_owed - (ZERO if is_cross else collateral.available)
    return max(ZERO, held - max(ZERO, owed))

"""Whether the market is served: by this process, or by another one for which it stands by."""

from datetime import UTC, datetime

from redis.asyncio import Redis

from storage.db import Pool
from storage.reference_prices import marks_are_live, read_reference_prices
from telemetry.health import Checks, NotReadyError


def market_checks(pool: Pool, redis: Redis) -> Checks:
    """The checks of the market process. A frozen index is the index's fault: mark prices need only be looked after."""

    async def marks() -> None:
        names: list[str] = [row[0] for row in await pool.fetch("SELECT instrument_id FROM matching.v_instruments")]
        found, now = await read_reference_prices(redis, names), datetime.now(UTC)
        looked_after = {name for name, price in found.items() if price.is_frozen or marks_are_live(price, now)}
        late = [name for name in names if name not in looked_after]
        if late:
            raise NotReadyError(f"No fresh mark price of {late}")

    return {"postgres": lambda: pool.fetchval("SELECT 1"), "redis": redis.ping, "marks": marks}

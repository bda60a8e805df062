"""Whether the market is served: by this process, or by another one for which it stands by."""

from collections.abc import Sequence
from datetime import UTC, datetime

from redis.asyncio import Redis

from monitors.observer import is_stale, read_marks
from storage.db import Pool
from telemetry.health import Checks, NotReadyError


def market_checks(pool: Pool, redis: Redis) -> Checks:
    """The checks of the market process. A frozen index is the index's fault: mark prices need only be looked after."""

    async def marks() -> None:
        names: Sequence[str] = [row[0] for row in await pool.fetch("SELECT instrument_id FROM matching.v_instruments")]
        found, now = await read_marks(redis, names), datetime.now(UTC)
        late = [
            name for name in names if name not in found or (is_stale(found[name], now) and not found[name].is_frozen)
        ]
        if late:
            raise NotReadyError(f"No fresh mark price of {late}")

    return {"postgres": lambda: pool.fetchval("SELECT 1"), "redis": redis.ping, "marks": marks}

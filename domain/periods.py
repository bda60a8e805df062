"""The periods of klines, by the names under which clients ask for them."""

PERIODS_MS = {
    "1m": 60_000,
    "5m": 5 * 60_000,
    "15m": 15 * 60_000,
    "1h": 3_600_000,
    "4h": 4 * 3_600_000,
    "1d": 24 * 3_600_000,
}


def open_time(at_ms: int, period_ms: int) -> int:
    """When the bucket of the Unix milliseconds `at_ms` begins: a multiple of the period since the epoch (UTC)."""
    return at_ms - at_ms % period_ms

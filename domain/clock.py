"""Times on the wire: ISO-8601 UTC with milliseconds."""

from datetime import UTC, datetime


def iso(moment: datetime) -> str:
    """`moment` (aware) as ``2026-01-31T09:30:00.123Z``."""
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def from_ms(unix_ms: int) -> datetime:
    """The aware UTC datetime of Unix milliseconds, exact."""
    seconds, ms = divmod(unix_ms, 1000)
    return datetime.fromtimestamp(seconds, UTC).replace(microsecond=ms * 1000)

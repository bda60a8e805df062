"""Times on the wire (ISO-8601 UTC with milliseconds) and in the engine's log (Unix milliseconds)."""

from datetime import UTC, datetime, timedelta

_EPOCH = datetime.fromtimestamp(0, UTC)
_MS = timedelta(milliseconds=1)


def iso(moment: datetime) -> str:
    """`moment` (aware) as ``2026-01-31T09:30:00.123Z``."""
    utc = moment if moment.tzinfo is UTC else moment.astimezone(UTC)
    # Formatted without the offset, then with the Z that stands for it.
    return utc.replace(tzinfo=None).isoformat(timespec="milliseconds") + "Z"


def from_ms(unix_ms: int) -> datetime:
    """The aware UTC datetime of Unix milliseconds, exact."""
    seconds, ms = divmod(unix_ms, 1000)
    return datetime.fromtimestamp(seconds, UTC).replace(microsecond=ms * 1000)


def to_ms(moment: datetime) -> int:
    """Unix milliseconds of `moment` (aware), rounded down."""
    return (moment - _EPOCH) // _MS

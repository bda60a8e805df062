"""Times on the wire and in the engine's log."""

from datetime import UTC, datetime, timedelta, timezone

from hypothesis import given
from hypothesis import strategies as st

from domain.clock import from_ms, iso, to_ms

MOMENTS = st.datetimes(datetime(2000, 1, 1), datetime(2100, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001 - bounds


@given(st.integers(0, 4_102_444_800_000))
def test_milliseconds_become_a_moment_and_back(unix_ms: int) -> None:
    assert to_ms(from_ms(unix_ms)) == unix_ms


@given(MOMENTS)
def test_a_moment_in_milliseconds_is_rounded_down(moment: datetime) -> None:
    assert timedelta(0) <= moment - from_ms(to_ms(moment)) < timedelta(milliseconds=1)


def test_a_time_is_written_in_utc_with_milliseconds() -> None:
    moment = datetime(2026, 1, 31, 10, 30, 0, 123_999, timezone(timedelta(hours=1)))
    assert iso(moment) == "2026-01-31T09:30:00.123Z"

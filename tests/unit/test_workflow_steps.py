"""How long workflows pause before they try again."""

from datetime import timedelta

import pytest

from workflows.steps import BUSY_PAUSE, BUSY_PAUSE_MAX, pause_before

MILLISECONDS = timedelta(milliseconds=1)


def test_pauses_begin_at_ten_milliseconds_and_double_up_to_five_seconds() -> None:
    pauses = [pause_before(wait, BUSY_PAUSE, BUSY_PAUSE_MAX) // MILLISECONDS for wait in range(1, 13)]
    assert pauses == [10, 20, 40, 80, 160, 320, 640, 1280, 2560, 5000, 5000, 5000]


@pytest.mark.parametrize("wait", [31, 32, 63, 64, 1023, 1024, 1025, 10**6, 10**30])
def test_pauses_stay_the_longest_however_often(wait: int) -> None:
    assert pause_before(wait, BUSY_PAUSE, BUSY_PAUSE_MAX) == BUSY_PAUSE_MAX


def test_a_pause_is_never_longer_than_the_longest() -> None:
    assert pause_before(1, timedelta(seconds=9), BUSY_PAUSE_MAX) == BUSY_PAUSE_MAX

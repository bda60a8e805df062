"""When settlement is told of progress, and when it need not be."""

from engine.signaller import REPEAT_SECONDS, Progress

SOON = 0.1
LATE = REPEAT_SECONDS + SOON


def signalled(head: int, acked: int = 0) -> Progress:
    """Settlement was told of `head`, the call is over, and it has acknowledged `acked`."""
    progress = Progress(head=head)
    progress.observe(0, head)
    progress.begin(now=0.0)
    progress.in_flight = False
    progress.observe(acked, head)
    return progress


def test_new_events_are_signalled_when_settlement_may_be_idle() -> None:
    assert Progress(head=5).is_due(SOON)


def test_nothing_is_signalled_when_all_is_settled() -> None:
    assert not signalled(head=5, acked=5).is_due(LATE)


def test_nothing_is_signalled_while_a_signal_is_under_way() -> None:
    progress = Progress(head=5)
    progress.begin(now=0.0)
    progress.head = 9
    assert not progress.is_due(LATE)


def test_nothing_is_signalled_while_settlement_is_behind_the_last_signal() -> None:
    progress = signalled(head=5, acked=3)
    progress.head = 9
    assert not progress.is_due(SOON)


def test_settlement_that_has_reached_the_last_signal_is_told_of_the_rest() -> None:
    progress = signalled(head=5, acked=5)
    progress.head = 9
    assert progress.is_due(SOON)


def test_settlement_that_acknowledged_after_a_commit_goes_on_to_it_by_itself() -> None:
    progress = signalled(head=5)
    progress.head = 9
    progress.observe(0, head=9)
    progress.observe(5, head=9)
    assert not progress.is_due(SOON)
    progress.head = 12
    progress.observe(9, head=12)
    assert progress.is_due(SOON)


def test_settlement_that_lags_is_told_again_after_a_while() -> None:
    progress = signalled(head=5, acked=3)
    assert not progress.is_due(SOON)
    assert progress.is_due(LATE)

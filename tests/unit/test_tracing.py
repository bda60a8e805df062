"""What leads from one trace to another."""

from opentelemetry.trace import SpanContext, TraceFlags

from telemetry.tracing import Trails


def context(number: int) -> SpanContext:
    return SpanContext(number, number, is_remote=False, trace_flags=TraceFlags(TraceFlags.SAMPLED))


def test_a_saga_takes_each_request_once_in_the_order_of_its_orders() -> None:
    trails = Trails()
    trails.remember([1, 3], context(10))
    trails.remember([2], context(20))
    assert trails.take([1, 2, 3]) == [context(10), context(20)]


def test_what_was_taken_is_forgotten() -> None:
    trails = Trails()
    trails.remember([1, 2], context(10))
    assert trails.take([2]) == [context(10)]
    assert trails.take([2]) == []
    assert trails.take([1]) == [context(10)]


def test_orders_of_untraced_requests_leave_nothing() -> None:
    trails = Trails()
    trails.remember([1], None)
    assert trails.take([1]) == []

"""What leads from one trace to another."""

from opentelemetry.trace import SpanContext, TraceFlags
from redis.asyncio import Redis

from telemetry.tracing import NOTE_SECONDS, Trails, note_orders, noted


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


async def test_the_engine_finds_the_traces_that_were_left_for_orders_each_once(redis: Redis) -> None:
    await note_orders(redis, [1, 3], context(10))
    await note_orders(redis, [2], context(20))
    found = await noted(redis, [1, 2, 3, 4])
    assert [(one.trace_id, one.span_id) for one in found] == [(10, 10), (20, 20)]
    assert all(one.is_remote and one.trace_flags.sampled for one in found)
    assert await noted(redis, []) == []


async def test_traces_left_for_orders_go_by_themselves(redis: Redis) -> None:
    await note_orders(redis, [1], context(10))
    keys = await redis.keys("trace:*")
    assert [0 < await redis.ttl(key) <= NOTE_SECONDS for key in keys] == [True]

"""Traces of OpenTelemetry: off unless EXCHANGE_OTLP_ENDPOINT names a receiver.

A request is one trace; FastAPI makes its first span. Orders of many requests share a placement saga, so the saga's span
is the child of the first request and *linked* to the others; workflow and activities follow it as Temporal hands the
context on in headers. The command log must stay the same byte for byte, so what the engine does is found the other way
round: the context of each order lies beside the log for some minutes, in Redis under the order's id, and the engine
asks for it after the commit. What is lost of that costs a span, never an order.

How much is sampled is OpenTelemetry's own setting: OTEL_TRACES_SAMPLER and OTEL_TRACES_SAMPLER_ARG.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import cast

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Link, NonRecordingSpan, SpanContext, SpanKind
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from redis.asyncio import Redis
from redis.exceptions import RedisError
from temporalio.contrib.opentelemetry import TracingInterceptor

log = logging.getLogger(__name__)

# For how long the engine may take to come to an order, so that its span still finds its trace.
NOTE_SECONDS = 300
_propagator = TraceContextTextMapPropagator()
_tracer = trace.get_tracer("saga-exchange")


def start_tracing(service: str, endpoint: str | None) -> None:
    """Send the traces of this process to `endpoint` as those of `service`; nothing happens without one."""
    if endpoint is None or is_on():
        return
    # Half of our memory's worth of packages, for those who want traces.
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    provider = TracerProvider(resource=Resource({SERVICE_NAME: service}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(f"{endpoint.rstrip('/')}/v1/traces")))
    trace.set_tracer_provider(provider)


def stop_tracing() -> None:
    """Send what is left; this may take as long as the receiver."""
    provider = trace.get_tracer_provider()
    if isinstance(provider, TracerProvider):
        provider.shutdown()


def is_on() -> bool:
    """Whether this process makes traces."""
    return isinstance(trace.get_tracer_provider(), TracerProvider)


def temporal_interceptors() -> list[TracingInterceptor]:
    """What hands traces on through workflows and activities."""
    return [TracingInterceptor()] if is_on() else []


def current() -> SpanContext | None:
    """The span that this task is in, if it is being recorded."""
    span = trace.get_current_span()
    return span.get_span_context() if span.is_recording() else None


@contextmanager
def span(name: str, contexts: Sequence[SpanContext], attributes: Mapping[str, str | int]) -> Iterator[SpanContext]:
    """A span that goes on from the first of `contexts` and is linked to the others."""
    with _tracer.start_as_current_span(
        name,
        _continued(contexts),
        kind=SpanKind.INTERNAL,
        attributes=attributes,
        links=[Link(context) for context in contexts[1:]],
    ) as opened:
        yield opened.get_span_context()


def past_span(
    name: str, contexts: Sequence[SpanContext], attributes: Mapping[str, str | int], start_ns: int, end_ns: int
) -> None:
    """A span of something that is over; times are Unix nanoseconds."""
    _tracer.start_span(
        name,
        _continued(contexts),
        kind=SpanKind.CONSUMER,
        attributes=attributes,
        links=[Link(context) for context in contexts[1:]],
        start_time=start_ns,
    ).end(end_ns)


def _continued(contexts: Sequence[SpanContext]) -> Context:
    return trace.set_span_in_context(NonRecordingSpan(contexts[0])) if contexts else Context()


async def note_orders(redis: Redis, order_ids: Iterable[int], context: SpanContext) -> None:
    """Leave the trace of orders beside the log. An outage of Redis loses it."""
    carrier: dict[str, str] = {}
    _propagator.inject(carrier, trace.set_span_in_context(NonRecordingSpan(context)))
    try:
        async with redis.pipeline(transaction=False) as pipe:
            for order_id in order_ids:
                pipe.set(_key(order_id), carrier["traceparent"], ex=NOTE_SECONDS)
            await pipe.execute()
    except (RedisError, OSError) as error:
        log.warning("The trace of some orders is lost: %r", error)


async def noted(redis: Redis, order_ids: Sequence[int]) -> list[SpanContext]:
    """The traces that were left for these orders, each once, in the order of the orders."""
    if not order_ids:
        return []
    values = cast(list[bytes | None], await redis.mget([_key(order_id) for order_id in order_ids]))
    return [_context(value) for value in dict.fromkeys(values) if value is not None]


def _context(value: bytes) -> SpanContext:
    carried = _propagator.extract({"traceparent": value.decode()})
    return trace.get_current_span(carried).get_span_context()


def _key(order_id: int) -> str:
    return f"trace:{order_id}"


class Trails:
    """From which requests the orders of this process came, until their saga starts; empty while tracing is off."""

    def __init__(self) -> None:
        self._contexts: dict[int, SpanContext] = {}

    def remember(self, order_ids: Iterable[int], context: SpanContext | None) -> None:
        """These orders came in the span `context`."""
        if context is not None:
            self._contexts.update(dict.fromkeys(order_ids, context))

    def take(self, order_ids: Iterable[int]) -> list[SpanContext]:
        """The spans of these orders, each once, which are then forgotten."""
        if not self._contexts:
            return []
        taken = (self._contexts.pop(order_id, None) for order_id in order_ids)
        return list({context.span_id: context for context in taken if context is not None}.values())

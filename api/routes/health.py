"""Probes and figures: is the process alive, can it reach what it needs, and how does it do."""

from fastapi import APIRouter, Response
from fastapi.responses import PlainTextResponse

from api.schema.models import ApiModel
from api.state import State
from clients import server_checks
from domain.problems import Problem
from telemetry.health import failures
from telemetry.metrics import CONTENT_TYPE, exposition

router = APIRouter(tags=["health"])

METRICS_EXAMPLE = {"text/plain": {"schema": {"type": "string"}, "example": "exchange_orders_total 42\n"}}


class Health(ApiModel):
    """`status` is UP; a probe that fails answers with a problem document instead."""

    status: str


@router.get("/health/live")
async def live() -> Health:
    """Whether the process serves requests."""
    return Health(status="UP")


@router.get("/health/ready")
async def ready(state: State) -> Health:
    """Whether Postgres, Redis and Temporal answer within two seconds; 503 names those that do not."""
    failed = await failures(server_checks(state.pool, state.redis, state.temporal))
    if failed:
        raise Problem("OVERLOADED", f"Not reachable: {', '.join(failed)}", failed=failed)
    return Health(status="UP")


@router.get("/metrics", response_class=PlainTextResponse, responses={200: {"content": METRICS_EXAMPLE}})
async def metrics() -> Response:
    """The figures of this process in Prometheus' text format. For the operators' network: a proxy keeps others out."""
    return Response(exposition(), media_type=CONTENT_TYPE)

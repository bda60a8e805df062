"""Probes: is the process alive, and can it reach what it needs."""

import asyncio
from collections.abc import Awaitable
from datetime import timedelta

from fastapi import APIRouter

from api.models import ApiModel
from api.state import AppState, State
from domain.problems import Problem

CHECK_SECONDS_MAX = 2.0

router = APIRouter(prefix="/health", tags=["health"])


class Health(ApiModel):
    """`status` is UP; a probe that fails answers with a problem document instead."""

    status: str


@router.get("/live")
async def live() -> Health:
    """Whether the process serves requests."""
    return Health(status="UP")


@router.get("/ready")
async def ready(state: State) -> Health:
    """Whether Postgres, Redis and Temporal answer within two seconds; 503 names those that do not."""
    checks = _checks(state)
    answers = await asyncio.gather(*map(_answers, checks.values()))
    failed = [name for name, answered in zip(checks, answers, strict=True) if not answered]
    if failed:
        raise Problem("OVERLOADED", f"Not reachable: {', '.join(failed)}", failed=failed)
    return Health(status="UP")


def _checks(state: AppState) -> dict[str, Awaitable[object]]:
    return {
        "postgres": state.pool.fetchval("SELECT 1"),
        "redis": state.redis.ping(),
        "temporal": state.temporal.service_client.check_health(timeout=timedelta(seconds=CHECK_SECONDS_MAX)),
    }


async def _answers(check: Awaitable[object]) -> bool:
    try:
        async with asyncio.timeout(CHECK_SECONDS_MAX):
            await check
    # Whatever a driver raises means the same here: it does not answer.
    except Exception:
        return False
    return True

"""How workflows run their steps: fast when all is well, visible to an operator when not."""

import asyncio
from datetime import timedelta
from typing import Any, TypeVar

from temporalio import workflow
from temporalio.common import RetryPolicy
from temporalio.exceptions import ActivityError, ApplicationError, FailureError, is_cancelled_exception

T = TypeVar("T")

LOCAL_ATTEMPTS = RetryPolicy(initial_interval=timedelta(milliseconds=50), backoff_coefficient=3.0, maximum_attempts=4)
# The first pause of a saga that another one keeps waiting, and the longest.
BUSY_PAUSE = timedelta(milliseconds=10)
BUSY_PAUSE_MAX = timedelta(seconds=5)
# Doubled so often, any first pause is longer than any longest one: beyond, the figure would only grow out of bounds.
DOUBLINGS_MAX = 30
VISIBLE_ATTEMPTS = RetryPolicy(initial_interval=timedelta(seconds=1), maximum_interval=timedelta(seconds=30))


async def run_step(name: str, arg: Any, result: type[T], summary: str = "") -> T:
    """Run an idempotent activity to its end, however long that takes.

    First as a local activity (no round trip to the server). When a few quick attempts fail, as a regular one that
    is retried for ever: the operator then sees it pending in the Temporal UI, with its last failure, also in the
    workflow's current details, and may mend the cause, reset or cancel. A failure marked non-retryable is raised at
    once.
    """
    try:
        return await workflow.execute_local_activity(  # type: ignore[no-any-return]  # name-based call: untyped
            name,
            arg,
            result_type=result,
            start_to_close_timeout=timedelta(seconds=5),
            schedule_to_close_timeout=timedelta(seconds=8),
            retry_policy=LOCAL_ATTEMPTS,
            summary=summary or None,
        )
    except FailureError as error:
        cause = cause_of(error)
        if is_cancelled_exception(error) or (isinstance(cause, ApplicationError) and cause.non_retryable):
            raise
        workflow.logger.warning("Step %s failed locally, retrying visibly: %s", name, cause)
        before = workflow.get_current_details()
        workflow.set_current_details(f"{before}: {name} is tried again after {cause}")
    done: T = await workflow.execute_activity(
        name,
        arg,
        result_type=result,
        start_to_close_timeout=timedelta(seconds=30),
        retry_policy=VISIBLE_ATTEMPTS,
        summary=summary or None,
    )
    workflow.set_current_details(before)
    return done


def pause_before(wait: int, first: timedelta, longest: timedelta) -> timedelta:
    """How long to pause the `wait`-th time (from 1), however often that is: `first`, then twice as long each time."""
    doublings = min(max(wait - 1, 0), DOUBLINGS_MAX)
    return min(first * (1 << doublings), longest)


async def busy_pause(wait: int) -> None:
    """Let another saga go first, the `wait`-th time (from 1)."""
    await asyncio.sleep(pause_before(wait, BUSY_PAUSE, BUSY_PAUSE_MAX).total_seconds())


def cause_of(error: FailureError) -> BaseException | None:
    """What a step failed of: a local activity raises it as it is, a regular one (or a time-out) as ActivityError."""
    return error.cause if isinstance(error, ActivityError) else error

"""How a task waits that outlives outages: for some time, for an event, and no longer than it is wanted.

A cancellation can get lost on its way: when it comes at the moment in which a connection breaks, the failure of the
rollback, or of the return to the pool, takes its place; and redis-py, where it sends with asyncio.wait_for, may swallow
it on Python 3.11. Whoever then waits the outage out would work for ever. But the task remembers, and is asked here.
"""

import asyncio


def end_if_cancelled() -> None:
    """Raises CancelledError when the task at hand was told to end."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


async def pause(seconds: float) -> None:
    """Sleep between two tries. Raises CancelledError also when the task was told to end before."""
    end_if_cancelled()
    await asyncio.sleep(seconds)


async def wait_for_event(event: asyncio.Event, seconds: float) -> bool:
    """Whether `event` was set within `seconds`. Raises CancelledError also when the task was told to end before."""
    end_if_cancelled()
    try:
        async with asyncio.timeout(seconds):
            return await event.wait()
    except TimeoutError:
        return False

"""Is a process alive, and can it do its work: checks that every process answers in the same way."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping

CHECK_SECONDS_MAX = 2.0

# Raises when what it looks at is not well.
Check = Callable[[], Awaitable[object]]
Checks = Mapping[str, Check]


# Checks that are given up and have not ended yet: the event loop itself would forget them.
_late: set["asyncio.Future[object]"] = set()


class NotReadyError(Exception):
    """Why a part of the process cannot do its work now."""


async def failures(checks: Checks) -> list[str]:
    """The names of the checks that raise, or that do not answer within two seconds."""
    answers = await asyncio.gather(*(_answers(check()) for check in checks.values()))
    return [name for name, answered in zip(checks, answers, strict=True) if not answered]


async def _answers(check: Awaitable[object]) -> bool:
    task = asyncio.ensure_future(check)
    # Not a time-out around it: a cancelled query of asyncpg ends only when the server takes notice.
    done, _ = await asyncio.wait([task], timeout=CHECK_SECONDS_MAX)
    if not done:
        _late.add(task)
        task.add_done_callback(_ended)
        task.cancel()
        return False
    # Whatever a driver raises means the same here: it does not answer.
    return not task.cancelled() and task.exception() is None


def _ended(task: "asyncio.Future[object]") -> None:
    _late.discard(task)
    if not task.cancelled():
        task.exception()

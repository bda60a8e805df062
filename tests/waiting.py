"""Waiting for what other processes do."""

import asyncio
from collections.abc import Awaitable, Callable

# A revocation that is not pushed is found by looking after a minute. How soon it arrives: `python -m bench revocation`.
PUSHED_SECONDS = 5.0


async def until(condition: Callable[[], Awaitable[bool]], seconds: float, what: str) -> None:
    """Returns when the condition holds. Fails after `seconds`."""
    clock = asyncio.get_running_loop().time
    end = clock() + seconds
    while not await condition():
        assert clock() < end, f"Waited {seconds:g} s for {what}"
        await asyncio.sleep(0.03)

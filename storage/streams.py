"""What Redis tells of an event stream."""

from typing import Any

from redis.asyncio import Redis
from redis.exceptions import ResponseError


async def read_info(redis: Redis, topic: str) -> dict[str, Any] | None:
    """XINFO STREAM of a topic; None before its first entry."""
    try:
        info: dict[str, Any] = await redis.xinfo_stream(topic)
    except ResponseError as error:
        if "no such key" not in str(error):
            raise
        return None
    return info

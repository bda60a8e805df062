"""How often somebody may call: GCRA in Redis, for all api processes together.

A process takes tokens a tenth of a second's worth at a time and spends them by itself, so that a busy caller costs
Redis ten calls a second and not one a request. Tokens that are not spent within a second lapse; they are few beside
the burst. Redis away does not stop anybody: what needs it fails by itself.
"""

import asyncio
import logging
import math
import time
from dataclasses import dataclass
from functools import cached_property, partial
from typing import cast

from redis.asyncio import Redis
from redis.exceptions import RedisError

from domain.problems import Problem

log = logging.getLogger(__name__)

LEASE_SECONDS = 0.1
LEASE_LIFETIME_SECONDS = 1.0
LEASES_MAX = 50_000
REDIS_SECONDS_MAX = 0.5

# The key holds the theoretical arrival time (µs): how far ahead of now it is says how much of the burst is spent.
# ARGV: µs a token, burst, tokens wanted. Answers tokens granted, tokens left, µs until there is one again.
_TAKE = """
local t = redis.call('TIME')
local now = t[1] * 1000000 + t[2]
local each = tonumber(ARGV[1])
local ahead = math.max(tonumber(redis.call('GET', KEYS[1]) or 0) - now, 0)
local room = math.max(math.floor(tonumber(ARGV[2]) - ahead / each), 0)
local granted = math.min(tonumber(ARGV[3]), room)
if granted == 0 then return {0, 0, math.ceil(ahead - (tonumber(ARGV[2]) - 1) * each)} end
ahead = ahead + granted * each
redis.call('SET', KEYS[1], string.format('%.0f', now + ahead), 'PX', math.ceil(ahead / 1000) + 1)
return {granted, room - granted, 0}
"""


@dataclass(frozen=True)
class Limit:
    """So many requests a second in the long run, `burst` of them at once. 0 a second means no limit."""

    name: str
    per_second: float
    burst: int

    @cached_property
    def _policy(self) -> bytes:
        return f'"{self.name}";q={self.burst};w={math.ceil(self.burst / self.per_second)}'.encode()

    def headers(self, remaining: int) -> list[tuple[bytes, bytes]]:
        """RateLimit-Policy and RateLimit (draft-ietf-httpapi-ratelimit-headers): quota and window in seconds; what is
        left, and in how many seconds it will be the whole quota again."""
        reset = math.ceil((self.burst - remaining) / self.per_second)
        state = f'"{self.name}";r={remaining};t={reset}'.encode()
        return [(b"ratelimit-policy", self._policy), (b"ratelimit", state)]


@dataclass(slots=True)
class _Lease:
    tokens: int
    # What was left in Redis.
    left: int
    until: float
    # Redis had none: nobody gets any before `until`.
    denied: bool = False


class RateLimiter:
    """Spends the tokens of limits."""

    def __init__(self, redis: Redis) -> None:
        self._take = redis.register_script(_TAKE)
        self._leases: dict[tuple[str, str], _Lease] = {}
        self._asking: dict[tuple[str, str], asyncio.Task[None]] = {}

    async def spend(self, limit: Limit, who: str) -> int:
        """One request of `who`; how many more there may be at once. Raises Problem RATE_LIMITED."""
        if not limit.per_second:
            return limit.burst
        key = limit.name, who
        while True:
            lease = self._leases.get(key)
            now = time.monotonic()
            if lease is not None and now < lease.until:
                if lease.tokens:
                    lease.tokens -= 1
                    return lease.tokens + lease.left
                if lease.denied:
                    seconds = max(1, math.ceil(lease.until - now))
                    raise Problem("RATE_LIMITED", f"Too many requests; wait {seconds} s", retryAfter=seconds)
            await self._renewed(key, limit)

    async def _renewed(self, key: tuple[str, str], limit: Limit) -> None:
        task = self._asking.get(key)
        # One that is done may not be waited for: that gives the loop no turn, and `spend` would ask for ever.
        if task is None or task.done():
            task = self._asking[key] = asyncio.create_task(self._ask(key, limit))
            task.add_done_callback(partial(self._asked, key))
        # Shielded: a client that goes away must not cancel the answer of the others.
        await asyncio.shield(task)

    def _asked(self, key: tuple[str, str], task: asyncio.Task[None]) -> None:
        if self._asking.get(key) is task:
            del self._asking[key]

    async def _ask(self, key: tuple[str, str], limit: Limit) -> None:
        wanted = max(1, int(limit.per_second * LEASE_SECONDS))
        arguments = [1_000_000 / limit.per_second, limit.burst, wanted]
        try:
            async with asyncio.timeout(REDIS_SECONDS_MAX):
                answer = await self._take(keys=[f"api:rate:{key[0]}:{key[1]}"], args=arguments)
        except (RedisError, OSError, TimeoutError) as error:
            log.warning("Rates cannot be limited: %r", error)
            self._keep(key, _Lease(limit.burst, 0, time.monotonic() + LEASE_LIFETIME_SECONDS))
            return
        granted, left, wait_us = cast(list[int], answer)
        # A flood is not worth a call for every token that comes back.
        lifetime = LEASE_LIFETIME_SECONDS if granted else max(wait_us / 1_000_000, LEASE_SECONDS)
        self._keep(key, _Lease(granted, left, time.monotonic() + lifetime, denied=not granted))

    def _keep(self, key: tuple[str, str], lease: _Lease) -> None:
        self._leases.pop(key, None)
        self._leases[key] = lease
        if len(self._leases) > LEASES_MAX:
            del self._leases[next(iter(self._leases))]

"""Throttling of password checks: by account and by address, counted in Redis for all api processes together.

An attempt is counted before its password is looked at, so that guesses sent at the same time count too, and taken
back when it was right. Unknown addresses are treated like accounts: nobody learns which ones exist.
"""

import hashlib
import math
from dataclasses import dataclass
from typing import cast

from redis.asyncio import Redis

from api.identity.addresses import Address, network_of
from domain.problems import Problem

# Failures that cost no delay; then 1 s, doubled with each further one.
ACCOUNT_FREE = 10
ADDRESS_FREE = 50
DELAY_SECONDS_MAX = 60
# Consecutive failures after which an account is locked (NIST SP 800-63B: no more than 100), and for how long.
LOCK_AFTER = 100
LOCK_SECONDS = 3600
# Failures are forgotten when none has come for so long. An address is shared by many, so it is forgiven sooner.
ACCOUNT_WINDOW_SECONDS = 24 * 3600
ADDRESS_WINDOW_SECONDS = 900

# A hash per key: n, the failures; at, the time (µs) before which the next attempt is refused.
_ADMIT = """
local t = redis.call('TIME')
local now = t[1] * 1000000 + t[2]
local wait = 0
for i = 1, 2 do
    local at = tonumber(redis.call('HGET', KEYS[i], 'at') or 0)
    if at > now then wait = math.max(wait, at - now) end
end
local lock_after = tonumber(ARGV[6])
local failures = tonumber(redis.call('HGET', KEYS[1], 'n') or 0)
if failures >= lock_after then return {-1, redis.call('PTTL', KEYS[1])} end
if wait > 0 then return {0, math.ceil(wait / 1000)} end
for i = 1, 2 do
    local n = redis.call('HINCRBY', KEYS[i], 'n', 1)
    local over = n - tonumber(ARGV[i])
    if over > 0 then
        local delay = math.min(2 ^ (over - 1), tonumber(ARGV[5]))
        redis.call('HSET', KEYS[i], 'at', string.format('%.0f', now + delay * 1000000))
    end
    redis.call('EXPIRE', KEYS[i], ARGV[i + 2])
    if i == 1 then failures = n end
end
if failures >= lock_after then redis.call('EXPIRE', KEYS[1], ARGV[7]) end
return {failures, 0}
"""
_TAKE_BACK = """
for i = 1, 2 do
    if redis.call('EXISTS', KEYS[i]) == 1 then
        if redis.call('HINCRBY', KEYS[i], 'n', -1) <= 0 then
            redis.call('DEL', KEYS[i])
        else
            redis.call('HDEL', KEYS[i], 'at')
        end
    end
end
"""


@dataclass(frozen=True)
class Attempt:
    """A password check that was let through; `failures` of the account in a row, this one included."""

    account_key: str
    address_key: str
    failures: int

    @property
    def locks(self) -> bool:
        """Whether the account is locked if this one fails."""
        return self.failures >= LOCK_AFTER


class LoginThrottle:
    """Lets password checks through, ever more slowly after failures."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._admit = redis.register_script(_ADMIT)
        self._take_back = redis.register_script(_TAKE_BACK)

    async def admit(self, email: str, ip: Address | None) -> Attempt:
        """Count an attempt as failed. Raises Problem RATE_LIMITED while the account or the address must wait, and
        CREDENTIAL_LOCKED when the account has failed `LOCK_AFTER` times in a row; the password is not looked at then.
        """
        keys = [_account_key(email), _address_key(ip)]
        limits = [ACCOUNT_FREE, ADDRESS_FREE, ACCOUNT_WINDOW_SECONDS, ADDRESS_WINDOW_SECONDS]
        answer = await self._admit(keys=keys, args=[*limits, DELAY_SECONDS_MAX, LOCK_AFTER, LOCK_SECONDS])
        failures, wait_ms = cast(list[int], answer)
        seconds = max(1, math.ceil(wait_ms / 1000))
        if failures < 0:
            raise locked(seconds)
        if failures == 0:
            raise Problem("RATE_LIMITED", f"Too many failed attempts; wait {seconds} s", retryAfter=seconds)
        return Attempt(keys[0], keys[1], failures)

    async def take_back(self, attempt: Attempt) -> None:
        """The password could not be looked at: the attempt does not count."""
        await self._take_back(keys=[attempt.account_key, attempt.address_key])

    async def succeeded(self, attempt: Attempt) -> None:
        """The password was right: the account's failures are forgotten, the address's are not."""
        await self._redis.delete(attempt.account_key)
        await self._take_back(keys=[attempt.account_key, attempt.address_key])

    async def forget(self, email: str) -> None:
        """Forget the failures of an account, for an operator who unlocks it."""
        await self._redis.delete(_account_key(email))


def locked(seconds: int) -> Problem:
    """What an account that has failed too often is told."""
    return Problem("CREDENTIAL_LOCKED", "Too many failed attempts: the account is locked", retryAfter=seconds)


def _account_key(email: str) -> str:
    return f"auth:failures:account:{hashlib.sha256(email.encode()).hexdigest()}"


def _address_key(ip: Address | None) -> str:
    return f"auth:failures:address:{network_of(ip)}"

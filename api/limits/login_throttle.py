"""Throttling of password checks, counted in Redis for all api processes together (docs/adr/0006).

Failures at an account are counted by the place they come from: a device that signed in to it before, or a network. So
nobody can use up somebody else's attempts. What strangers fail at an account, from everywhere, is counted, too: beyond
a few failures each further stranger must wait, or work. Unknown addresses are treated like accounts: nobody learns
which ones exist. An attempt is counted before its password is looked at, so that guesses sent at the same time count
too, and taken back when it was right.
"""

import hashlib
import math
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import cast

from redis.asyncio import Redis

from api.identity.addresses import Address, network_of
from api.identity.proofs import CHALLENGE_LIFETIME, Proofs, Work
from domain.problems import Problem

# Failures that cost no delay, at an account from one place and at all accounts from one network; then 1 s, doubled
# with each further one.
ACCOUNT_FREE = 10
ADDRESS_FREE = 50
DELAY_SECONDS_MAX = 60
# Consecutive failures at an account from one place after which that place is locked out (NIST SP 800-63B: no more than
# 100), and for how long.
LOCK_AFTER = 100
LOCK_SECONDS = 3600
# Failures of strangers at an account from which on further ones work or wait: so many, of which each network counts for
# at most STRANGER_SHARE, so that it takes several; or LOCK_AFTER of any.
STRANGERS_FREE = 10
STRANGER_SHARE = 3
# How long a stranger waits for one attempt: so long for each STRANGERS_FREE failures of all.
STRANGER_WAIT_SECONDS = 60
STRANGER_WAIT_SECONDS_MAX = 3600
# Work is 2 ** so many hashes, twice as many each time that failures double; and opens one attempt in so many seconds.
WORK_BITS = 18
WORK_BITS_MAX = 24
WORKED_SECONDS = 10
# Failures are forgotten when none has come for so long. An address is shared by many, so it is forgiven sooner.
ACCOUNT_WINDOW_SECONDS = 24 * 3600
ADDRESS_WINDOW_SECONDS = 900
# A network from which somebody signed in is no stranger to the account for so long.
KNOWN_SECONDS = 30 * 24 * 3600

# Hashes: n, the failures; at, the time (µs) before which the next attempt is refused; s of an account, those of
# strangers by their shares. Answers failures (-1: locked, 0: refused), ms to wait, failures of strangers (if it is for
# them that one waits), and whether this one was counted with them: 0, 1 (n), 2 (n and s).
_ADMIT = """
local place, address, account, known, waiting, worked, places = unpack(KEYS)
local device, has_worked = ARGV[1] == '1', ARGV[2] == '1'
local account_free, address_free, delay_max = tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
local lock_after, strangers_free, share = tonumber(ARGV[6]), tonumber(ARGV[7]), tonumber(ARGV[8])
local t = redis.call('TIME')
local now = t[1] * 1000000 + t[2]
local function of(key, field) return tonumber(redis.call('HGET', key, field) or 0) end
local function count(key, free, window)
    local n = redis.call('HINCRBY', key, 'n', 1)
    if n > free then
        local delay = math.min(2 ^ (n - free - 1), delay_max)
        redis.call('HSET', key, 'at', string.format('%.0f', now + delay * 1000000))
    end
    redis.call('EXPIRE', key, window)
    return n
end
if of(place, 'n') >= lock_after then return {-1, redis.call('PTTL', place), 0, 0} end
local wait = of(place, 'at') - now
if not device then wait = math.max(wait, of(address, 'at') - now) end
if wait > 0 then return {0, math.ceil(wait / 1000), 0, 0} end
local stranger = not device and redis.call('EXISTS', known) == 0
if stranger then
    local n = of(account, 'n')
    if n >= lock_after or of(account, 's') >= strangers_free then
        if not (has_worked and redis.call('SET', worked, '', 'NX', 'EX', ARGV[11])) then
            local turn = tonumber(redis.call('GET', waiting) or 0)
            if turn == 0 then
                local each = tonumber(ARGV[12]) * math.ceil(n / strangers_free)
                local seconds = math.min(math.max(each, tonumber(ARGV[12])), tonumber(ARGV[13]))
                turn = now + seconds * 1000000
                redis.call('SET', waiting, string.format('%.0f', turn), 'EX', 2 * seconds + 60)
            end
            if turn > now then return {0, math.ceil((turn - now) / 1000), n, 0} end
            redis.call('DEL', waiting)
        end
    end
end
local failures = count(place, account_free, ARGV[9])
redis.call('SADD', places, place)
redis.call('EXPIRE', places, ARGV[9])
if failures >= lock_after then redis.call('EXPIRE', place, ARGV[14]) end
if not device then count(address, address_free, ARGV[10]) end
if not stranger then return {failures, 0, 0, 0} end
redis.call('HINCRBY', account, 'n', 1)
redis.call('EXPIRE', account, ARGV[9])
if failures > share then return {failures, 0, 0, 1} end
redis.call('HINCRBY', account, 's', 1)
return {failures, 0, 0, 2}
"""
# ARGV: for each key, which field to lower.
_TAKE_BACK = """
for i = 1, #KEYS do
    if redis.call('EXISTS', KEYS[i]) == 1 then
        redis.call('HINCRBY', KEYS[i], ARGV[i], -1)
        redis.call('HDEL', KEYS[i], 'at')
        if tonumber(redis.call('HGET', KEYS[i], 'n') or 0) <= 0 then redis.call('DEL', KEYS[i]) end
    end
end
"""


@dataclass(frozen=True)
class Place:
    """Where an attempt comes from: its network, the device it is known to be (for this account), its work."""

    ip: Address | None
    device_id: str | None = None
    work: Work | None = None


@dataclass(frozen=True)
class Attempt:
    """A password check that was let through; `failures` of this place in a row, this one included."""

    keys: "_Keys"
    is_device: bool
    failures: int
    # How it was counted with strangers: 0, 1 (failures), 2 (and their shares).
    counted: int

    @property
    def locks(self) -> bool:
        """Whether this place is locked out if this one fails."""
        return self.failures >= LOCK_AFTER


@dataclass(frozen=True)
class _Keys:
    place: str
    address: str
    account: str
    known: str
    waiting: str
    worked: str
    places: str

    @classmethod
    def of(cls, email: str, place: Place) -> "_Keys":
        account, network = account_of(email), network_of(place.ip)
        where = network if place.device_id is None else f"device-{place.device_id}"
        return cls(
            place=f"auth:failures:place:{account}:{where}",
            address=f"auth:failures:address:{network}",
            account=f"auth:failures:account:{account}",
            known=f"auth:known:{account}:{network}",
            waiting=f"auth:waiting:{account}:{network}",
            worked=f"auth:worked:{account}",
            places=f"auth:places:{account}",
        )

    def all(self) -> list[str]:
        return [self.place, self.address, self.account, self.known, self.waiting, self.worked, self.places]


class LoginThrottle:
    """Lets password checks through, ever more slowly after failures."""

    def __init__(self, redis: Redis, proofs: Proofs) -> None:
        self._redis = redis
        self._proofs = proofs
        self._admit = redis.register_script(_ADMIT)
        self._take_back = redis.register_script(_TAKE_BACK)

    async def admit(self, email: str, place: Place) -> Attempt:
        """Count an attempt as failed. Raises Problem RATE_LIMITED while the place must wait, with work that is done
        instead where that helps, and CREDENTIAL_LOCKED when it has failed `LOCK_AFTER` times in a row; the password is
        not looked at then.
        """
        now = datetime.now(UTC)
        keys, is_device = _Keys.of(email, place), place.device_id is not None
        has_worked = place.work is not None and await self._is_new_work(place.work, email, now)
        arguments = [
            int(is_device),
            int(has_worked),
            ACCOUNT_FREE,
            ADDRESS_FREE,
            DELAY_SECONDS_MAX,
            LOCK_AFTER,
            STRANGERS_FREE,
            STRANGER_SHARE,
            ACCOUNT_WINDOW_SECONDS,
            ADDRESS_WINDOW_SECONDS,
            WORKED_SECONDS,
            STRANGER_WAIT_SECONDS,
            STRANGER_WAIT_SECONDS_MAX,
            LOCK_SECONDS,
        ]
        answer = await self._admit(keys=keys.all(), args=arguments)
        failures, wait_ms, of_strangers, counted = cast(list[int], answer)
        seconds = max(1, math.ceil(wait_ms / 1000))
        if failures < 0:
            raise locked(seconds)
        if failures == 0 and of_strangers:
            raise self._work_or_wait(email, of_strangers, seconds, now)
        if failures == 0:
            raise Problem("RATE_LIMITED", f"Too many failed attempts; wait {seconds} s", retryAfter=seconds)
        return Attempt(keys, is_device, failures, counted)

    async def take_back(self, attempt: Attempt) -> None:
        """The password could not be looked at: the attempt does not count."""
        await self._uncount(attempt, [(attempt.keys.place, "n")])

    async def succeeded(self, attempt: Attempt) -> None:
        """The password was right: the failures of this place are forgotten, those of others are not."""
        await self._redis.delete(attempt.keys.place)
        await self._redis.set(attempt.keys.known, b"", ex=KNOWN_SECONDS)
        await self._uncount(attempt, [])

    async def forget(self, email: str) -> None:
        """Forget the failures at an account, for an operator who unlocks it."""
        keys = _Keys.of(email, Place(None))
        places = await self._redis.smembers(keys.places)
        await self._redis.delete(keys.account, keys.places, *places)

    async def _uncount(self, attempt: Attempt, lowered: list[tuple[str, str]]) -> None:
        keys = attempt.keys
        if not attempt.is_device:
            lowered.append((keys.address, "n"))
        # Its share before its failure: a hash without failures goes.
        lowered += [(keys.account, field) for field in ("s", "n")[2 - attempt.counted :]]
        if lowered:
            await self._take_back(keys=[key for key, _ in lowered], args=[field for _, field in lowered])

    async def _is_new_work(self, work: Work, email: str, now: datetime) -> bool:
        if not self._proofs.is_done(work, account_of(email), now):
            return False
        name = f"auth:work:{hashlib.sha256(work.challenge.encode()).hexdigest()}"
        return bool(await self._redis.set(name, b"", nx=True, ex=int(CHALLENGE_LIFETIME.total_seconds())))

    def _work_or_wait(self, email: str, failures: int, seconds: int, now: datetime) -> Problem:
        doublings = max(failures // STRANGERS_FREE, 1).bit_length() - 1
        bits = min(WORK_BITS + doublings, WORK_BITS_MAX)
        detail = f"Too many failed attempts at this account; wait {seconds} s, or do the work"
        work = {"challenge": self._proofs.challenge(account_of(email), bits, now), "bits": bits}
        return Problem("RATE_LIMITED", detail, retryAfter=seconds, work=work)


def account_of(email: str) -> str:
    """What an account is called here, whether there is one or not."""
    return hashlib.sha256(email.encode()).hexdigest()


def locked(seconds: int) -> Problem:
    """What a place that has failed too often is told."""
    return Problem("CREDENTIAL_LOCKED", "Too many failed attempts from here: wait, or use another", retryAfter=seconds)

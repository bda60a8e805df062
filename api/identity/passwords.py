"""Argon2id, off the event loop and a few at a time: one hash takes 46 MiB and tens of milliseconds."""

import asyncio
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar, TypeVarTuple

from argon2 import PasswordHasher, Type, extract_parameters
from argon2.exceptions import InvalidHashError, VerificationError

from domain.problems import Problem

HASHER = PasswordHasher(memory_cost=47_104, time_cost=1, parallelism=1)
CONCURRENT_MAX = 4
WAITING_MAX = 64

Arguments = TypeVarTuple("Arguments")
Result = TypeVar("Result")


class Passwords:
    """Hashes and verifies passwords in its own threads. Raises Problem OVERLOADED when too many wait."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(CONCURRENT_MAX, thread_name_prefix="argon2")
        self._waiting = 0
        # What the password of an unknown user is compared with, so that it takes as long as a known one's.
        self._nobody = _hash_of_nobody()

    async def hash(self, password: str) -> str:
        """The Argon2id hash of `password`, with parameters and salt in it."""
        return await self._off_the_loop(HASHER.hash, password)

    async def matches(self, password: str, secret_hash: str | None) -> bool:
        """Whether `password` has this hash; false, after the same time, when there is no hash."""
        matched = await self._off_the_loop(self._verify, password, secret_hash or self._nobody)
        return matched and secret_hash is not None

    def outdated(self, secret_hash: str) -> bool:
        """Whether the hash was made with other parameters than today's."""
        return HASHER.check_needs_rehash(secret_hash)

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown(cancel_futures=True)

    def _verify(self, password: str, secret_hash: str) -> bool:
        try:
            return HASHER.verify(secret_hash, password)
        except (VerificationError, InvalidHashError):
            return False

    async def _off_the_loop(self, work: Callable[[*Arguments], Result], *arguments: *Arguments) -> Result:
        if self._waiting >= WAITING_MAX:
            raise Problem("OVERLOADED", "Too many passwords are being checked; try again shortly")
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)
        finally:
            self._waiting -= 1


@cache
def _hash_of_nobody() -> str:
    return HASHER.hash(secrets.token_urlsafe())


def is_argon2id(secret_hash: str) -> bool:
    """Whether this is a hash `Passwords.matches` can check."""
    try:
        return extract_parameters(secret_hash).type is Type.ID
    except InvalidHashError:
        return False

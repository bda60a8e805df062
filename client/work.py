"""Work instead of waiting, while somebody else guesses at one's account."""

import hashlib
import itertools


def solved(challenge: str, bits: int) -> dict[str, str]:
    """The `work` of a sign-in: with its solution the SHA-256 of `challenge:solution` begins with `bits` zero bits.

    Takes a second to half a minute: not for an event loop.
    """
    for number in itertools.count():
        digest = hashlib.sha256(f"{challenge}:{number}".encode()).digest()
        if int.from_bytes(digest) < 1 << (256 - bits):
            return {"challenge": challenge, "solution": str(number)}
    raise AssertionError("numbers do not end")

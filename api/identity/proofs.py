"""What a client shows of itself before its password is looked at: that an account was signed in to from this device
before, or that it has worked for this attempt. Both are signed here and kept by the client; nothing is stored.

They open nothing: they only say whose failures an attempt is counted with (`api.limits.login_throttle`).
"""

import base64
import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

DEVICE_LIFETIME = timedelta(days=180)
CHALLENGE_LIFETIME = timedelta(minutes=5)
# What else is signed with the key begins otherwise.
_DEVICE = b"device-token:"
_CHALLENGE = b"work-challenge:"


@dataclass(frozen=True)
class Work:
    """A challenge and the text that makes the SHA-256 of `challenge:solution` begin with as many zero bits as asked."""

    challenge: str
    solution: str


class Proofs:
    """Signs with the first key, believes all."""

    def __init__(self, key: Ed25519PrivateKey, others: Sequence[Ed25519PublicKey] = ()) -> None:
        self._key = key
        self._public_keys = [key.public_key(), *others]

    def device_token(self, account: str, now: datetime, device_id: str | None = None) -> str:
        """Says that `account` was signed in to from a device, a new one unless told."""
        device_id = device_id or secrets.token_urlsafe(12)
        until = int((now + DEVICE_LIFETIME).timestamp())
        return self._signed(_DEVICE, f"{device_id}.{until}", account)

    def device_of(self, token: str, account: str, now: datetime) -> str | None:
        """The device of a token that is good for `account`."""
        return self._read(_DEVICE, token, account, now)

    def challenge(self, account: str, bits: int, now: datetime) -> str:
        """Work of 2 ** `bits` hashes on average, for one attempt at `account`."""
        until = int((now + CHALLENGE_LIFETIME).timestamp())
        return self._signed(_CHALLENGE, f"{secrets.token_urlsafe(12)}-{bits}.{until}", account)

    def is_done(self, work: Work, account: str, now: datetime) -> bool:
        """Whether this work was asked for `account`, not long ago, and is done. It may have been shown before."""
        name = self._read(_CHALLENGE, work.challenge, account, now)
        return name is not None and zero_bits(work) >= int(name.rpartition("-")[2])

    def _signed(self, kind: bytes, text: str, account: str) -> str:
        return f"{text}.{_base64url(self._key.sign(_message(kind, text, account)))}"

    def _read(self, kind: bytes, token: str, account: str, now: datetime) -> str | None:
        text, _, signature = token.rpartition(".")
        name, _, until = text.rpartition(".")
        if not (until.isascii() and until.isdigit()) or int(until[:12]) <= now.timestamp():
            return None
        try:
            raw = base64.urlsafe_b64decode(signature + "=" * (-len(signature) % 4))
        except ValueError:
            return None
        message = _message(kind, text, account)
        return name if any(_is_signed(key, raw, message) for key in self._public_keys) else None


def zero_bits(work: Work) -> int:
    """How much work it is."""
    digest = hashlib.sha256(f"{work.challenge}:{work.solution}".encode()).digest()
    return 256 - int.from_bytes(digest).bit_length()


def _message(kind: bytes, text: str, account: str) -> bytes:
    return kind + text.encode() + b"\n" + account.encode()


def _is_signed(key: Ed25519PublicKey, signature: bytes, message: bytes) -> bool:
    try:
        key.verify(signature, message)
    except InvalidSignature:
        return False
    return True


def _base64url(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()

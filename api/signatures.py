"""Requests signed with an API key: what is signed, and the checks before one is believed."""

import hashlib
import hmac
import re
import time
from dataclasses import dataclass
from datetime import datetime
from ipaddress import ip_network

from cryptography.exceptions import InvalidSignature
from cryptography.fernet import InvalidToken, MultiFernet
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from redis.asyncio import Redis
from starlette.requests import Request

from activities.api_keys import ApiKey, find_key
from api.addresses import client_address
from domain.clock import to_ms
from domain.identity import USER_ROLE, Identity
from domain.problems import Problem
from storage.db import Pool

RECV_WINDOW_MS = 5_000
RECV_WINDOW_MS_MAX = 60_000
# How far ahead of ours a client's clock may be.
AHEAD_MS_MAX = 1_000
# A key is read again after this time in any case; a revocation that is heard acts at once.
REMEMBERED_SECONDS = 1.0
REMEMBERED_MAX = 10_000
_NUMBER = re.compile(r"[0-9]{1,15}")
_NONCE = re.compile(r"[\x21-\x7e]{0,64}")
_SAFE_METHODS = ("GET", "HEAD")
_KEY_ID = re.compile(r"ak_[A-Za-z0-9]{16,32}")


def canonical(method: str, target: str, timestamp: str, recv_window: str, nonce: str, body: bytes) -> bytes:
    """What is signed: six lines. `target` is path and query exactly as sent; the last line is the body's SHA-256."""
    return "\n".join([method, target, timestamp, recv_window, nonce, hashlib.sha256(body).hexdigest()]).encode()


@dataclass(frozen=True, slots=True)
class _Remembered:
    key: ApiKey | None
    hmac_secret: bytes
    until: float


class ApiKeys:
    """Says whose key has signed a request."""

    def __init__(self, pool: Pool, redis: Redis, vault: MultiFernet | None) -> None:
        self._pool = pool
        self._redis = redis
        self._vault = vault
        self._remembered: dict[str, _Remembered] = {}

    async def authenticate(self, request: Request, key_id: str, now: datetime) -> Identity:
        """The key's user. Raises Problem UNAUTHENTICATED when the request is not signed well, late or a repeat, and
        FORBIDDEN when the key may not do this, or not from there. Never an operator, whoever the user is."""
        remembered = await self._find(key_id)
        key = remembered.key
        if key is None:
            raise _unauthenticated("The API key is not valid")
        signed, replay_ms = _signed(request, await request.body(), to_ms(now))
        if not _is_genuine(key, remembered.hmac_secret, signed, request.headers.get("x-api-signature", "")):
            raise _unauthenticated("The signature is not valid")
        _require_allowed(key, request)
        await self._require_first(key_id, signed, replay_ms)
        return Identity(key.user_id, frozenset({USER_ROLE}), "")

    def forget(self, key_id: str) -> None:
        """Look at the key anew."""
        self._remembered.pop(key_id, None)

    def forget_all(self) -> None:
        """Revocations may have been missed."""
        self._remembered.clear()

    async def _find(self, key_id: str) -> _Remembered:
        found = self._remembered.get(key_id)
        if found is not None and time.monotonic() < found.until:
            return found
        # Counted from before the look: a revocation during it is noticed no later than any other.
        until = time.monotonic() + REMEMBERED_SECONDS
        key = await find_key(self._pool, key_id) if _KEY_ID.fullmatch(key_id) else None
        found = _Remembered(key, self._hmac_secret(key), until)
        self._remembered.pop(key_id, None)
        self._remembered[key_id] = found
        if len(self._remembered) > REMEMBERED_MAX:
            del self._remembered[next(iter(self._remembered))]
        return found

    def _hmac_secret(self, key: ApiKey | None) -> bytes:
        if key is None or key.algorithm != "HMAC_SHA256":
            return b""
        if self._vault is None:
            raise RuntimeError("EXCHANGE_API_KEY_SECRETS_FILE is not set, but there are HMAC keys")
        try:
            return self._vault.decrypt(key.secret)
        except InvalidToken:
            raise RuntimeError(f"No key of EXCHANGE_API_KEY_SECRETS_FILE opens API key {key.key_id}") from None

    async def _require_first(self, key_id: str, signed: bytes, replay_ms: int) -> None:
        # What is signed and not the signature: another valid signature of the same request is the same request.
        name = f"api:signed:{key_id}:{hashlib.sha256(signed).hexdigest()}"
        if not await self._redis.set(name, b"", nx=True, px=replay_ms):
            raise _unauthenticated("The request was sent before; change X-Api-Timestamp or X-Api-Nonce")


def _signed(request: Request, body: bytes, now_ms: int) -> tuple[bytes, int]:
    """What should be signed, and for how many more milliseconds it would be accepted."""
    timestamp = request.headers.get("x-api-timestamp", "")
    recv_window = request.headers.get("x-api-recv-window", str(RECV_WINDOW_MS))
    nonce = request.headers.get("x-api-nonce", "")
    if not _NUMBER.fullmatch(timestamp) or not _NUMBER.fullmatch(recv_window) or not _NONCE.fullmatch(nonce):
        raise _unauthenticated("X-Api-Timestamp (ms), X-Api-Recv-Window (ms) or X-Api-Nonce is not valid")
    if int(recv_window) > RECV_WINDOW_MS_MAX:
        raise _unauthenticated(f"X-Api-Recv-Window may be {RECV_WINDOW_MS_MAX} ms")
    left = int(timestamp) + int(recv_window) - now_ms
    if left < 0 or int(timestamp) > now_ms + AHEAD_MS_MAX:
        raise _unauthenticated(f"X-Api-Timestamp is outside the receive window; it is {now_ms} here")
    target = request.scope["raw_path"].decode("latin-1")
    if request.scope["query_string"]:
        target += "?" + request.scope["query_string"].decode("latin-1")
    return canonical(request.method, target, timestamp, recv_window, nonce, body), left + 1


def _is_genuine(key: ApiKey, hmac_secret: bytes, signed: bytes, signature: str) -> bool:
    try:
        given = bytes.fromhex(signature)
    except ValueError:
        return False
    if key.algorithm == "HMAC_SHA256":
        return hmac.compare_digest(hmac.digest(hmac_secret, signed, "sha256"), given)
    try:
        Ed25519PublicKey.from_public_bytes(key.secret).verify(given, signed)
    except InvalidSignature:
        return False
    return True


def _require_allowed(key: ApiKey, request: Request) -> None:
    address = client_address(request.scope)
    networks = [ip_network(each) for each in key.allowed_addresses]
    if networks and (address is None or not any(address in network for network in networks)):
        raise Problem("FORBIDDEN", "The API key may not be used from this address")
    if request.method not in _SAFE_METHODS and "TRADE" not in key.permissions:
        raise Problem("FORBIDDEN", "The API key may only read")


def _unauthenticated(detail: str) -> Problem:
    return Problem("UNAUTHENTICATED", detail)

"""Requests signed with an API key: what is signed, and the checks before one is believed."""

import hashlib
import hmac
import re
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from ipaddress import ip_network

from cryptography.exceptions import InvalidSignature
from cryptography.fernet import InvalidToken, MultiFernet
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from redis.asyncio import Redis
from starlette.requests import Request

from activities.identity.api_keys import USE_NOTED, ApiKey, find_key, note_use
from api.identity.addresses import Address, client_address
from api.schema.strictness import sent_query
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
_NEVER = datetime(1970, 1, 1, tzinfo=UTC)
_SAFE_METHODS = ("GET", "HEAD")
_KEY_ID = re.compile(r"ak_[A-Za-z0-9]{16,32}")


def canonical(method: str, target: str, timestamp: str, recv_window: str, nonce: str, body: bytes) -> bytes:
    """What is signed: six lines. `target` is path and query exactly as sent; the last line is the body's SHA-256."""
    return "\n".join([method, target, timestamp, recv_window, nonce, hashlib.sha256(body).hexdigest()]).encode()


@dataclass(frozen=True, slots=True)
class SignedRequest:
    """What somebody has signed, with what key, and from where it came: unproven, all of it as it was sent."""

    key_id: str
    method: str
    target: str
    timestamp: str
    recv_window: str
    nonce: str
    signature: str
    address: Address | None
    body: bytes = b""

    @property
    def text(self) -> bytes:
        """The bytes that must have been signed."""
        return canonical(self.method, self.target, self.timestamp, self.recv_window, self.nonce, self.body)


async def signed_request(request: Request, key_id: str) -> SignedRequest:
    """An HTTP request whose X-Api-Key is `key_id`."""
    target = request.scope["raw_path"].decode("latin-1")
    query = sent_query(request.scope)
    if query:
        target += "?" + query.decode("latin-1")
    return SignedRequest(
        key_id=key_id,
        method=request.method,
        target=target,
        timestamp=request.headers.get("x-api-timestamp", ""),
        recv_window=request.headers.get("x-api-recv-window", str(RECV_WINDOW_MS)),
        nonce=request.headers.get("x-api-nonce", ""),
        signature=request.headers.get("x-api-signature", ""),
        address=client_address(request.scope),
        body=await request.body(),
    )


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
        self._used: dict[str, datetime] = {}

    async def authenticate(self, request: SignedRequest, now: datetime) -> Identity:
        """The key's user. Raises Problem UNAUTHENTICATED when the request is not signed well, late or a repeat, and
        FORBIDDEN when the key may not do this, or not from there. Never an operator, whoever the user is."""
        remembered = await self._find(request.key_id)
        key = remembered.key
        if key is None or key.expires_at <= now:
            raise _invalid_key()
        replay_ms = _remaining_ms(request, to_ms(now))
        if not _is_genuine(key, remembered.hmac_secret, request.text, request.signature):
            raise _unauthenticated("The signature is not valid")
        _require_allowed(key, request)
        await self._require_first(request, replay_ms)
        await self._note_use(key.key_id, now)
        return Identity(
            key.user_id,
            frozenset({USER_ROLE}),
            session_id="",
            key_id=key.key_id,
            instruments=frozenset(key.instruments),
        )

    async def require(self, key_id: str) -> None:
        """Raise Problem UNAUTHENTICATED unless the key is good now, whatever is remembered of it."""
        if await find_key(self._pool, key_id) is None:
            raise _invalid_key()

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

    async def _note_use(self, key_id: str, now: datetime) -> None:
        if now - self._used.get(key_id, _NEVER) < USE_NOTED:
            return
        self._used.pop(key_id, None)
        self._used[key_id] = now
        if len(self._used) > REMEMBERED_MAX:
            del self._used[next(iter(self._used))]
        await note_use(self._pool, key_id, now)

    async def _require_first(self, request: SignedRequest, replay_ms: int) -> None:
        # What is signed and not the signature: another valid signature of the same request is the same request.
        name = f"api:signed:{request.key_id}:{hashlib.sha256(request.text).hexdigest()}"
        if not await self._redis.set(name, b"", nx=True, px=replay_ms):
            raise _unauthenticated("The request was sent before; change X-Api-Timestamp or X-Api-Nonce")


def _remaining_ms(request: SignedRequest, now_ms: int) -> int:
    """For how many more milliseconds the request would be accepted."""
    timestamp, recv_window, nonce = request.timestamp, request.recv_window, request.nonce
    if not _NUMBER.fullmatch(timestamp) or not _NUMBER.fullmatch(recv_window) or not _NONCE.fullmatch(nonce):
        raise _unauthenticated("X-Api-Timestamp (ms), X-Api-Recv-Window (ms) or X-Api-Nonce is not valid")
    if int(recv_window) > RECV_WINDOW_MS_MAX:
        raise _unauthenticated(f"X-Api-Recv-Window may be {RECV_WINDOW_MS_MAX} ms")
    left = int(timestamp) + int(recv_window) - now_ms
    if left < 0 or int(timestamp) > now_ms + AHEAD_MS_MAX:
        raise _unauthenticated(f"X-Api-Timestamp is outside the receive window; it is {now_ms} here")
    return left + 1


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


def _require_allowed(key: ApiKey, request: SignedRequest) -> None:
    address = request.address
    networks = [ip_network(each) for each in key.allowed_addresses]
    if networks and (address is None or not any(address in network for network in networks)):
        raise Problem("FORBIDDEN", "The API key may not be used from this address")
    needed = "READ" if request.method in _SAFE_METHODS else "TRADE"
    if needed not in key.permissions:
        raise Problem("FORBIDDEN", f"The API key has no permission {needed}")


def _invalid_key() -> Problem:
    return _unauthenticated("The API key is not valid")


def _unauthenticated(detail: str) -> Problem:
    return Problem("UNAUTHENTICATED", detail)

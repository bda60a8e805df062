"""Access tokens: short-lived JWTs, signed with Ed25519. Algorithm, type, issuer, audience and key are pinned."""

import base64
import hashlib
import json
import re
import secrets
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jwt
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from domain.identity import ACCESS_TOKEN_LIFETIME, Identity
from domain.problems import Problem

ALGORITHM = "EdDSA"
TOKEN_TYPE = "at+jwt"
ISSUER = "saga-exchange"
AUDIENCE = "saga-exchange-api"
VERIFIED_MAX = 20_000
REFRESH_NUMBER_BYTES = 16
# What else is signed with the key begins otherwise: a JWT, with its header.
_REFRESH_PREFIX = b"refresh-token:"
_PEM = re.compile(rb"-----BEGIN ([A-Z ]+)-----.+?-----END \1-----", re.DOTALL)
_CLAIMS = ["iss", "aud", "sub", "sid", "iat", "exp", "jti"]


def load_keys(path: Path) -> tuple[Ed25519PrivateKey, list[Ed25519PublicKey]]:
    """The keys of a PEM file: the first one, private, signs; those after it, public or private, verify only.

    Raises OSError, or ValueError when there is none, or one that is not of Ed25519.
    """
    blocks = [found[0] for found in _PEM.finditer(path.read_bytes())]
    if not blocks:
        raise ValueError(f"Expected a key in {path}, was none")
    first, *others = (_load_key(block, path) for block in blocks)
    if not isinstance(first, Ed25519PrivateKey):
        raise ValueError(f"Expected a private key first in {path}, was a public one")
    return first, [_public(key) for key in others]


def load_private_keys(path: Path) -> list[Ed25519PrivateKey]:
    """The private keys of a PEM file, in its order. Raises OSError, ValueError."""
    keys = [_load_key(found[0], path) for found in _PEM.finditer(path.read_bytes())]
    return [key for key in keys if isinstance(key, Ed25519PrivateKey)]


def _load_key(pem: bytes, path: Path) -> Ed25519PrivateKey | Ed25519PublicKey:
    key = load_pem_private_key(pem, password=None) if b"PRIVATE" in pem else load_pem_public_key(pem)
    if not isinstance(key, Ed25519PrivateKey | Ed25519PublicKey):
        raise ValueError(f"Expected an Ed25519 key in {path}, was {type(key).__name__}")
    return key


def _public(key: Ed25519PrivateKey | Ed25519PublicKey) -> Ed25519PublicKey:
    return key.public_key() if isinstance(key, Ed25519PrivateKey) else key


def key_id(key: Ed25519PrivateKey | Ed25519PublicKey) -> str:
    """The RFC 7638 thumbprint of the public key."""
    members = _public_members(key)
    canonical = json.dumps(members, separators=(",", ":"), sort_keys=True)
    return _base64url(hashlib.sha256(canonical.encode()).digest())


def _public_members(key: Ed25519PrivateKey | Ed25519PublicKey) -> dict[str, str]:
    raw = _public(key).public_bytes(Encoding.Raw, PublicFormat.Raw)
    return {"crv": "Ed25519", "kty": "OKP", "x": _base64url(raw)}


class AccessTokens:
    """Issues access tokens with one key and verifies those of `others` too, each by its key id; a token verified once
    is remembered until it expires."""

    def __init__(self, key: Ed25519PrivateKey, others: Sequence[Ed25519PublicKey] = ()) -> None:
        self._private_key = key
        self._key_id = key_id(key)
        self._public_keys = {key_id(each): each for each in (key.public_key(), *others)}
        self._verified: dict[str, tuple[Identity, int]] = {}

    def issue(self, identity: Identity, now: datetime, token_id: str | None = None) -> str:
        """A token of 15 minutes for this session; the same again for the same `now` and `token_id`."""
        claims = {
            "iss": ISSUER,
            "aud": AUDIENCE,
            "sub": str(identity.user_id),
            "sid": identity.session_id,
            "roles": sorted(identity.roles),
            "iat": int(now.timestamp()),
            "exp": int((now + ACCESS_TOKEN_LIFETIME).timestamp()),
            "jti": token_id or secrets.token_urlsafe(12),
        }
        headers = {"typ": TOKEN_TYPE, "kid": self._key_id}
        return jwt.encode(claims, self._private_key, algorithm=ALGORITHM, headers=headers)

    def public_keys(self) -> list[dict[str, Any]]:
        """The keys that verify, as RFC 7517 writes them; the one that signs comes first."""
        return [
            {**_public_members(key), "kid": name, "alg": ALGORITHM, "use": "sig"}
            for name, key in self._public_keys.items()
        ]

    def verify(self, token: str, now: datetime) -> Identity:
        """Whose token this is. Raises Problem UNAUTHENTICATED; its session must still be checked."""
        identity, expires_at = self._verified.get(token) or self._remember(token)
        if now.timestamp() >= expires_at:
            self._verified.pop(token, None)
            raise Problem("UNAUTHENTICATED", "The access token has expired")
        return identity

    def _remember(self, token: str) -> tuple[Identity, int]:
        verified = self._decode(token)
        if len(self._verified) >= VERIFIED_MAX:
            del self._verified[next(iter(self._verified))]
        self._verified[token] = verified
        return verified

    def _decode(self, token: str) -> tuple[Identity, int]:
        try:
            key = self._public_keys[jwt.get_unverified_header(token)["kid"]]
            decoded = jwt.decode_complete(
                token,
                key,
                algorithms=[ALGORITHM],
                audience=AUDIENCE,
                issuer=ISSUER,
                # `verify` compares the expiry with the caller's clock, also for remembered tokens.
                options={"require": _CLAIMS, "verify_exp": False, "verify_iat": False},
            )
            header, claims = decoded["header"], decoded["payload"]
            if header.get("typ") != TOKEN_TYPE:
                raise jwt.InvalidTokenError("not an access token of this exchange")
            return Identity(int(claims["sub"]), frozenset(claims["roles"]), claims["sid"]), int(claims["exp"])
        except (jwt.InvalidTokenError, ValueError, KeyError, TypeError) as error:
            raise Problem("UNAUTHENTICATED", "The access token is not valid") from error


class RefreshTokens:
    """Makes refresh tokens: session id, number, and the signature of both, in base64url.

    The number of the first is drawn by lot; the number of each later one is the hash of the one before, so that whoever
    has the key makes the same token again for a repeated refresh, without keeping it. The signature tells those that
    were used before from those that never were any. What is good is in the session's row; of a token that is known
    there it does not matter which key has signed it.
    """

    def __init__(self, keys: Sequence[Ed25519PrivateKey], others: Sequence[Ed25519PublicKey] = ()) -> None:
        self._keys = keys
        self._public_keys = [*(key.public_key() for key in keys), *others]

    def first(self, session_id: str) -> str:
        """That of a new session."""
        return self._signed(self._keys[0], session_id, secrets.token_urlsafe(REFRESH_NUMBER_BYTES))

    def following(self, token: str) -> list[str]:
        """Those that may follow `token`, by each private key; the first is the one to give."""
        number = _base64url(hashlib.sha256(token.encode()).digest()[:REFRESH_NUMBER_BYTES])
        return [self._signed(key, token.partition(".")[0], number) for key in self._keys]

    def is_ours(self, token: str) -> bool:
        """Whether it was issued here, now or before."""
        text, _, signature = token.rpartition(".")
        try:
            raw = base64.urlsafe_b64decode(signature + "=" * (-len(signature) % 4))
        except ValueError:
            return False
        return any(_is_signed(key, raw, text) for key in self._public_keys)

    @staticmethod
    def _signed(key: Ed25519PrivateKey, session_id: str, number: str) -> str:
        text = f"{session_id}.{number}"
        return f"{text}.{_base64url(key.sign(_REFRESH_PREFIX + text.encode()))}"


def _is_signed(key: Ed25519PublicKey, signature: bytes, text: str) -> bool:
    try:
        key.verify(signature, _REFRESH_PREFIX + text.encode())
    except InvalidSignature:
        return False
    return True


def _base64url(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()

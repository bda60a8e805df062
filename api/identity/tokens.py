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

    def issue(self, identity: Identity, now: datetime) -> str:
        """A token of 15 minutes for this session."""
        claims = {
            "iss": ISSUER,
            "aud": AUDIENCE,
            "sub": str(identity.user_id),
            "sid": identity.session_id,
            "roles": sorted(identity.roles),
            "iat": int(now.timestamp()),
            "exp": int((now + ACCESS_TOKEN_LIFETIME).timestamp()),
            "jti": secrets.token_urlsafe(12),
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


def _base64url(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()

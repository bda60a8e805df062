"""Access tokens: short-lived JWTs, signed with Ed25519. Algorithm, type, issuer, audience and key are pinned."""

import base64
import hashlib
import json
import secrets
from datetime import datetime
from pathlib import Path

import jwt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from domain.identity import ACCESS_TOKEN_LIFETIME, Identity
from domain.problems import Problem

ALGORITHM = "EdDSA"
TOKEN_TYPE = "at+jwt"
ISSUER = "saga-exchange"
AUDIENCE = "saga-exchange-api"
VERIFIED_MAX = 20_000
_CLAIMS = ["iss", "aud", "sub", "sid", "iat", "exp", "jti"]


def load_private_key(path: Path) -> Ed25519PrivateKey:
    """The signing key in a PEM file. Raises OSError, or ValueError when it is no Ed25519 key."""
    key = load_pem_private_key(path.read_bytes(), password=None)
    if not isinstance(key, Ed25519PrivateKey):
        raise ValueError(f"Expected an Ed25519 key in {path}, was {type(key).__name__}")
    return key


def key_id(key: Ed25519PrivateKey) -> str:
    """The RFC 7638 thumbprint of the public key."""
    raw = key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    members = {"crv": "Ed25519", "kty": "OKP", "x": _base64url(raw)}
    canonical = json.dumps(members, separators=(",", ":"), sort_keys=True)
    return _base64url(hashlib.sha256(canonical.encode()).digest())


class AccessTokens:
    """Issues access tokens and verifies them; a token verified once is remembered until it expires."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._private_key = key
        self._public_key = key.public_key()
        self._key_id = key_id(key)
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
            decoded = jwt.decode_complete(
                token,
                self._public_key,
                algorithms=[ALGORITHM],
                audience=AUDIENCE,
                issuer=ISSUER,
                # `verify` compares the expiry with the caller's clock, also for remembered tokens.
                options={"require": _CLAIMS, "verify_exp": False, "verify_iat": False},
            )
            header, claims = decoded["header"], decoded["payload"]
            if header.get("typ") != TOKEN_TYPE or header.get("kid") != self._key_id:
                raise jwt.InvalidTokenError("not an access token of this exchange")
            return Identity(int(claims["sub"]), frozenset(claims["roles"]), claims["sid"]), int(claims["exp"])
        except (jwt.InvalidTokenError, ValueError, KeyError, TypeError) as error:
            raise Problem("UNAUTHENTICATED", "The access token is not valid") from error


def _base64url(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()

"""One's API keys: for programs that sign their requests."""

import logging
import secrets
import string
from datetime import UTC, datetime
from ipaddress import ip_network
from typing import Annotated, Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from fastapi import APIRouter, Path
from pydantic import AfterValidator, Field, model_validator

from activities.api_keys import Algorithm, ApiKey, Permission, add_key, keys_of, revoke_key
from api.edge.gateway import SignedIn
from api.schema.models import ApiModel, RequestModel, SafeText, Timestamp
from api.schema.openapi import problems
from api.state import State
from domain.problems import Problem

log = logging.getLogger(__name__)

ADDRESSES_MAX = 20
_LETTERS = string.ascii_letters + string.digits

router = APIRouter(prefix="/api/auth/api-keys", tags=["auth"])


def _network(text: str) -> str:
    try:
        return str(ip_network(text))
    except ValueError:
        raise ValueError("must be an IP address or network (its host bits zero)") from None


def _public_key(text: str) -> str:
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(text))
    except (ValueError, UnsupportedAlgorithm):
        raise ValueError("must be the 32 bytes of an Ed25519 public key in hex") from None
    return text


class ApiKeyCreateRequest(RequestModel):
    """READ allows GET, TRADE every other call that takes keys. An empty `allowedAddresses` allows all."""

    label: Annotated[str, Field(min_length=1, max_length=64)]
    algorithm: Algorithm
    public_key: Annotated[str, Field(max_length=64), AfterValidator(_public_key)] | None = None
    permissions: Annotated[list[Permission], Field(min_length=1, max_length=2)]
    allowed_addresses: Annotated[
        list[Annotated[str, Field(max_length=49), AfterValidator(_network)]], Field(max_length=ADDRESSES_MAX)
    ] = Field(default_factory=list)

    @model_validator(mode="after")
    def _public_key_where_needed(self) -> "ApiKeyCreateRequest":
        if (self.public_key is not None) != (self.algorithm == "ED25519"):
            raise ValueError("publicKey belongs to ED25519, and only to it")
        return self


class ApiKeyResponse(ApiModel):
    """A key, without any secret."""

    key_id: str
    label: str
    algorithm: Algorithm
    permissions: list[Permission]
    allowed_addresses: list[str]
    created_at: Timestamp


class NewApiKeyResponse(ApiKeyResponse):
    """The secret of an HMAC_SHA256 key, in UTF-8 as it is the HMAC's key; it is not shown again."""

    secret: str | None


@router.post("", status_code=201)
async def create_api_key(request: ApiKeyCreateRequest, user: SignedIn, state: State) -> NewApiKeyResponse:
    """Make a key. An Ed25519 private key never comes here; an HMAC secret is answered once."""
    secret = None
    if request.algorithm == "HMAC_SHA256":
        if state.vault is None:
            raise Problem("VALIDATION_FAILED", "This exchange takes ED25519 keys only")
        secret = secrets.token_urlsafe(32)
        stored = state.vault.encrypt(secret.encode())
    else:
        stored = bytes.fromhex(request.public_key or "")
    key = ApiKey(
        key_id="ak_" + "".join(secrets.choice(_LETTERS) for _ in range(24)),
        user_id=user.user_id,
        label=request.label,
        algorithm=request.algorithm,
        secret=stored,
        permissions=sorted(set(request.permissions)),
        allowed_addresses=request.allowed_addresses,
        created_at=datetime.now(UTC),
    )
    async with state.pool.acquire() as conn, conn.transaction():
        await add_key(conn, key)
    log.info("user %d has made API key %s", user.user_id, key.key_id)
    return NewApiKeyResponse(**_members(key), secret=secret)


@router.get("")
async def list_api_keys(user: SignedIn, state: State) -> list[ApiKeyResponse]:
    """One's keys, newest first."""
    return [ApiKeyResponse(**_members(key)) for key in await keys_of(state.pool, user.user_id)]


@router.delete("/{keyId}", status_code=204, responses=problems("NOT_FOUND"))
async def revoke_api_key(key_id: Annotated[SafeText, Path(alias="keyId")], user: SignedIn, state: State) -> None:
    """End one of one's keys: every api process refuses it at once."""
    if not await revoke_key(state.pool, state.redis, user.user_id, key_id, datetime.now(UTC)):
        raise Problem("NOT_FOUND", "There is no such API key")
    log.info("user %d has revoked API key %s", user.user_id, key_id)


def _members(key: ApiKey) -> dict[str, Any]:
    return {
        "key_id": key.key_id,
        "label": key.label,
        "algorithm": key.algorithm,
        "permissions": key.permissions,
        "allowed_addresses": key.allowed_addresses,
        "created_at": key.created_at,
    }

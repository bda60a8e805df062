"""One's API keys: for programs that sign their requests."""

import logging
import secrets
import string
from datetime import UTC, datetime, timedelta
from ipaddress import ip_network
from typing import Annotated, Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from fastapi import APIRouter, Path
from pydantic import AfterValidator, AwareDatetime, Field, model_validator

from activities.identity.api_keys import (
    Algorithm,
    ApiKey,
    Permission,
    add_key,
    keys_of,
    rename_key,
    revoke_keys,
    tell_key_changed,
)
from api.edge.gateway import SignedIn
from api.edge.password_checks import ClientDevice, require_fresh_proof
from api.schema.models import ApiModel, RequestModel, SafeText, Timestamp
from api.schema.openapi import problems
from api.schema.problems import refused
from api.state import State
from domain.identity import PASSWORD_LENGTH_MAX
from domain.problems import Problem

log = logging.getLogger(__name__)

ADDRESSES_MAX = 20
INSTRUMENTS_MAX = 100
LIFETIME = timedelta(days=90)
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
    """READ allows GET, TRADE every other call that takes keys; nothing else can be allowed, least of all to withdraw.

    An empty `allowedAddresses` or `instruments` allows all. Without `expiresAt` it is good for 90 days. `password` is
    needed unless one signed in within the last five minutes.
    """

    label: Annotated[str, Field(min_length=1, max_length=64)]
    algorithm: Algorithm
    public_key: Annotated[str, Field(max_length=64), AfterValidator(_public_key)] | None = None
    permissions: Annotated[list[Permission], Field(min_length=1, max_length=2)]
    allowed_addresses: Annotated[
        list[Annotated[str, Field(max_length=49), AfterValidator(_network)]], Field(max_length=ADDRESSES_MAX)
    ] = Field(default_factory=list)
    instruments: Annotated[list[Annotated[str, Field(max_length=64)]], Field(max_length=INSTRUMENTS_MAX)] = Field(
        default_factory=list
    )
    expires_at: AwareDatetime | None = None
    password: str | None = Field(None, min_length=1, max_length=PASSWORD_LENGTH_MAX, repr=False)

    @model_validator(mode="after")
    def _public_key_where_needed(self) -> "ApiKeyCreateRequest":
        if (self.public_key is not None) != (self.algorithm == "ED25519"):
            raise ValueError("publicKey belongs to ED25519, and only to it")
        return self


class ApiKeyRename(RequestModel):
    """What a key is to be called."""

    label: Annotated[str, Field(min_length=1, max_length=64)]


class ApiKeyResponse(ApiModel):
    """A key, without any secret. `lastUsedAt` is up to a minute late; null: never."""

    key_id: str
    label: str
    algorithm: Algorithm
    permissions: list[Permission]
    allowed_addresses: list[str]
    instruments: list[str]
    created_at: Timestamp
    expires_at: Timestamp
    last_used_at: Timestamp | None


class NewApiKeyResponse(ApiKeyResponse):
    """The secret of an HMAC_SHA256 key, in UTF-8 as it is the HMAC's key; it is not shown again."""

    secret: str | None


@router.post(
    "",
    status_code=201,
    responses=problems("PASSWORD_NEEDED", "INVALID_CREDENTIALS", "CREDENTIAL_LOCKED", "INSTRUMENT_NOT_FOUND"),
)
async def create_api_key(
    request: ApiKeyCreateRequest, user: SignedIn, device: ClientDevice, state: State
) -> NewApiKeyResponse:
    """Make a key. An Ed25519 private key never comes here; an HMAC secret is answered once."""
    now = datetime.now(UTC)
    expires_at = _expiry(request.expires_at, now, timedelta(days=state.settings.api_key_lifetime_days_max))
    for instrument_id in request.instruments:
        state.desk.instrument(instrument_id)
    await require_fresh_proof(state, user, request.password, device, now)
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
        instruments=sorted(set(request.instruments)),
        created_at=now,
        expires_at=expires_at,
    )
    async with state.pool.acquire() as conn, conn.transaction():
        await add_key(conn, key)
    log.info("user %d has made API key %s", user.user_id, key.key_id)
    return NewApiKeyResponse(**_members(key), secret=secret)


@router.get("")
async def list_api_keys(user: SignedIn, state: State) -> list[ApiKeyResponse]:
    """One's keys, newest first; also those that have expired."""
    return [ApiKeyResponse(**_members(key)) for key in await keys_of(state.pool, user.user_id)]


@router.patch("/{keyId}", responses=problems("NOT_FOUND"))
async def rename_api_key(
    key_id: Annotated[SafeText, Path(alias="keyId")], request: ApiKeyRename, user: SignedIn, state: State
) -> ApiKeyResponse:
    """Call one of one's keys otherwise."""
    key = await rename_key(state.pool, user.user_id, key_id, request.label)
    if key is None:
        raise Problem("NOT_FOUND", "There is no such API key")
    return ApiKeyResponse(**_members(key))


@router.delete("", status_code=204)
async def revoke_all_api_keys(user: SignedIn, state: State) -> None:
    """End all of one's keys: every api process refuses them at once."""
    ended = await revoke_keys(state.pool, user.user_id, None, datetime.now(UTC))
    await tell_key_changed(state.redis, *ended)
    log.info("user %d has revoked all %d API keys", user.user_id, len(ended))


@router.delete("/{keyId}", status_code=204, responses=problems("NOT_FOUND"))
async def revoke_api_key(key_id: Annotated[SafeText, Path(alias="keyId")], user: SignedIn, state: State) -> None:
    """End one of one's keys: every api process refuses it at once."""
    if not await revoke_keys(state.pool, user.user_id, key_id, datetime.now(UTC)):
        raise Problem("NOT_FOUND", "There is no such API key")
    await tell_key_changed(state.redis, key_id)
    log.info("user %d has revoked API key %s", user.user_id, key_id)


def _members(key: ApiKey) -> dict[str, Any]:
    return {
        "key_id": key.key_id,
        "label": key.label,
        "algorithm": key.algorithm,
        "permissions": key.permissions,
        "allowed_addresses": key.allowed_addresses,
        "instruments": key.instruments,
        "created_at": key.created_at,
        "expires_at": key.expires_at,
        "last_used_at": key.last_used_at,
    }


def _expiry(wanted: datetime | None, now: datetime, lifetime_max: timedelta) -> datetime:
    """When a key made now expires. Raises Problem VALIDATION_FAILED."""
    if wanted is None:
        return now + min(LIFETIME, lifetime_max)
    if not now < wanted <= now + lifetime_max:
        raise refused(("expiresAt", f"Expected a time within the next {lifetime_max.days} days"))
    return wanted

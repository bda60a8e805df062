"""Credentials, sign-in and sessions."""

import hashlib
import secrets
import uuid
from datetime import UTC, datetime
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Request, Response
from pydantic import AfterValidator, Field

from activities.auth import (
    DEVICE_LENGTH_MAX,
    Device,
    PasswordCredential,
    audit_login,
    create_credential,
    find_password,
    replace_hash,
)
from activities.sessions import Session, good_sessions, new_session, open_session, revoke, rotate
from api.gateway import User, require_internal
from api.models import ApiModel, Page, Timestamp, UserId
from api.openapi import problems
from api.passwords import is_argon2id
from api.state import AppState, State
from domain.identity import (
    ACCESS_TOKEN_LIFETIME,
    EMAIL_LENGTH_MAX,
    PASSWORD_LENGTH_MAX,
    SESSION_LIFETIME,
    Identity,
    normalised_email,
    require_usable_credential,
)
from domain.problems import Problem

router = APIRouter(prefix="/api/auth", tags=["auth"])


def _argon2id(secret_hash: str) -> str:
    if not is_argon2id(secret_hash):
        raise ValueError("must be an Argon2id hash ($argon2id$…)")
    return secret_hash


class AuthCredentialCreateRequest(ApiModel):
    """A secret that is already hashed; an Argon2id hash carries its salt."""

    user_id: UserId
    type: Literal["PASSWORD"]
    secret_hash: Annotated[str, Field(max_length=512, repr=False), AfterValidator(_argon2id)]


class AuthCredentialResponse(ApiModel):
    """A credential, without its secret."""

    user_id: UserId
    type: str
    status: str
    created_at: Timestamp


class LoginRequest(ApiModel):
    """An address and its password."""

    email: Annotated[str, Field(min_length=1, max_length=EMAIL_LENGTH_MAX), AfterValidator(normalised_email)]
    password: str = Field(min_length=1, max_length=PASSWORD_LENGTH_MAX, repr=False)


class RefreshRequest(ApiModel):
    """A refresh token, good for one use."""

    refresh_token: str = Field(min_length=1, max_length=256, repr=False)


class TokenResponse(ApiModel):
    """The tokens of a session; lifetimes in seconds."""

    access_token: str
    refresh_token: str
    token_type: str = "Bearer"
    expires_in: int = int(ACCESS_TOKEN_LIFETIME.total_seconds())
    refresh_expires_in: int = int(SESSION_LIFETIME.total_seconds())
    session_id: str


class SessionResponse(ApiModel):
    """A signed-in device; `current` marks the one that asks."""

    session_id: str
    ip: str | None
    device_fingerprint: str | None
    created_at: Timestamp
    expires_at: Timestamp
    current: bool


def device_of(request: Request) -> Device:
    """Where the request comes from. The headers say what the client likes: they are kept, never trusted."""
    agent = request.headers.get("user-agent", "")[:DEVICE_LENGTH_MAX] or None
    fingerprint = request.headers.get("x-device-fingerprint", "")[:DEVICE_LENGTH_MAX] or agent
    return Device(_ip(request), agent, fingerprint)


ClientDevice = Annotated[Device, Depends(device_of)]


@router.post(
    "/credentials",
    status_code=201,
    dependencies=[Depends(require_internal)],
    responses=problems("NOT_FOUND"),
)
async def create(request: AuthCredentialCreateRequest, state: State) -> AuthCredentialResponse:
    """Create a user's credential (internal). A repeat answers with the one that exists, unchanged."""
    credential = await create_credential(state.pool, request.user_id, request.type, request.secret_hash)
    if credential is None:
        raise Problem("NOT_FOUND", "There is no such user")
    return AuthCredentialResponse(
        user_id=credential.user_id, type=credential.type, status=credential.status, created_at=credential.created_at
    )


@router.post("/login", responses=problems("INVALID_CREDENTIALS", "CREDENTIAL_LOCKED", "CREDENTIAL_EXPIRED"))
async def login(request: LoginRequest, device: ClientDevice, state: State, response: Response) -> TokenResponse:
    """Sign in; 401 for a wrong email or password, 403 when the credential is locked or has expired."""
    now = datetime.now(UTC)
    credential = await _verified(state, request, device, now)
    anew = await state.passwords.hash(request.password) if state.passwords.outdated(credential.secret_hash) else None
    session = new_session(credential.user_id, credential.roles, _text(device.ip), device.fingerprint, now)
    refresh_token = _new_refresh_token(session.session_id)
    async with state.pool.acquire() as conn, conn.transaction():
        await audit_login(conn, email=request.email, user_id=session.user_id, device=device, reason=None)
        if anew is not None:
            await replace_hash(conn, session.user_id, credential.secret_hash, anew)
        await open_session(conn, state.redis, session, _digest(refresh_token))
    return _tokens(state, session, refresh_token, response, now)


@router.post("/token/refresh", responses=problems("UNAUTHENTICATED"))
async def refresh(request: RefreshRequest, state: State, response: Response) -> TokenResponse:
    """Exchange a refresh token for new tokens of the same session; one used before revokes the session."""
    now = datetime.now(UTC)
    session_id = _session_id_in(request.refresh_token)
    refresh_token = _new_refresh_token(session_id)
    session = await rotate(
        state.pool,
        state.redis,
        session_id,
        old_hash=_digest(request.refresh_token),
        new_hash=_digest(refresh_token),
        now=now,
    )
    return _tokens(state, session, refresh_token, response, now)


@router.post("/logout", status_code=204)
async def logout(user: User, state: State) -> None:
    """End the session of the access token."""
    await _end(state, user, user.session_id, "LOGOUT")


@router.get("/sessions")
async def sessions(user: User, state: State) -> Page[SessionResponse]:
    """One's own sessions, newest first."""
    found = await good_sessions(state.pool, user.user_id, datetime.now(UTC))
    return Page(items=[_session_response(session, user) for session in found])


@router.delete("/sessions/{session_id}", status_code=204, responses=problems("NOT_FOUND"))
async def delete_session(session_id: uuid.UUID, user: User, state: State) -> None:
    """End one of one's own sessions; its access token is refused and its sockets close at once."""
    if not await _end(state, user, str(session_id), "REVOKED_BY_USER"):
        raise Problem("NOT_FOUND", "There is no such session")


async def _verified(state: AppState, request: LoginRequest, device: Device, now: datetime) -> PasswordCredential:
    credential = await find_password(state.pool, request.email)
    matched = await state.passwords.matches(request.password, credential.secret_hash if credential else None)
    try:
        return _usable(credential, now, matched=matched)
    except Problem as problem:
        user_id = credential.user_id if credential else None
        await audit_login(state.pool, email=request.email, user_id=user_id, device=device, reason=problem.code)
        raise


def _usable(credential: PasswordCredential | None, now: datetime, *, matched: bool) -> PasswordCredential:
    # One answer for both: nobody learns which addresses have an account.
    if credential is None or not matched:
        raise Problem("INVALID_CREDENTIALS", "Wrong email or password")
    require_usable_credential(credential.status, credential.expires_at, now)
    return credential


async def _end(state: AppState, user: Identity, session_id: str, reason: str) -> bool:
    now = datetime.now(UTC)
    async with state.pool.acquire() as conn, conn.transaction():
        ended = await revoke(conn, state.redis, user.user_id, session_id=session_id, reason=reason, now=now)
    return bool(ended)


def _tokens(state: AppState, session: Session, refresh_token: str, response: Response, now: datetime) -> TokenResponse:
    response.headers["Cache-Control"] = "no-store"
    identity = Identity(session.user_id, frozenset(session.roles), session.session_id)
    return TokenResponse(
        access_token=state.tokens.issue(identity, now), refresh_token=refresh_token, session_id=session.session_id
    )


def _session_response(session: Session, user: Identity) -> SessionResponse:
    return SessionResponse(
        session_id=session.session_id,
        ip=session.ip,
        device_fingerprint=session.device_fingerprint,
        created_at=session.created_at,
        expires_at=session.expires_at,
        current=session.session_id == user.session_id,
    )


def _new_refresh_token(session_id: str) -> str:
    return f"{session_id}.{secrets.token_urlsafe(32)}"


def _session_id_in(refresh_token: str) -> str:
    session_id = refresh_token.partition(".")[0]
    try:
        return str(uuid.UUID(session_id))
    except ValueError as error:
        raise Problem("UNAUTHENTICATED", "The refresh token is not valid") from error


def _digest(refresh_token: str) -> str:
    return hashlib.sha256(refresh_token.encode()).hexdigest()


def _ip(request: Request) -> IPv4Address | IPv6Address | None:
    host = request.client.host if request.client is not None else ""
    try:
        return ip_address(host.partition("%")[0])
    except ValueError:
        return None


def _text(ip: IPv4Address | IPv6Address | None) -> str | None:
    return str(ip) if ip is not None else None

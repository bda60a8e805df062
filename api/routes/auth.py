"""Credentials, sign-in and sessions."""

import hashlib
import logging
import uuid
from datetime import UTC, datetime
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from pydantic import AfterValidator, Field

from activities.identity.api_keys import revoke_keys, tell_key_changed
from activities.identity.auth import (
    Device,
    PasswordCredential,
    audit_login,
    change_password,
    create_credential,
    find_password_of,
    replace_hash,
)
from activities.identity.sessions import Session, good_sessions, new_session, open_session, revoke, rotate
from api.edge.gateway import SignedIn, limit_sign_ins, require_internal
from api.edge.password_checks import ClientDevice, verified
from api.identity.addresses import Address
from api.identity.passwords import is_argon2id
from api.identity.proofs import DEVICE_LIFETIME, Work
from api.limits.login_throttle import Place, account_of
from api.schema.models import ApiModel, Page, RequestModel, Timestamp, UserId
from api.schema.openapi import problems
from api.state import AppState, State
from domain.identity import (
    ACCESS_TOKEN_LIFETIME,
    EMAIL_LENGTH_MAX,
    PASSWORD_LENGTH_MAX,
    PASSWORD_LENGTH_MIN,
    SESSION_LIFETIME,
    SESSIONS_MAX,
    Identity,
    normalised_email,
)
from domain.passwords import good_password
from domain.problems import Problem

log = logging.getLogger(__name__)

router = APIRouter(prefix="/api/auth", tags=["auth"])


def _argon2id(secret_hash: str) -> str:
    if not is_argon2id(secret_hash):
        raise ValueError("must be an Argon2id hash ($argon2id$…)")
    return secret_hash


class AuthCredentialCreateRequest(RequestModel):
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


class WorkRequest(RequestModel):
    """Work that a 429 has asked for (`work` in its document): a `solution` with which the SHA-256 of
    `challenge:solution` begins with as many zero bits as asked."""

    challenge: str = Field(max_length=512)
    solution: str = Field(max_length=64)


class LoginRequest(RequestModel):
    """An address and its password."""

    email: Annotated[str, Field(min_length=1, max_length=EMAIL_LENGTH_MAX), AfterValidator(normalised_email)]
    password: str = Field(min_length=1, max_length=PASSWORD_LENGTH_MAX, repr=False)
    work: WorkRequest | None = None


class PasswordChangeRequest(RequestModel):
    """The password as it is, and as it is to be."""

    current_password: str = Field(min_length=1, max_length=PASSWORD_LENGTH_MAX, repr=False)
    new_password: str = Field(min_length=PASSWORD_LENGTH_MIN, max_length=PASSWORD_LENGTH_MAX, repr=False)
    # Whether all API keys end, too.
    end_api_keys: bool = False


class PasswordRenewalRequest(PasswordChangeRequest):
    """The same from outside: for a password that has expired, with which nobody can sign in."""

    email: Annotated[str, Field(min_length=1, max_length=EMAIL_LENGTH_MAX), AfterValidator(normalised_email)]
    work: WorkRequest | None = None


class RefreshRequest(RequestModel):
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


class LoginResponse(TokenResponse):
    """Of a sign-in: also what shows the next time, in the header X-Device-Token, that the device is no stranger."""

    device_token: str


class SessionResponse(ApiModel):
    """A signed-in device; `current` marks the one that asks."""

    session_id: str
    ip: str | None
    device_fingerprint: str | None
    created_at: Timestamp
    expires_at: Timestamp
    current: bool


# What an earlier sign-in from this device has answered. Browsers keep it as a cookie.
DeviceToken = Annotated[str | None, Header(alias="X-Device-Token", max_length=256)]


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


@router.post(
    "/login",
    dependencies=[Depends(limit_sign_ins)],
    responses=problems("INVALID_CREDENTIALS", "CREDENTIAL_LOCKED", "CREDENTIAL_EXPIRED"),
)
async def login(
    request: LoginRequest,
    device: ClientDevice,
    state: State,
    http: Request,
    response: Response,
    device_token: DeviceToken = None,
) -> LoginResponse:
    """Sign in; 401 for a wrong email or password, 403 when the credential is locked or has expired, and 429 while this
    place must wait after failures, or may work (`work`) instead."""
    now = datetime.now(UTC)
    place = _place(state, http, request, device, device_token, now)
    credential = await verified(state, request.email, request.password, device, place, now)
    anew = await state.passwords.hash(request.password) if state.passwords.outdated(credential.secret_hash) else None
    session = new_session(credential.user_id, credential.roles, _text(device.ip), device.fingerprint, now)
    refresh_token = state.refresh_tokens.first(session.session_id)
    async with state.pool.acquire() as conn, conn.transaction():
        await audit_login(conn, email=request.email, user_id=session.user_id, device=device, reason=None)
        if anew is not None:
            await replace_hash(conn, session.user_id, credential.secret_hash, anew)
        await open_session(conn, state.redis, session, _digest(refresh_token))
    tokens = _tokens(state, session, refresh_token, response, now)
    return LoginResponse(
        **tokens.model_dump(), device_token=_keep_device(state, http, response, request.email, place.device_id, now)
    )


@router.post("/token/refresh", responses=problems("UNAUTHENTICATED"))
async def refresh(request: RefreshRequest, state: State, response: Response) -> TokenResponse:
    """Exchange a refresh token for new tokens of the same session. Repeated within 30 seconds it gets the same answer;
    later, or when the next one has been used already, it revokes the session."""
    next_tokens = {_digest(token): token for token in state.refresh_tokens.following(request.refresh_token)}
    rotation = await rotate(
        state.pool,
        state.redis,
        _session_id_in(request.refresh_token),
        _digest(request.refresh_token),
        next_hashes=list(next_tokens),
        is_ours=state.refresh_tokens.is_ours(request.refresh_token),
        now=datetime.now(UTC),
    )
    return _tokens(state, rotation.session, next_tokens[rotation.token_hash], response, rotation.at)


@router.post("/logout", status_code=204)
async def logout(user: SignedIn, state: State) -> None:
    """End the session of the access token."""
    await _end(state, user, user.session_id, "LOGOUT")


@router.post("/password", status_code=204, responses=problems("INVALID_CREDENTIALS", "CREDENTIAL_LOCKED", "NOT_FOUND"))
async def change_own_password(
    request: PasswordChangeRequest, device: ClientDevice, user: SignedIn, state: State
) -> None:
    """Change one's password, which ends all other sessions; 401 INVALID_CREDENTIALS when the current one is wrong."""
    now = datetime.now(UTC)
    credential = await find_password_of(state.pool, user.user_id)
    if credential is None:
        raise Problem("NOT_FOUND", "There is no password to change")
    place = Place(device.ip, user.session_id)
    await verified(state, credential.email, request.current_password, device, place, now)
    await _change(state, credential, request, now, but=user.session_id)


@router.post(
    "/password/renew",
    status_code=204,
    dependencies=[Depends(limit_sign_ins)],
    responses=problems("INVALID_CREDENTIALS", "CREDENTIAL_LOCKED"),
)
async def renew_password(
    request: PasswordRenewalRequest,
    device: ClientDevice,
    state: State,
    http: Request,
    device_token: DeviceToken = None,
) -> None:
    """Replace a password that has expired, or any, and end all sessions; refused like a login."""
    now = datetime.now(UTC)
    place = _place(state, http, request, device, device_token, now)
    credential = await verified(state, request.email, request.current_password, device, place, now, may_be_expired=True)
    await _change(state, credential, request, now, but=None)


@router.get("/sessions")
async def sessions(
    user: SignedIn,
    state: State,
    limit: Annotated[int, Query(ge=1, le=SESSIONS_MAX)] = SESSIONS_MAX,
    cursor: Annotated[uuid.UUID | None, Query(description="nextCursor of the part before")] = None,
) -> Page[SessionResponse]:
    """One's own sessions, newest first."""
    after = str(cursor) if cursor is not None else None
    found = await good_sessions(state.pool, user.user_id, datetime.now(UTC), after, limit)
    next_cursor = found[-1].session_id if len(found) == limit else None
    return Page(items=[_session_response(session, user) for session in found], next_cursor=next_cursor)


@router.delete("/sessions/{session_id}", status_code=204, responses=problems("NOT_FOUND"))
async def delete_session(session_id: uuid.UUID, user: SignedIn, state: State) -> None:
    """End one of one's own sessions; its access token is refused and its sockets close at once."""
    if not await _end(state, user, str(session_id), "REVOKED_BY_USER"):
        raise Problem("NOT_FOUND", "There is no such session")


def _place(
    state: AppState,
    http: Request,
    request: LoginRequest | PasswordRenewalRequest,
    device: Device,
    token: str | None,
    now: datetime,
) -> Place:
    account = account_of(request.email)
    shown = token or http.cookies.get(_cookie_of(account), "")
    work = None if request.work is None else Work(request.work.challenge, request.work.solution)
    return Place(device.ip, state.proofs.device_of(shown, account, now), work)


def _keep_device(
    state: AppState, http: Request, response: Response, email: str, device_id: str | None, now: datetime
) -> str:
    account = account_of(email)
    token = state.proofs.device_token(account, now, device_id)
    response.set_cookie(
        _cookie_of(account),
        token,
        max_age=int(DEVICE_LIFETIME.total_seconds()),
        path=router.prefix,
        secure=http.url.scheme == "https",
        httponly=True,
        samesite="strict",
    )
    return token


def _cookie_of(account: str) -> str:
    """One for each account that is used on a device."""
    return f"device-{account[:16]}"


async def _change(
    state: AppState, credential: PasswordCredential, request: PasswordChangeRequest, now: datetime, *, but: str | None
) -> None:
    if request.new_password == request.current_password:
        raise _refused("must not be the current password")
    try:
        good_password(request.new_password, credential.email)
    except ValueError as error:
        raise _refused(str(error)) from None
    secret_hash = await state.passwords.hash(request.new_password)
    user_id = credential.user_id
    async with state.pool.acquire() as conn, conn.transaction():
        if not await change_password(conn, user_id, credential.secret_hash, secret_hash):
            raise Problem("INVALID_CREDENTIALS", "The password has been changed meanwhile")
        await revoke(conn, state.redis, user_id, session_id=None, but=but, reason="PASSWORD_CHANGED", now=now)
        ended = await revoke_keys(conn, user_id, None, now) if request.end_api_keys else []
    await tell_key_changed(state.redis, *ended)
    log.info("user %d has changed the password", user_id)


def _refused(why: str) -> Problem:
    errors = [{"field": "newPassword", "message": why}]
    return Problem("VALIDATION_FAILED", "The request is not valid", errors=errors)


async def _end(state: AppState, user: Identity, session_id: str, reason: str) -> bool:
    now = datetime.now(UTC)
    async with state.pool.acquire() as conn, conn.transaction():
        ended = await revoke(conn, state.redis, user.user_id, session_id=session_id, reason=reason, now=now)
    return bool(ended)


def _tokens(state: AppState, session: Session, refresh_token: str, response: Response, now: datetime) -> TokenResponse:
    response.headers["Cache-Control"] = "no-store"
    identity = Identity(session.user_id, frozenset(session.roles), session.session_id)
    return TokenResponse(
        access_token=state.tokens.issue(identity, now, token_id=_digest(refresh_token)[:16]),
        refresh_token=refresh_token,
        refresh_expires_in=int((session.expires_at - now).total_seconds()),
        session_id=session.session_id,
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


def _session_id_in(refresh_token: str) -> str:
    session_id = refresh_token.partition(".")[0]
    try:
        return str(uuid.UUID(session_id))
    except ValueError as error:
        raise Problem("UNAUTHENTICATED", "The refresh token is not valid") from error


def _digest(refresh_token: str) -> str:
    return hashlib.sha256(refresh_token.encode()).hexdigest()


def _text(ip: Address | None) -> str | None:
    return str(ip) if ip is not None else None

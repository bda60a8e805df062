"""The edge of every request: its id, its size, and who sends it."""

import hmac
import logging
import re
import uuid
from datetime import UTC, datetime
from typing import Annotated

from fastapi import Depends, Header, Query, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.models import UserId
from api.problems import internal_error, problem_response
from api.state import AppState, State
from domain.identity import SERVICE, Identity
from domain.problems import Problem

log = logging.getLogger(__name__)

BODY_BYTES_MAX = 1 << 20
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,64}")
_bearer = HTTPBearer(auto_error=False, description="An access token of POST /api/auth/login")
Bearer = Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)]
InternalToken = Annotated[str | None, Header(alias="X-Internal-Token")]


class Gateway:
    """ASGI middleware: X-Request-Id, a limit on bodies, and no request without an answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request; sockets pass untouched."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [*message["headers"], (b"x-request-id", request_id)]
            await send(message)

        try:
            refusal = _refusal(scope)
            if refusal is not None:
                await problem_response(refusal, {"Connection": "close"})(scope, receive, send_with_id)
            else:
                await self._app(scope, _limited(receive), send_with_id)
        except Exception:
            log.exception("request %s failed: %s %s", request_id.decode(), scope["method"], scope["path"])
            if started:
                raise
            await internal_error()(scope, receive, send_with_id)


def _request_id(scope: Scope) -> bytes:
    given = _header(scope, b"x-request-id")
    return given if given is not None and _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex.encode()


def _refusal(scope: Scope) -> Problem | None:
    length = _header(scope, b"content-length")
    if length is not None and length.isdigit() and int(length) > BODY_BYTES_MAX:
        return Problem("REQUEST_TOO_LARGE", f"A body may have {BODY_BYTES_MAX} bytes")
    if b"%00" in scope.get("raw_path", b"") or b"%00" in scope["query_string"]:
        return Problem("VALIDATION_FAILED", "The address must not contain NUL characters")
    return None


def _limited(receive: Receive) -> Receive:
    received = 0

    async def receive_limited() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > BODY_BYTES_MAX:
            raise HTTPException(413, f"A body may have {BODY_BYTES_MAX} bytes", {"Connection": "close"})
        return message

    return receive_limited


def _header(scope: Scope, name: bytes) -> bytes | None:
    return next((value for key, value in scope["headers"] if key == name), None)


async def authenticate(state: AppState, token: str) -> Identity:
    """Whose access token this is, its session being good. Raises Problem UNAUTHENTICATED. Sockets call it too."""
    now = datetime.now(UTC)
    identity = state.tokens.verify(token, now)
    await state.sessions.require(identity.session_id, now)
    return identity


async def current_user(state: State, bearer: Bearer) -> Identity:
    """The signed-in user. Raises Problem UNAUTHENTICATED."""
    if bearer is None:
        raise Problem("UNAUTHENTICATED", "An access token is needed: Authorization: Bearer …")
    return await authenticate(state, bearer.credentials)


async def current_caller(state: State, bearer: Bearer, internal_token: InternalToken = None) -> Identity:
    """A signed-in user, or one of our services (`SERVICE`). Raises Problem UNAUTHENTICATED."""
    if _is_internal(state, bearer, internal_token):
        return SERVICE
    return await current_user(state, bearer)


async def require_internal(state: State, bearer: Bearer, internal_token: InternalToken = None) -> Identity:
    """One of our services. Raises Problem FORBIDDEN for a signed-in user, UNAUTHENTICATED for anybody else."""
    caller = await current_caller(state, bearer, internal_token)
    if not caller.is_internal:
        raise Problem("FORBIDDEN", "This endpoint is for the exchange's own services")
    return caller


User = Annotated[Identity, Depends(current_user)]
Caller = Annotated[Identity, Depends(current_caller)]


async def require_admin(user: User) -> Identity:
    """A signed-in operator. Raises Problem FORBIDDEN for other users."""
    if not user.is_admin:
        raise Problem("FORBIDDEN", "This endpoint is for operators")
    return user


Admin = Annotated[Identity, Depends(require_admin)]


async def served_user_id(user: User, user_id: Annotated[UserId | None, Query(alias="userId")] = None) -> int:
    """The user whose data `?userId=` asks for, by default the caller. Raises Problem FORBIDDEN for another's."""
    require_may_act_for(user, user_id or user.user_id)
    return user_id or user.user_id


ServedUserId = Annotated[int, Depends(served_user_id)]


def require_may_act_for(caller: Identity, user_id: int) -> None:
    """Raise Problem FORBIDDEN unless this is the caller's own, or the caller is an operator or a service."""
    if not caller.may_act_for(user_id):
        raise Problem("FORBIDDEN", "This belongs to another user")


def _is_internal(state: AppState, bearer: HTTPAuthorizationCredentials | None, internal_token: str | None) -> bool:
    expected = state.settings.internal_token
    given = internal_token or (bearer.credentials if bearer is not None else None)
    if not expected or not given:
        return False
    return hmac.compare_digest(given.encode(), expected.encode())

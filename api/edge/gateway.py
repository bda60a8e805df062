"""The edge of every request: its id, its bounds, how often it may come, and who sends it."""

import asyncio
import hmac
import itertools
import logging
import re
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from typing import Annotated

from fastapi import Depends, Query, Request, Security
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.identity.addresses import client_address, network_of
from api.identity.signatures import signed_request
from api.limits.load import Load
from api.limits.rate_limits import Limit
from api.schema.models import UserId
from api.schema.problems import internal_error, problem_response
from api.schema.strictness import into_camel_case
from api.state import AppState, State
from domain.identity import SERVICE, Identity
from domain.problems import Problem
from settings import revealed

log = logging.getLogger(__name__)
access_log = logging.getLogger("access")

BODY_BYTES_MAX = 1 << 20
BODY_SECONDS_MAX = 10.0
SLOW_SECONDS = 1.0
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,64}")
_RECORD = "exchange.record"
# Probes tell the truth also, and above all, under load.
UNLIMITED = "/health/"
# Seconds, in turns: who is refused together does not come back together.
_RETRY_AFTER = itertools.cycle((1, 2, 3))
# Whose headers differ (`_headers`).
_KINDS_OF_PATHS = (b"/api/market/", b"/api/", b"/docs", b"/redoc", b"")
# Drawing lots for each of their ids would be the dearest part of a refusal.
_REFUSED, _refused_numbers = uuid.uuid4().hex[:16].encode(), itertools.count()
_SECURITY_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
]
_HSTS = (b"strict-transport-security", b"max-age=31536000; includeSubDomains")
_NO_STORE = (b"cache-control", b"no-store")
# What default-src does not cover.
_NOWHERE = b"; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
_POLICY = (b"content-security-policy", b"default-src 'none'" + _NOWHERE)
# Swagger UI and ReDoc as FastAPI serves them: from a CDN, started by a script in the page.
_DOCS_POLICY = (
    b"content-security-policy",
    b"default-src 'none'; connect-src 'self'; img-src 'self' data: https://fastapi.tiangolo.com;"
    b" script-src 'unsafe-inline' https://cdn.jsdelivr.net; style-src 'unsafe-inline' https://cdn.jsdelivr.net"
    b" https://fonts.googleapis.com; font-src https://fonts.gstatic.com; worker-src blob:" + _NOWHERE,
)
_DOCS = ("/docs", "/redoc")

_bearer = HTTPBearer(auto_error=False, scheme_name="accessToken", description="An access token of POST /api/auth/login")
_api_key = APIKeyHeader(
    name="X-Api-Key", auto_error=False, scheme_name="apiKey", description="A signed request: see docs/identity.md"
)
_internal_token = APIKeyHeader(
    name="X-Internal-Token", auto_error=False, scheme_name="internalToken", description="One of our own services"
)
Bearer = Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)]
ApiKeyId = Annotated[str | None, Security(_api_key)]
InternalToken = Annotated[str | None, Security(_internal_token)]


@dataclass(slots=True)
class RequestRecord:
    """What the gateway learns of a request on its way, for headers and the log."""

    request_id: bytes
    started: float
    status: int = 0
    user_id: int | None = None
    # What this request was counted by last, and how many more there may be at once.
    limit: Limit | None = None
    remaining: int = 0


class Gateway:
    """ASGI middleware: ids, limits on bodies, rates and load, headers, the log, and no request without an answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request or socket."""
        if scope["type"] != "lifespan":
            into_camel_case(scope)
        if scope["type"] == "http":
            await self._serve(scope, receive, send)
        elif scope["type"] == "websocket" and not await _socket_may_open(scope):
            await send({"type": "websocket.close", "code": 1013, "reason": "Too many requests"})
        else:
            await self._app(scope, receive, send)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        record = scope[_RECORD] = RequestRecord(_request_id(scope), time.perf_counter())
        load = scope["app"].state.load

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                message["headers"] = [*message["headers"], *_headers(scope, record, message["headers"])]
            await send(message)

        try:
            refusal = await _refusal(scope)
            if refusal is not None:
                # What is not read of a body would have to be skipped.
                headers = {"Connection": "close"} if refusal.code == "REQUEST_TOO_LARGE" else None
                await problem_response(refusal, headers)(scope, receive, send_with_headers)
            else:
                await self._app(scope, _limited(scope, receive), send_with_headers)
        except Exception:
            log.exception("request %s failed: %s %r", record.request_id.decode(), scope["method"], scope["path"])
            if record.status:
                raise
            await internal_error()(scope, receive, send_with_headers)
        finally:
            load.release(scope)
            _log_request(scope, record)


def _request_id(scope: Scope) -> bytes:
    given = _header(scope, b"x-request-id")
    return given if given is not None and _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex.encode()


def _headers(scope: Scope, record: RequestRecord, given: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    path: str = scope["path"]
    added = [(b"x-request-id", record.request_id), *_SECURITY_HEADERS]
    if record.limit is not None:
        added += record.limit.headers(record.remaining)
    added.append(_DOCS_POLICY if path.startswith(_DOCS) else _POLICY)
    if scope["scheme"] == "https":
        added.append(_HSTS)
    is_private = path.startswith("/api/") and not path.startswith("/api/market/")
    if is_private and all(name != b"cache-control" for name, _ in given):
        added.append(_NO_STORE)
    return added


def _log_request(scope: Scope, record: RequestRecord) -> None:
    """One line, with the route and not the path: no ids, no query, no headers, no body."""
    seconds = time.perf_counter() - record.started
    problem = record.status >= 500 or record.status in (0, 401, 403, 408, 413, 429) or seconds > SLOW_SECONDS
    if not problem and not scope["app"].state.logs_all_requests:
        return
    route = scope.get("route")
    fields = {
        "requestId": record.request_id.decode(),
        "userId": record.user_id,
        "address": str(client_address(scope)),
        "method": scope["method"],
        "route": getattr(route, "path", None),
        "status": record.status,
        "ms": round(seconds * 1000, 1),
    }
    access_log.log(logging.WARNING if problem else logging.INFO, "request", extra={"fields": fields})


async def _refusal(scope: Scope) -> Problem | None:
    length = _header(scope, b"content-length")
    if length is not None and length.isdigit() and int(length) > BODY_BYTES_MAX:
        return Problem("REQUEST_TOO_LARGE", f"A body may have {BODY_BYTES_MAX} bytes")
    if b"%00" in scope.get("raw_path", b"") or b"%00" in scope["query_string"]:
        return Problem("VALIDATION_FAILED", "The address must not contain NUL characters")
    if scope["path"].startswith(UNLIMITED):
        return None
    load: Load = scope["app"].state.load
    if not load.admit(scope):
        load.refused += 1
        return _overload(next(_RETRY_AFTER))
    try:
        await _spend_of_address(scope)
    except Problem as problem:
        return problem
    return None


def _overload(retry_after: int) -> Problem:
    return Problem("OVERLOADED", "The exchange has more to do than it can; try again shortly", retryAfter=retry_after)


def count_in(scope: Scope, load: Load) -> None:
    """Count a request of which the head is known; if the load is too high for it, the gateway will refuse it."""
    if not scope["path"].startswith(UNLIMITED):
        load.admit(scope)


def overload_answer(
    target: bytes, scheme: str, request_id: bytes, more_headers: Iterable[tuple[bytes, bytes]]
) -> bytes:
    """The whole answer that the gateway would give, without the application: a refusal must cost next to nothing, or
    refusing leaves no time for what was let in. `request_id` is the client's, if it sent one."""
    kind = next(prefix for prefix in _KINDS_OF_PATHS if target.startswith(prefix))
    head, body = _overload_parts(kind.decode(), scheme, next(_RETRY_AFTER))
    if not _REQUEST_ID.fullmatch(request_id):
        request_id = b"%b-%x" % (_REFUSED, next(_refused_numbers))
    return b"".join((head % request_id, *(b"%b: %b\r\n" % header for header in more_headers), b"\r\n", body))


@cache
def _overload_parts(path: str, scheme: str, retry_after: int) -> tuple[bytes, bytes]:
    """The head, with a place for the request's id and without its end, and the body."""
    response = problem_response(_overload(retry_after))
    record = RequestRecord(b"%b", 0.0)
    headers = response.raw_headers + _headers({"path": path, "scheme": scheme}, record, response.raw_headers)
    lines = [b"%b: %b\r\n" % header for header in headers]
    return b"".join((b"HTTP/1.1 503 Service Unavailable\r\n", *lines)), bytes(response.body)


async def _spend_of_address(scope: Scope) -> None:
    state: AppState = scope["app"].state.exchange
    await spend(scope, state, state.limits.address, network_of(client_address(scope)))


async def _socket_may_open(scope: Scope) -> bool:
    try:
        await _spend_of_address(scope)
    except Problem:
        return False
    return True


async def spend(scope: Scope, state: AppState, limit: Limit, who: str) -> None:
    """Count a request by a limit, and say so in its answer. Raises Problem RATE_LIMITED."""
    if not limit.per_second:
        return
    record: RequestRecord | None = scope.get(_RECORD)
    if record is not None:
        record.limit, record.remaining = limit, 0
    remaining = await state.rates.spend(limit, who)
    if record is not None:
        record.remaining = remaining


def _limited(scope: Scope, receive: Receive) -> Receive:
    received, complete = 0, False
    deadline = asyncio.get_running_loop().time() + BODY_SECONDS_MAX

    async def receive_limited() -> Message:
        nonlocal received, complete
        if complete:
            return await receive()
        try:
            async with asyncio.timeout_at(deadline):
                message = await receive()
        except TimeoutError:
            raise HTTPException(408, f"A body may take {BODY_SECONDS_MAX:g} s", {"Connection": "close"}) from None
        complete = not message.get("more_body", False)
        received += len(message.get("body", b""))
        if received > BODY_BYTES_MAX:
            raise HTTPException(413, f"A body may have {BODY_BYTES_MAX} bytes", {"Connection": "close"})
        return message

    has_body = any(name in (b"content-length", b"transfer-encoding") for name, _ in scope["headers"])
    return receive_limited if has_body else receive


def _header(scope: Scope, name: bytes) -> bytes | None:
    return next((value for key, value in scope["headers"] if key == name), None)


async def authenticate(state: AppState, token: str) -> Identity:
    """Whose access token this is, its session being good. Raises Problem UNAUTHENTICATED. Sockets call it too."""
    now = datetime.now(UTC)
    identity = state.tokens.verify(token, now)
    await state.sessions.require(identity.session_id, now)
    return identity


async def current_signed_in(request: Request, state: State, bearer: Bearer) -> Identity:
    """The user who has signed in, in person: an API key is refused. Raises Problem UNAUTHENTICATED, RATE_LIMITED."""
    if bearer is None:
        raise Problem("UNAUTHENTICATED", "An access token is needed: Authorization: Bearer …")
    identity = await authenticate(state, bearer.credentials)
    _know(request, identity)
    await spend(request.scope, state, state.limits.user, str(identity.user_id))
    return identity


async def current_user(request: Request, state: State, bearer: Bearer, key_id: ApiKeyId) -> Identity:
    """The signed-in user, or whose API key has signed the request. Raises Problem UNAUTHENTICATED, FORBIDDEN,
    RATE_LIMITED."""
    if key_id is None:
        return await current_signed_in(request, state, bearer)
    if bearer is not None:
        raise Problem("UNAUTHENTICATED", "Expected an access token or an API key, was both")
    identity = await state.keys.authenticate(await signed_request(request, key_id), datetime.now(UTC))
    _know(request, identity)
    await spend(request.scope, state, state.limits.api_key, key_id)
    return identity


async def current_caller(
    request: Request, state: State, bearer: Bearer, key_id: ApiKeyId, internal_token: InternalToken
) -> Identity:
    """A user, or one of our services (`SERVICE`). Raises Problem UNAUTHENTICATED, FORBIDDEN, RATE_LIMITED."""
    if _is_internal(state, bearer, internal_token):
        return SERVICE
    return await current_user(request, state, bearer, key_id)


async def require_internal(caller: Annotated[Identity, Security(current_caller, scopes=["internal"])]) -> Identity:
    """One of our services. Raises Problem FORBIDDEN for a user, UNAUTHENTICATED for anybody else."""
    if not caller.is_internal:
        raise Problem("FORBIDDEN", "This endpoint is for the exchange's own services")
    return caller


# A user in person or by key; in person only; a user or one of our services.
User = Annotated[Identity, Depends(current_user)]
SignedIn = Annotated[Identity, Depends(current_signed_in)]
Caller = Annotated[Identity, Depends(current_caller)]


async def require_admin(user: Annotated[Identity, Security(current_signed_in, scopes=["admin"])]) -> Identity:
    """A signed-in operator. Raises Problem FORBIDDEN for other users."""
    if not user.is_admin:
        raise Problem("FORBIDDEN", "This endpoint is for operators")
    return user


Admin = Annotated[Identity, Depends(require_admin)]


async def limit_sign_ins(request: Request, state: State) -> None:
    """Count a request that makes us hash a password, by its address. Raises Problem RATE_LIMITED."""
    await spend(request.scope, state, state.limits.sign_in, network_of(client_address(request.scope)))


def _know(request: Request, identity: Identity) -> None:
    record: RequestRecord | None = request.scope.get(_RECORD)
    if record is not None:
        record.user_id = identity.user_id


async def served_user_id(user: User, user_id: Annotated[UserId | None, Query(alias="userId")] = None) -> int:
    """The user whose data `?userId=` asks for, by default the caller. Raises Problem FORBIDDEN for another's."""
    require_may_act_for(user, user_id or user.user_id)
    return user_id or user.user_id


ServedUserId = Annotated[int, Depends(served_user_id)]


def require_may_trade(caller: Identity, instrument_id: str) -> None:
    """Raise Problem FORBIDDEN when an API key is bound to other instruments."""
    if not caller.may_trade(instrument_id):
        raise Problem("FORBIDDEN", f"The API key may trade {', '.join(sorted(caller.instruments))} only")


def require_may_trade_all(caller: Identity) -> None:
    """Raise Problem FORBIDDEN when an API key is bound to some instruments: this is about all."""
    if caller.instruments:
        raise Problem("FORBIDDEN", "The API key is bound to instruments, and this is about all of them")


def require_may_act_for(caller: Identity, user_id: int) -> None:
    """Raise Problem FORBIDDEN unless this is the caller's own, or the caller is an operator or a service."""
    if not caller.may_act_for(user_id):
        raise Problem("FORBIDDEN", "This belongs to another user")


def _is_internal(state: AppState, bearer: HTTPAuthorizationCredentials | None, internal_token: str | None) -> bool:
    expected = revealed(state.settings.internal_token)
    given = internal_token or (bearer.credentials if bearer is not None else None)
    if not expected or not given:
        return False
    return hmac.compare_digest(given.encode(), expected.encode())

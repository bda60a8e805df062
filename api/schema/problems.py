"""Every error as an RFC 9457 problem document with a stable `code`, and nothing of our insides in it."""

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import asyncpg
import redis.exceptions
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from temporalio.service import RPCError, RPCStatusCode

from domain.problems import HTTP_STATUS, Problem
from storage.db import OUTAGES

log = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"
RETRY_AFTER_SECONDS = 1
DETAIL_LENGTH_MAX = 200
# What pydantic says otherwise, by the kind of its error.
_MESSAGES = {
    "missing": "It is needed, and missing",
    "extra_forbidden": "There is nothing of this name here, or it is there in the other spelling, too",
}
_OBJECT_NEEDED = "Expected a JSON object, with Content-Type: application/json"
_MESSAGES_OF_BODY = {
    "missing": "A body is needed: a JSON object, with Content-Type: application/json",
    "model_attributes_type": _OBJECT_NEEDED,
    "model_type": _OBJECT_NEEDED,
}
_TYPE_PREFIX = "urn:saga-exchange:problem:"
_CODE_OF_STATUS = {
    400: "VALIDATION_FAILED",
    401: "UNAUTHENTICATED",
    403: "FORBIDDEN",
    404: "NOT_FOUND",
    405: "METHOD_NOT_ALLOWED",
    408: "REQUEST_TIMEOUT",
    413: "REQUEST_TOO_LARGE",
    415: "VALIDATION_FAILED",
    429: "RATE_LIMITED",
    503: "OVERLOADED",
}
# A server that is away, restarting or full: the caller may try again.
_OUTAGES: tuple[type[Exception], ...] = (
    *OUTAGES,
    redis.exceptions.ConnectionError,
    redis.exceptions.TimeoutError,
)
_TEMPORAL_OUTAGES = {RPCStatusCode.UNAVAILABLE, RPCStatusCode.DEADLINE_EXCEEDED, RPCStatusCode.RESOURCE_EXHAUSTED}


class FieldError(BaseModel):
    """What is wrong in one place of a request."""

    field: str
    message: str


class ProblemDocument(BaseModel):
    """Why a request was not served (RFC 9457). `code` is stable; `detail` is for people; `errors` come with
    VALIDATION_FAILED and say what is wrong where. Some codes have more members."""

    model_config = ConfigDict(extra="allow")

    type: str
    title: str
    status: int
    detail: str
    code: str = Field(json_schema_extra={"enum": [*sorted(HTTP_STATUS)]})
    errors: list[FieldError] | None = None


def problem_response(problem: Problem, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """The document of a problem; 429 and 503 carry Retry-After, 401 says how to authenticate."""
    members = problem_members(problem)
    return JSONResponse(members, problem.status, {**_headers(problem), **(headers or {})}, media_type=MEDIA_TYPE)


def problem_members(problem: Problem) -> dict[str, Any]:
    """The members of a problem's document."""
    return {
        "type": _TYPE_PREFIX + problem.code.lower().replace("_", "-"),
        "title": problem.code.replace("_", " ").capitalize(),
        "status": problem.status,
        "detail": problem.detail,
        "code": problem.code,
        **problem.extra,
    }


def invalid(errors: Iterable[Mapping[str, Any]], location_from: int = 0) -> Problem:
    """VALIDATION_FAILED out of pydantic's errors: only place and rule, since the rejected input may be a password."""
    return refused(*((_field(item, location_from), _message(item)) for item in errors))


def refused(*errors: tuple[str, str]) -> Problem:
    """VALIDATION_FAILED out of places and what is wrong there; its detail has the first of them."""
    listed = [{"field": field, "message": message} for field, message in errors]
    first = ": ".join(errors[0]) if errors else ""
    return Problem("VALIDATION_FAILED", f"The request is not valid: {first}"[:DETAIL_LENGTH_MAX], errors=listed)


def add_handlers(app: FastAPI) -> None:
    """Make every exception of the application a problem document."""
    app.add_exception_handler(Problem, _business)
    app.add_exception_handler(RequestValidationError, _validation)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(asyncpg.DataError, _data)
    app.add_exception_handler(RPCError, _temporal)
    for outage in _OUTAGES:
        app.add_exception_handler(outage, _outage)


def internal_error() -> JSONResponse:
    """The document of an error that nobody foresaw; the log has the rest."""
    return problem_response(Problem("REMOTE_SERVICE_ERROR", "The request could not be served"))


def _headers(problem: Problem) -> dict[str, str]:
    if problem.code in ("RATE_LIMITED", "OVERLOADED") or "retryAfter" in problem.extra:
        return {"Retry-After": str(problem.extra.get("retryAfter", RETRY_AFTER_SECONDS))}
    return {"WWW-Authenticate": "Bearer"} if HTTP_STATUS[problem.code] == 401 else {}


async def _business(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, Problem)
    return problem_response(error)


async def _validation(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    return problem_response(invalid(error.errors(), location_from=1))


def _field(error: Mapping[str, Any], location_from: int) -> str:
    # Where JSON ends to be JSON is a position, and no member.
    location = error["loc"][:1] if error["type"] == "json_invalid" else error["loc"]
    return ".".join(map(str, location[location_from:])) or ".".join(map(str, location))


def _message(error: Mapping[str, Any]) -> str:
    kind, location = error["type"], error["loc"]
    if kind == "json_invalid":
        return f"Expected JSON: {error['ctx']['error']} at character {location[-1]}"
    told = _MESSAGES_OF_BODY.get(kind) if location == ("body",) else _MESSAGES.get(kind)
    return told or str(error["msg"]).removeprefix("Value error, ")


async def _http(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    code = _CODE_OF_STATUS.get(error.status_code, "REMOTE_SERVICE_ERROR")
    return problem_response(Problem(code, str(error.detail)), error.headers)


async def _data(_: Request, error: Exception) -> JSONResponse:
    # The last net under the models: text or numbers that Postgres cannot hold.
    log.warning("Postgres refused a value: %s", type(error).__name__)
    return problem_response(Problem("VALIDATION_FAILED", "A value cannot be stored: out of range or not valid text"))


async def _temporal(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RPCError)
    if error.status in _TEMPORAL_OUTAGES:
        return await _outage(request, error)
    log.error("Temporal refused a call", exc_info=error)
    return internal_error()


async def _outage(request: Request, error: Exception) -> JSONResponse:
    log.warning("%s %s: a server is away: %r", request.method, request.url.path, error)
    return problem_response(Problem("OVERLOADED", "The exchange is busy or restarting; try again shortly"))

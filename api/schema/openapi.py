"""The OpenAPI document: FastAPI's, completed by what holds for every call, and by examples.

A route says with `problems(…)` which refusals are its own. Here are those that any call may meet.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute

from api.schema.examples import BODIES
from api.schema.problems import MEDIA_TYPE, ProblemDocument, problem_members
from domain.problems import HTTP_STATUS, Problem

Json = dict[str, Any]

# The model is in the document because batches of orders answer with it too.
_PROBLEM = f"#/components/schemas/{ProblemDocument.__name__}"
_DESCRIPTIONS = {
    400: "Not allowed by the rules of the exchange, or not now",
    401: "Nobody is signed in",
    403: "Not for this caller",
    404: "There is no such thing, or it is another user's",
    409: "At odds with something that is there already",
    413: "The body is too large",
    422: "The request is not valid",
    429: "Too many requests; the header says when to come again",
    500: "The request could not be served",
    503: "The exchange is busy, or part of it is away; the header says when to come again",
}
_RETRY_AFTER = {"Retry-After": {"description": "Seconds", "schema": {"type": "string"}}}
_HEADERS: dict[int, Json] = {
    401: {"WWW-Authenticate": {"description": "How to authenticate", "schema": {"type": "string"}}},
    429: _RETRY_AFTER,
    503: _RETRY_AFTER,
}
_ALWAYS = ("VALIDATION_FAILED", "RATE_LIMITED", "REMOTE_SERVICE_ERROR", "OVERLOADED")
_SIGNED_IN = ("UNAUTHENTICATED", "FORBIDDEN")
_NOT_MODIFIED = {"description": "The answer still is the one that `If-None-Match` names"}
# What anybody may call. Every other route says in its signature (`User`, `Admin`, …) whom it is for.
PUBLIC_PREFIXES = ("/api/market/", "/health/", "/.well-known/", "/metrics")
PUBLIC_CALLS = {
    ("/api/users", "post"),
    ("/api/auth/login", "post"),
    ("/api/auth/token/refresh", "post"),
    ("/api/auth/password/renew", "post"),
}
# FastAPI's own documents of invalid requests, which nobody gets.
_UNUSED = ("HTTPValidationError", "ValidationError")


class DocumentedApi(FastAPI):
    """An application whose OpenAPI document tells all that its clients may meet."""

    def openapi(self) -> Json:
        """The document, made once. `security` lists who may call, with the role that is needed; `[]`: anybody."""
        if self.openapi_schema is None:
            document = super().openapi()
            for path, calls in document["paths"].items():
                for method, call in calls.items():
                    _say_who_may(path, method, call)
                    _complete(call, is_cached=path.startswith("/api/market/"))
            for name in _UNUSED:
                document["components"]["schemas"].pop(name, None)
        return super().openapi()


def operation_id(route: APIRoute) -> str:
    """A name that stays when paths change: the first tag and the function's name."""
    return f"{route.tags[0]}_{route.name}" if route.tags else route.name


def problems(*codes: str) -> dict[int | str, Json]:
    """The `responses=` of a route that refuses with these codes."""
    statuses = {HTTP_STATUS[code] for code in codes}
    return {
        status: _problem_response(status, [code for code in codes if HTTP_STATUS[code] == status])
        for status in sorted(statuses)
    }


def links(status: int = 200, **parameters: tuple[str, str]) -> dict[int | str, Json]:
    """The `responses=` of a route whose answer's members are parameters of others: operation id to (name, member)."""
    return {
        status: {
            "links": {
                operation: {"operationId": operation, "parameters": {name: f"$response.body#/{member}"}}
                for operation, (name, member) in parameters.items()
            }
        }
    }


def _say_who_may(path: str, method: str, call: Json) -> None:
    if path.startswith(PUBLIC_PREFIXES) or (path, method) in PUBLIC_CALLS:
        call.setdefault("security", [])
    elif {"internalToken": ["internal"]} in call.get("security", []):
        # The others are looked at only to tell a user, who is forbidden, from a stranger.
        call["security"] = [{"internalToken": ["internal"]}]


def _problem_response(status: int, codes: list[str]) -> Json:
    examples = {code: {"value": problem_members(Problem(code, _DESCRIPTIONS[status]))} for code in codes}
    content = {"schema": {"$ref": _PROBLEM}, "examples": examples}
    return {
        "description": f"{_DESCRIPTIONS[status]}: {', '.join(codes)}",
        "content": {MEDIA_TYPE: content},
        **({"headers": _HEADERS[status]} if status in _HEADERS else {}),
    }


def _complete(call: Json, *, is_cached: bool) -> None:
    responses = call["responses"]
    codes = [*_ALWAYS, *(_SIGNED_IN if call.get("security") else ())]
    if "requestBody" in call:
        codes.append("REQUEST_TOO_LARGE")
    own = [code for response in responses.values() for code in _codes(response)]
    for status, response in problems(*dict.fromkeys([*own, *codes])).items():
        responses[str(status)] = response
    if is_cached:
        responses["304"] = _NOT_MODIFIED
    call["responses"] = dict(sorted(responses.items()))
    for body in _bodies(call):
        _add_example(body)


def _codes(response: Json) -> list[str]:
    return list(response.get("content", {}).get(MEDIA_TYPE, {}).get("examples", {}))


def _bodies(call: Json) -> Iterator[Json]:
    for place in (call.get("requestBody", {}), *call["responses"].values()):
        content = place.get("content", {})
        if "application/json" in content:
            yield content["application/json"]


def _add_example(body: Json) -> None:
    example = _example(body.get("schema", {}))
    if example is not None:
        body.setdefault("example", example)


def _example(schema: Mapping[str, Any]) -> Any:
    if schema.get("type") == "array":
        item = _example(schema["items"])
        return None if item is None else [item]
    name: str = schema.get("$ref", "").rpartition("/")[2]
    if name.startswith("Page_"):
        item = BODIES.get(name.removeprefix("Page_").removesuffix("_"))
        return None if item is None else {"items": [item], "nextCursor": None}
    return BODIES.get(name)

"""Nothing that a caller sends is ignored: what a route does not know, or gets twice, is refused with its name.

`only_known` is a dependency of the whole application: every route passes it, and none has to ask for it. Unknown
members of bodies are refused by `api.schema.models.RequestModel`.
"""

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, urlencode

from fastapi import Request
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute
from pydantic import AliasChoices, BaseModel
from pydantic.alias_generators import to_camel, to_snake
from starlette.requests import HTTPConnection
from starlette.types import Scope

from api.schema.problems import refused

_SENT_QUERY = "exchange.query"


@dataclass(frozen=True)
class _Known:
    """What a route takes: `spellings` of a parameter, each with the one that the route reads, and whether a body."""

    spellings: Mapping[str, str]
    takes_body: bool


async def only_known(connection: HTTPConnection) -> None:
    """Raise Problem VALIDATION_FAILED, naming them, for parameters that the route does not know or that come twice, for
    members of a body that come twice, and for a body where none is taken."""
    if not isinstance(connection, Request):
        return
    known = _known_by(connection.scope["route"])
    require_known(connection.scope, known.spellings)
    body = await connection.body() if _has_body(connection) else b""
    if not known.takes_body:
        _require_empty(body)
    elif body:
        _require_once(body)


def into_camel_case(scope: Scope) -> None:
    """Put the names of a query in snake_case into camelCase, as routes read them; `sent_query` still has it as sent."""
    sent: bytes = scope["query_string"]
    if b"_" not in sent:
        return
    parameters = _parameters(sent)
    scope[_SENT_QUERY] = sent
    scope["query_string"] = urlencode([(_camel(name), value) for name, value in parameters]).encode()


def sent_query(scope: Scope) -> bytes:
    """The query as it was sent: it is what an API key has signed."""
    query: bytes = scope.get(_SENT_QUERY, scope["query_string"])
    return query


def require_known(scope: Scope, known: Mapping[str, str]) -> None:
    """Raise Problem VALIDATION_FAILED, naming them, for parameters that are not in `known` or there twice."""
    sent = sent_query(scope)
    problems = list(_problems([name for name, _ in _parameters(sent)], known)) if sent else []
    if problems:
        raise refused(*problems)


def spellings(*names: str) -> dict[str, str]:
    """These parameters, in camelCase and in snake_case, each with its name in camelCase."""
    return {spelling: name for name in names for spelling in (name, to_snake(name))}


def loads_once(text: bytes | str) -> Any:
    """The JSON document. Raises Problem VALIDATION_FAILED, naming it, for a member that comes twice, ValueError for
    what is not JSON, RecursionError for what is nested too deeply."""
    return json.loads(text, object_pairs_hook=_members)


def _parameters(query: bytes) -> list[tuple[str, str]]:
    # As starlette reads it.
    return parse_qsl(query.decode("latin-1"), keep_blank_values=True)


def _camel(name: str) -> str:
    return to_camel(name) if "_" in name else name


def _problems(names: Collection[str], known: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    seen: dict[str, str] = {}
    for name in names:
        read = known.get(name)
        if read is None:
            yield name, "There is no such parameter here"
        elif read in seen:
            again = "comes twice" if seen[read] == name else f"is the same as {seen[read]}, which is there, too"
            yield name, f"The parameter {again}"
        else:
            seen[read] = name


def _has_body(request: Request) -> bool:
    return request.headers.get("content-length", "0") != "0" or "transfer-encoding" in request.headers


def _require_empty(body: bytes) -> None:
    # An object without members says nothing; many a client sends it with every POST.
    if body.strip() not in (b"", b"{}"):
        raise refused(("body", "No body is taken here"))


def _require_once(body: bytes) -> None:
    try:
        loads_once(body)
    except (ValueError, RecursionError):
        return  # Whoever reads it says so.


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        names = [name for name, _ in pairs]
        raise refused(*((name, "The member comes twice") for name in members if names.count(name) > 1))
    return members


# By the route's function, since routes have no hash.
_remembered: dict[Callable[..., Any], _Known] = {}


def _known_by(route: APIRoute) -> _Known:
    known = _remembered.get(route.endpoint)
    if known is None:
        known = _remembered[route.endpoint] = _Known(
            dict(_spellings(route.dependant)), takes_body=route.body_field is not None
        )
    return known


def _spellings(dependant: Dependant) -> Iterator[tuple[str, str]]:
    for parameter in dependant.query_params:
        kind = parameter.field_info.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _spellings_of_model(kind)
        else:
            yield from _both(parameter.alias)
    for each in dependant.dependencies:
        yield from _spellings(each)


def _spellings_of_model(model: type[BaseModel]) -> Iterator[tuple[str, str]]:
    for name, field in model.model_fields.items():
        choices = field.validation_alias
        if isinstance(choices, AliasChoices):
            for choice in choices.choices:
                yield from ((spelling, str(choices.choices[0])) for spelling, _ in _both(str(choice)))
        else:
            yield from _both(field.alias or name)


def _both(name: str) -> Iterator[tuple[str, str]]:
    yield name, name
    if to_camel(to_snake(name)) == name:
        yield to_snake(name), name

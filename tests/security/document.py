"""The OpenAPI document as a list of calls to try."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

# Values for parameters in paths: of the right form, and of nothing that exists.
_VALUES = {"instrument_id": "BTC-USDT-PERP", "instrumentId": "BTC-USDT-PERP", "session_id": "0" * 32}


@dataclass(frozen=True)
class Call:
    """One operation. `security`: None when the document does not say who may call it."""

    method: str
    path: str
    security: list[dict[str, list[str]]] | None
    parameters: list[dict[str, Any]]
    body: dict[str, Any] | None

    @property
    def name(self) -> str:
        return f"{self.method} {self.path}"

    @property
    def schemes(self) -> dict[str, list[str]]:
        """By what a caller may be known, with the roles that are needed."""
        return {name: roles for entry in self.security or [] for name, roles in entry.items()}

    @property
    def roles(self) -> set[str]:
        return {role for roles in self.schemes.values() for role in roles}

    @property
    def in_path(self) -> list[str]:
        return [each["name"] for each in self.parameters if each["in"] == "path"]

    def url(self, **values: str) -> str:
        """The path with values of the right form in it."""
        return self.path.format_map({name: values.get(name, _VALUES.get(name, "77")) for name in self.in_path})


def calls(document: dict[str, Any]) -> list[Call]:
    """Every operation of the document."""
    return list(_calls(document))


def _calls(document: dict[str, Any]) -> Iterator[Call]:
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
            schema = content.get("schema")
            if schema is not None and "$ref" in schema:
                schema = document["components"]["schemas"][schema["$ref"].rsplit("/", 1)[1]]
            yield Call(method.upper(), path, operation.get("security"), operation.get("parameters", []), schema)


def undeclared(document: dict[str, Any]) -> list[str]:
    """The operations that do not say who may call them."""
    return [call.name for call in calls(document) if call.security is None]

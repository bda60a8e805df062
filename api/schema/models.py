"""What all requests and responses share: camelCase out, camelCase or snake_case in, decimal strings, UTC times."""

from datetime import datetime
from decimal import Decimal
from typing import Annotated, Any, Generic, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainSerializer, WithJsonSchema, field_validator
from pydantic.alias_generators import to_camel

from domain.clock import iso
from domain.money import plain


def storable(text: str) -> str:
    """`text`, if Postgres can hold it. Raises ValueError for NUL characters and lone surrogates."""
    if "\x00" in text:
        raise ValueError("must not contain NUL characters")
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("must be valid Unicode text")
    return text


Timestamp = Annotated[datetime, PlainSerializer(iso, return_type=str)]
Amount = Annotated[Decimal, Field(max_digits=38, decimal_places=18), PlainSerializer(plain, return_type=str)]
# What may be asked for: quantities in base, prices in quote per base, transfers in the asset they name.
Quantity = Annotated[Decimal, Field(gt=0, le=Decimal("1e9"), max_digits=38, decimal_places=18)]
Price = Annotated[Decimal, Field(gt=0, le=Decimal("1e12"), max_digits=38, decimal_places=18)]
TransferAmount = Annotated[Decimal, Field(gt=0, le=Decimal("1e15"), max_digits=38, decimal_places=8)]
# Ids of users are strings on the wire and integers inside.
UserId = Annotated[
    int,
    Field(ge=1, lt=2**63),
    PlainSerializer(str, return_type=str),
    WithJsonSchema({"type": "string", "pattern": "^[1-9][0-9]{0,18}$"}),
]
# For strings outside a body: path and query parameters.
SafeText = Annotated[str, AfterValidator(storable)]


class ApiModel(BaseModel):
    """Base of every response body, and of RequestModel. Whoever reads it ignores what they do not know."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True)

    @field_validator("*", mode="after")
    @classmethod
    def _storable(cls, value: Any) -> Any:
        return storable(value) if isinstance(value, str) else value


class RequestModel(ApiModel):
    """Base of every request body and every set of parameters: what is not in it is refused, and not ignored."""

    model_config = ConfigDict(extra="forbid")


Item = TypeVar("Item")


class Page(ApiModel, Generic[Item]):
    """Part of a list, newest first; `nextCursor` asks for the next part and is null at the end."""

    items: list[Item]
    next_cursor: str | None = None

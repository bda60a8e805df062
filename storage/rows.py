"""Rows as types: fields carry the names of their columns, and statements take their lists of columns from them.

A row type is a NamedTuple, so that its rows go to `COPY` and to `unnest` as they are.
"""

from collections.abc import Sequence
from datetime import datetime
from decimal import Decimal
from types import UnionType
from typing import Any, NamedTuple, TypeVar, get_args, get_type_hints

import asyncpg

from storage.db import columns

R = TypeVar("R", bound=NamedTuple)

_SQL_TYPES = {int: "bigint", str: "text", Decimal: "numeric", bool: "boolean", datetime: "timestamptz"}


def column_list(kind: type[NamedTuple], table: str | None = None) -> str:
    """The columns of a row type for a statement: `a, b`, or `t.a, t.b` of a table with the alias `t`."""
    return ", ".join(kind._fields if table is None else (f"{table}.{name}" for name in kind._fields))


def unnest(kind: type[NamedTuple], first: int = 1) -> str:
    """A batch of rows as a table `n`, from one array per column: `unnest($1::bigint[], $2::text[]) AS n (a, b)`.

    `first` is the number of the first parameter. Raises KeyError for a field whose type has no SQL type here.
    """
    types = [_SQL_TYPES[_present(hint)] for hint in get_type_hints(kind).values()]
    arrays = ", ".join(f"${first + i}::{name}[]" for i, name in enumerate(types))
    return f"unnest({arrays}) AS n ({column_list(kind)})"


def parameters(kind: type[NamedTuple], first: int = 1) -> str:
    """The parameters of one row, from number `first` on: `$1, $2`."""
    return ", ".join(f"${first + i}" for i in range(len(kind._fields)))


def assignments(kind: type[NamedTuple], *, source: str = "n", without: Sequence[str] = ()) -> str:
    """What an UPDATE sets from a batch of rows: `a = n.a, b = n.b` of all columns but those of the key."""
    return ", ".join(f"{name} = {source}.{name}" for name in kind._fields if name not in without)


def batch(kind: type[NamedTuple], rows: Sequence[NamedTuple]) -> list[list[Any]]:
    """Rows as the arrays that `unnest` takes, one per column; also when there are none."""
    return columns(rows, len(kind._fields))


def read(kind: type[R], records: Sequence[asyncpg.Record]) -> list[R]:
    """Records of a statement that selects the columns of a row type first, as such rows."""
    width = len(kind._fields)
    return [kind._make(record[:width]) for record in records]


def _present(hint: Any) -> Any:
    """The type of a field that may be None."""
    return next(part for part in get_args(hint) if part is not type(None)) if isinstance(hint, UnionType) else hint

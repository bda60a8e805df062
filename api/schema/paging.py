"""Lists that are asked for part by part, newest first."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import asyncpg
from fastapi import Query

LIST_MAX = 500
PageLimit = Annotated[int, Query(ge=1, le=LIST_MAX)]
PageCursor = Annotated[int | None, Query(ge=1, le=2**63 - 1, description="nextCursor of the part before")]


def next_cursor(rows: Sequence[Mapping[str, Any] | asyncpg.Record], limit: int, column: str) -> str | None:
    """What asks for the part after these rows: the last one's id; None when there cannot be more."""
    return str(rows[-1][column]) if len(rows) == limit else None

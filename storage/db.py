"""Connections to Postgres: one asyncpg pool per process. SQL is plain and set-based; tables are in `tables/`."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import asyncpg

from telemetry.metrics import watch_pool

# Generic for the type checker only: asyncpg's classes take no parameters at run time.
if TYPE_CHECKING:
    Connection = asyncpg.Connection[asyncpg.Record] | asyncpg.pool.PoolConnectionProxy[asyncpg.Record]
    Pool = asyncpg.Pool[asyncpg.Record]
else:
    Connection = asyncpg.Connection | asyncpg.pool.PoolConnectionProxy
    Pool = asyncpg.Pool

COMMAND_TIMEOUT_SECONDS = 30
# What a statement may raise when the server is away, restarting or ending. TimeoutError is an OSError.
OUTAGES = (
    OSError,
    asyncpg.PostgresConnectionError,
    asyncpg.OperatorInterventionError,
    asyncpg.InsufficientResourcesError,
    asyncpg.InterfaceError,
    # Of a connection that broke in the middle of an exchange of messages, and that the pool handed out all the same.
    asyncpg.InternalClientError,
)
# Or when it refuses it.
DATABASE_ERRORS = (*OUTAGES, asyncpg.PostgresError)


async def open_pool(url: str, *, size_min: int = 1, size_max: int = 10, name: str = "saga-exchange") -> Pool:
    """A pool of connections to `url`. Raises OSError or asyncpg errors when the server cannot be reached."""
    pool = await asyncpg.create_pool(
        url,
        min_size=size_min,
        max_size=size_max,
        command_timeout=COMMAND_TIMEOUT_SECONDS,
        # Nobody leaves anything behind on a connection (leadership unlocks by itself): no round trip to clean up.
        reset=_leave_as_is,
        server_settings={"application_name": name, "jit": "off", "timezone": "UTC"},
    )
    watch_pool(name, pool)
    return pool


async def _leave_as_is(_: object) -> None:
    """Instead of asyncpg's own reset."""


def columns(rows: Sequence[Sequence[Any]], width: int) -> list[list[Any]]:
    """Rows turned into `width` columns, the form in which unnest() takes a batch (also when there are none)."""
    if not rows:
        return [[] for _ in range(width)]
    turned = [list(column) for column in zip(*rows, strict=True)]
    assert len(turned) == width, f"Expected {width} columns, was {len(turned)}"
    return turned

"""Alembic's entry: runs the migrations over asyncpg, all in one transaction."""

import asyncio

from alembic import context
from sqlalchemy import Connection, text
from sqlalchemy.ext.asyncio import create_async_engine

from settings import get_settings
from storage.tables import SCHEMAS, metadata
from storage.views import VIEWS

MIGRATION_LOCK = 7_203_117


def _run(connection: Connection) -> None:
    # Several processes may start at once: one migrates, the others then find nothing to do.
    connection.execute(text(f"SELECT pg_advisory_xact_lock({MIGRATION_LOCK})"))
    for schema in SCHEMAS:
        connection.execute(text(f"CREATE SCHEMA IF NOT EXISTS {schema}"))
    # All that were ever published, so that one that is no longer there does not hold its tables.
    published = text("SELECT schemaname || '.' || viewname FROM pg_views WHERE schemaname = ANY(:schemas)")
    for view in connection.scalars(published, {"schemas": list(SCHEMAS)}).all():
        connection.execute(text(f"DROP VIEW {view}"))
    context.configure(connection=connection, target_metadata=metadata, include_schemas=True)
    context.run_migrations()
    for view, query in VIEWS.items():
        connection.execute(text(f"CREATE VIEW {view} AS {query}"))


async def _main() -> None:
    url = get_settings().require_database_url().replace("postgresql://", "postgresql+asyncpg://", 1)
    engine = create_async_engine(url)
    async with engine.begin() as connection:
        await connection.run_sync(_run)
    await engine.dispose()


asyncio.run(_main())

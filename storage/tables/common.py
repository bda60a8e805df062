"""What tables of all schemas share: the metadata, the kinds of columns, and the tables that several have."""

from typing import Any

from sqlalchemy import BigInteger, Column, DateTime, Index, MetaData, Numeric, Table, Text, text
from sqlalchemy.dialects.postgresql import JSON
from sqlalchemy.sql.type_api import TypeEngine

SCHEMAS = (
    "users",
    "auth",
    "orders",
    "risk",
    "ledger",
    "positions",
    "matching",
    "market",
    "outbox",
    "reporting",
)

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
    }
)

AMOUNT = Numeric(38, 8)
TIME = DateTime(timezone=True)


def col(name: str, kind: TypeEngine[Any], *, null: bool = False, default: str | None = None) -> Column[Any]:
    """A column, NOT NULL unless `null`; `default` is an SQL expression."""
    return Column(name, kind, nullable=null, server_default=text(default) if default is not None else None)


def created() -> Column[Any]:
    """When the row was written."""
    return col("created_at", TIME, default="now()")


def updated() -> Column[Any]:
    """When the row was changed last; whoever changes it sets it."""
    return col("updated_at", TIME, default="now()")


def cursors(schema: str) -> Table:
    """Up to which engine event this service has applied each instrument; its row lock orders the batches."""
    return Table(
        "cursors",
        metadata,
        Column("instrument_id", Text, primary_key=True),
        col("applied_seq", BigInteger(), default="0"),
        schema=schema,
    )


def steps(schema: str) -> Table:
    """First result of every batch step, so that a repeat changes nothing and answers the same."""
    return Table(
        "steps",
        metadata,
        Column("step_id", Text, primary_key=True),
        col("result", JSON()),
        created(),
        Index(f"ix_{schema}_steps_created_at", "created_at"),
        schema=schema,
    )

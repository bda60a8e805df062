"""funding settlement"""

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"

AMOUNT = sa.Numeric(38, 8)
TIME = sa.DateTime(timezone=True)


def upgrade() -> None:
    op.create_table(
        "funding_runs",
        sa.Column("instrument_id", sa.Text(), nullable=False),
        sa.Column("funding_time", TIME, nullable=False),
        sa.Column("asset", sa.Text(), nullable=False),
        sa.Column("rate", sa.Numeric(20, 12), nullable=False),
        sa.Column("mark_price", AMOUNT, nullable=False),
        sa.Column("status", sa.Text(), server_default=sa.text("'OPEN'"), nullable=False),
        sa.Column("positions", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("paid", AMOUNT, server_default=sa.text("0"), nullable=False),
        sa.Column("received", AMOUNT, server_default=sa.text("0"), nullable=False),
        sa.Column("insurance", AMOUNT, server_default=sa.text("0"), nullable=False),
        sa.Column("created_at", TIME, server_default=sa.text("now()"), nullable=False),
        sa.Column("updated_at", TIME, server_default=sa.text("now()"), nullable=False),
        sa.CheckConstraint("status IN ('OPEN', 'DONE')", name=op.f("ck_funding_runs_status")),
        sa.PrimaryKeyConstraint("instrument_id", "funding_time", name=op.f("pk_funding_runs")),
        schema="ledger",
    )
    op.create_table(
        "funding_positions",
        sa.Column("instrument_id", sa.Text(), nullable=False),
        sa.Column("funding_time", TIME, nullable=False),
        sa.Column("user_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("signed_quantity", AMOUNT, nullable=False),
        sa.Column("payment", AMOUNT, nullable=False),
        sa.PrimaryKeyConstraint("instrument_id", "funding_time", "user_id", name=op.f("pk_funding_positions")),
        schema="positions",
    )
    op.add_column("position_events", sa.Column("funding_time", TIME), schema="positions")
    op.alter_column("position_events", "seq", nullable=True, schema="positions")
    op.alter_column("position_events", "role", nullable=True, schema="positions")
    op.drop_constraint(op.f("ck_position_events_cause"), "position_events", schema="positions")
    op.create_check_constraint(
        op.f("ck_position_events_cause"),
        "position_events",
        "cause IN ('TRADE', 'LIQUIDATION', 'DELEVERAGE', 'FUNDING')",
        schema="positions",
    )
    op.create_check_constraint(
        op.f("ck_position_events_origin"),
        "position_events",
        "(seq IS NULL) = (funding_time IS NOT NULL)",
        schema="positions",
    )
    op.create_index(
        "uq_position_events_funding",
        "position_events",
        ["user_id", "funding_time", "instrument_id"],
        unique=True,
        schema="positions",
        postgresql_where=sa.text("funding_time IS NOT NULL"),
    )
    op.create_index(
        "ix_position_events_created_at", "position_events", ["created_at"], schema="positions", postgresql_using="brin"
    )

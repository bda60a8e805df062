"""index prices"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    op.create_table(
        "index_prices",
        sa.Column("instrument_id", sa.Text(), nullable=False),
        sa.Column("calculated_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("index_price", sa.Numeric(precision=38, scale=8), nullable=True),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("sources", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.PrimaryKeyConstraint("instrument_id", "calculated_at", name=op.f("pk_index_prices")),
        schema="market",
    )
    op.create_table(
        "index_states",
        sa.Column("instrument_id", sa.Text(), nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("checked_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("frozen_since", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("instrument_id", name=op.f("pk_index_states")),
        schema="market",
    )
    # There were simulated prices only until now.
    op.add_column(
        "funding_rates", sa.Column("source", sa.Text(), server_default="simulated", nullable=False), schema="market"
    )
    op.alter_column("funding_rates", "source", server_default=None, schema="market")

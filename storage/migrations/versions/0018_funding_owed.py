"""what of funding is owed: when it falls due, and how far it is collected"""

import sqlalchemy as sa
from alembic import op

revision = "0018"
down_revision = "0017"

TIME = sa.DateTime(timezone=True)


def upgrade() -> None:
    # Of a run that is under way, what is collected already counts as owed until its next page is booked.
    op.add_column(
        "funding_runs",
        sa.Column("collected_user_id", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        schema="ledger",
    )
    op.create_table(
        "funding_cursors",
        sa.Column("instrument_id", sa.Text(), nullable=False),
        sa.Column("collected_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("instrument_id", name=op.f("pk_funding_cursors")),
        schema="ledger",
    )
    op.create_table(
        "funding_schedules",
        sa.Column("instrument_id", sa.Text(), nullable=False),
        sa.Column("interval_seconds", sa.Integer(), nullable=False),
        sa.Column("rate_cap", sa.Numeric(20, 12), nullable=False),
        sa.PrimaryKeyConstraint("instrument_id", name=op.f("pk_funding_schedules")),
        schema="market",
    )
    # What was written since the last vacuum a BRIN index does not know; checks cannot read all of that.
    op.drop_index("ix_position_events_created_at", "position_events", schema="positions")
    op.create_index("ix_position_events_created_at", "position_events", ["created_at"], schema="positions")


def downgrade() -> None:
    op.drop_index("ix_position_events_created_at", "position_events", schema="positions")
    op.create_index(
        "ix_position_events_created_at", "position_events", ["created_at"], schema="positions", postgresql_using="brin"
    )
    op.drop_table("funding_schedules", schema="market")
    op.drop_table("funding_cursors", schema="ledger")
    op.drop_column("funding_runs", "collected_user_id", schema="ledger")

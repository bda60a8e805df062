"""market checkpoints, and totals of the events and trades that were deleted"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.create_table(
        "checkpoints",
        sa.Column("instrument_id", sa.Text(), nullable=False),
        sa.Column("seq", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("checksum", sa.LargeBinary(), nullable=False),
        sa.Column("payload", sa.LargeBinary(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("instrument_id", "seq", name=op.f("pk_checkpoints")),
        schema="market",
    )
    # As the engine's snapshots: read once in a restart, so compressing them would cost more than writing them.
    op.execute("ALTER TABLE market.checkpoints ALTER COLUMN payload SET STORAGE EXTERNAL")
    zero = sa.text("0")
    op.create_table(
        "pruned",
        sa.Column("instrument_id", sa.Text(), nullable=False),
        sa.Column("event_seq", sa.BigInteger(), server_default=zero, nullable=False),
        sa.Column("trades", sa.BigInteger(), server_default=zero, nullable=False),
        sa.Column("quantity", sa.Numeric(precision=38, scale=8), server_default=zero, nullable=False),
        sa.Column("fees", sa.Numeric(precision=38, scale=8), server_default=zero, nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.ForeignKeyConstraint(
            ["instrument_id"], ["matching.instruments.instrument_id"], name=op.f("fk_pruned_instrument_id")
        ),
        sa.PrimaryKeyConstraint("instrument_id", name=op.f("pk_pruned")),
        schema="matching",
    )

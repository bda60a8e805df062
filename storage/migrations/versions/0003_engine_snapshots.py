"""snapshots of the engine's books"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.create_table(
        "snapshots",
        sa.Column("instrument_id", sa.Text(), nullable=False),
        sa.Column("command_seq", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("event_seq", sa.BigInteger(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("checksum", sa.LargeBinary(), nullable=False),
        sa.Column("payload", sa.LargeBinary(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.ForeignKeyConstraint(
            ["instrument_id"], ["matching.instruments.instrument_id"], name=op.f("fk_snapshots_instrument_id")
        ),
        sa.PrimaryKeyConstraint("instrument_id", "command_seq", name=op.f("pk_snapshots")),
        schema="matching",
    )
    # Tens of megabytes for a deep book, read once in a restart: compressing them would cost more than writing them.
    op.execute("ALTER TABLE matching.snapshots ALTER COLUMN payload SET STORAGE EXTERNAL")

"""dead-man switch"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.create_table(
        "countdowns",
        sa.Column("user_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("cancel_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("user_id", name=op.f("pk_countdowns")),
        schema="orders",
    )
    op.create_index("ix_countdowns_cancel_at", "countdowns", ["cancel_at"], unique=False, schema="orders")

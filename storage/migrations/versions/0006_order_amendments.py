"""order amendments"""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    amount, zero = sa.Numeric(precision=38, scale=8), sa.text("0")
    now = sa.text("now()")
    op.create_table(
        "amendments",
        sa.Column("amendment_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("order_id", sa.BigInteger(), nullable=False),
        sa.Column("user_id", sa.BigInteger(), nullable=False),
        sa.Column("instrument_id", sa.Text(), nullable=False),
        sa.Column("side", sa.Text(), nullable=False),
        sa.Column("reduce_only", sa.Boolean(), nullable=False),
        sa.Column("price", amount, nullable=True),
        sa.Column("quantity", amount, nullable=True),
        sa.Column("open_quantity", amount, nullable=False),
        sa.Column("claimed_quantity", amount, server_default=zero, nullable=False),
        sa.Column("claimed_notional", amount, server_default=zero, nullable=False),
        sa.Column("open_loss", amount, server_default=zero, nullable=False),
        sa.Column("status", sa.Text(), server_default=sa.text("'PENDING'"), nullable=False),
        sa.Column("failure_reason", sa.Text(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=now, nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), server_default=now, nullable=False),
        sa.CheckConstraint("price IS NOT NULL OR quantity IS NOT NULL", name=op.f("ck_amendments_change")),
        sa.CheckConstraint(
            "status IN ('PENDING', 'ACCEPTED', 'AMENDED', 'REJECTED', 'FAILED')", name=op.f("ck_amendments_status")
        ),
        sa.ForeignKeyConstraint(["order_id"], ["orders.orders.order_id"], name=op.f("fk_amendments_order_id")),
        sa.PrimaryKeyConstraint("amendment_id", name=op.f("pk_amendments")),
        schema="orders",
        postgresql_with={"fillfactor": 50},
    )
    op.create_index(
        "uq_amendments_open",
        "amendments",
        ["order_id"],
        unique=True,
        schema="orders",
        postgresql_where=sa.text("status IN ('PENDING', 'ACCEPTED')"),
    )

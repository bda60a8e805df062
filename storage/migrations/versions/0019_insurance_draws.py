"""insurance draws: what the insurance fund paid for, and what justified it"""

import sqlalchemy as sa
from alembic import op

revision = "0019"
down_revision = "0018"

AMOUNT = sa.Numeric(precision=38, scale=8)
JUSTIFYING = ("quantity", "mark_price", "bankruptcy_price")


def upgrade() -> None:
    for name in JUSTIFYING:
        op.add_column(
            "insurance_claims",
            sa.Column(name, AMOUNT, server_default=sa.text("0"), nullable=False),
            schema="ledger",
        )
    op.create_table(
        "insurance_draws",
        sa.Column("reference_type", sa.Text(), nullable=False),
        sa.Column("reference_id", sa.Text(), nullable=False),
        sa.Column("user_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("instrument_id", sa.Text(), nullable=False),
        sa.Column("asset", sa.Text(), nullable=False),
        sa.Column("amount", AMOUNT, nullable=False),
        sa.Column("liquidation_id", sa.BigInteger(), nullable=True),
        sa.Column("round", sa.Integer(), nullable=True),
        sa.Column("mark_price", AMOUNT, nullable=True),
        sa.Column("bankruptcy_price", AMOUNT, nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.CheckConstraint("amount > 0", name=op.f("ck_insurance_draws_amount")),
        sa.PrimaryKeyConstraint("reference_type", "reference_id", "user_id", name=op.f("pk_insurance_draws")),
        schema="ledger",
    )


def downgrade() -> None:
    op.drop_table("insurance_draws", schema="ledger")
    for name in JUSTIFYING:
        op.drop_column("insurance_claims", name, schema="ledger")

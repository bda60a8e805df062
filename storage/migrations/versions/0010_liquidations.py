"""liquidations"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy import text

revision = "0010"
down_revision = "0009"

AMOUNT = sa.Numeric(precision=38, scale=8)
TIME = sa.DateTime(timezone=True)
LIQUIDATABLE = "status = 'OPEN' AND margin_mode = 'ISOLATED'"


def upgrade() -> None:
    op.add_column("positions", sa.Column("warning_price", AMOUNT, nullable=True), schema="positions")
    op.add_column(
        "positions", sa.Column("warned", sa.Boolean(), server_default=text("false"), nullable=False), schema="positions"
    )
    op.add_column("positions", sa.Column("told_price", AMOUNT, nullable=True), schema="positions")
    op.create_index(
        "ix_positions_long_liquidation",
        "positions",
        ["instrument_id", "liquidation_price"],
        schema="positions",
        postgresql_where=text(f"signed_quantity > 0 AND {LIQUIDATABLE}"),
    )
    op.create_index(
        "ix_positions_short_liquidation",
        "positions",
        ["instrument_id", "liquidation_price"],
        schema="positions",
        postgresql_where=text(f"signed_quantity < 0 AND {LIQUIDATABLE}"),
    )
    op.create_index(
        "ix_positions_long_warning",
        "positions",
        ["instrument_id", "warned", "warning_price"],
        schema="positions",
        postgresql_where=text(f"signed_quantity > 0 AND {LIQUIDATABLE}"),
    )
    op.create_index(
        "ix_positions_short_warning",
        "positions",
        ["instrument_id", "warned", "warning_price"],
        schema="positions",
        postgresql_where=text(f"signed_quantity < 0 AND {LIQUIDATABLE}"),
    )
    op.create_index(
        "ix_positions_cross",
        "positions",
        ["user_id"],
        schema="positions",
        postgresql_where=text("margin_mode = 'CROSS' AND signed_quantity <> 0"),
    )

    op.add_column(
        "liquidation_queue",
        sa.Column("margin_mode", sa.Text(), server_default=text("'ISOLATED'"), nullable=False),
        schema="risk",
    )
    op.add_column(
        "liquidation_queue",
        sa.Column("stopping", sa.Boolean(), server_default=text("false"), nullable=False),
        schema="risk",
    )
    op.add_column(
        "liquidation_queue",
        sa.Column("command_seq", sa.BigInteger(), server_default=text("0"), nullable=False),
        schema="risk",
    )
    op.create_index(
        "ix_liquidation_queue_open",
        "liquidation_queue",
        ["user_id"],
        schema="risk",
        postgresql_where=text("status IN ('PENDING', 'PROCESSING')"),
    )
    op.create_index(
        "ix_liquidation_queue_aborted",
        "liquidation_queue",
        ["position_id", "updated_at"],
        schema="risk",
        postgresql_where=text("status = 'ABORTED'"),
    )
    op.create_index("ix_risk_snapshots_created_at", "risk_snapshots", ["created_at"], schema="risk")

    op.create_table(
        "insurance_claims",
        sa.Column("liquidation_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("round", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("asset", sa.Text(), nullable=False),
        sa.Column("amount", AMOUNT, nullable=False),
        sa.Column("is_open", sa.Boolean(), server_default=text("true"), nullable=False),
        sa.Column("created_at", TIME, server_default=text("now()"), nullable=False),
        sa.Column("updated_at", TIME, server_default=text("now()"), nullable=False),
        sa.CheckConstraint("amount >= 0", name=op.f("ck_insurance_claims_amount")),
        sa.PrimaryKeyConstraint("liquidation_id", "round", name=op.f("pk_insurance_claims")),
        schema="ledger",
    )
    op.create_index(
        "ix_insurance_claims_open", "insurance_claims", ["asset"], schema="ledger", postgresql_where=text("is_open")
    )
    op.create_index(
        "ix_ledger_entries_insurance_fund",
        "ledger_entries",
        ["entry_id"],
        schema="ledger",
        postgresql_where=text("account = 'exchange:insurance_fund'"),
    )

    op.create_table(
        "deleveragings",
        sa.Column("trade_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("instrument_id", sa.Text(), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("price", AMOUNT, nullable=False),
        sa.Column("quantity", AMOUNT, nullable=False),
        sa.Column("side", sa.Text(), nullable=False),
        sa.Column("user_id", sa.BigInteger(), nullable=False),
        sa.Column("counterparty_user_id", sa.BigInteger(), nullable=False),
        sa.Column("executed_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("trade_id", name=op.f("pk_deleveragings")),
        schema="matching",
    )

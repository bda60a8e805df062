"""reporting read model"""

import sqlalchemy as sa
from alembic import op

revision = "0015"
down_revision = "0013"

AMOUNT = sa.Numeric(38, 8)
VOLUME = sa.Numeric(38, 16)
TIME = sa.DateTime(timezone=True)
SUMMED = {"postgresql_with": {"fillfactor": 70}}


def upgrade() -> None:
    zero = sa.text("0")
    op.create_table(
        "pnl_days",
        sa.Column("user_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("day", sa.Date(), nullable=False),
        sa.Column("instrument_id", sa.Text(), nullable=False),
        sa.Column("asset", sa.Text(), nullable=False),
        sa.Column("realized_pnl", AMOUNT, server_default=zero, nullable=False),
        sa.Column("fees", AMOUNT, server_default=zero, nullable=False),
        sa.Column("funding", AMOUNT, server_default=zero, nullable=False),
        sa.Column("liquidation", AMOUNT, server_default=zero, nullable=False),
        sa.Column("insurance", AMOUNT, server_default=zero, nullable=False),
        sa.PrimaryKeyConstraint("user_id", "day", "instrument_id", "asset", name=op.f("pk_pnl_days")),
        schema="reporting",
        **SUMMED,
    )
    op.create_index("ix_pnl_days_day", "pnl_days", ["day", "instrument_id"], schema="reporting")
    op.create_table(
        "trade_days",
        sa.Column("user_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("day", sa.Date(), nullable=False),
        sa.Column("instrument_id", sa.Text(), nullable=False),
        sa.Column("maker_volume", VOLUME, server_default=zero, nullable=False),
        sa.Column("taker_volume", VOLUME, server_default=zero, nullable=False),
        sa.Column("maker_fees", AMOUNT, server_default=zero, nullable=False),
        sa.Column("taker_fees", AMOUNT, server_default=zero, nullable=False),
        sa.Column("maker_trades", sa.BigInteger(), server_default=zero, nullable=False),
        sa.Column("taker_trades", sa.BigInteger(), server_default=zero, nullable=False),
        sa.Column("net_quantity", AMOUNT, server_default=zero, nullable=False),
        sa.PrimaryKeyConstraint("user_id", "day", "instrument_id", name=op.f("pk_trade_days")),
        schema="reporting",
        **SUMMED,
    )
    op.create_index("ix_trade_days_day", "trade_days", ["day", "instrument_id"], schema="reporting")
    op.create_table(
        "open_interest_days",
        sa.Column("instrument_id", sa.Text(), nullable=False),
        sa.Column("day", sa.Date(), nullable=False),
        sa.Column("change", AMOUNT, server_default=zero, nullable=False),
        sa.PrimaryKeyConstraint("instrument_id", "day", name=op.f("pk_open_interest_days")),
        schema="reporting",
        **SUMMED,
    )
    op.create_table(
        "liquidations",
        sa.Column("liquidation_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("user_id", sa.BigInteger(), nullable=False),
        sa.Column("instrument_id", sa.Text(), nullable=False),
        sa.Column("position_id", sa.BigInteger(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("triggered_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("liquidation_id", name=op.f("pk_liquidations")),
        schema="reporting",
    )
    op.create_index("ix_liquidations_user_id", "liquidations", ["user_id", "liquidation_id"], schema="reporting")
    op.create_table(
        "builds",
        sa.Column("is_current", sa.Boolean(), server_default=sa.text("true"), nullable=False),
        sa.Column("generation", sa.BigInteger(), nullable=False),
        sa.Column("watermark", sa.BigInteger(), nullable=False),
        sa.Column("built_at", TIME, nullable=False),
        sa.CheckConstraint("is_current", name=op.f("ck_builds_is_current")),
        sa.PrimaryKeyConstraint("is_current", name=op.f("pk_builds")),
        schema="reporting",
    )
    op.create_table(
        "stream_positions",
        sa.Column("topic", sa.Text(), nullable=False),
        sa.Column("entry_id", sa.Text(), nullable=False),
        sa.Column("entries", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("topic", name=op.f("pk_stream_positions")),
        schema="reporting",
    )
    op.create_table(
        "applied_events",
        sa.Column("message_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("line", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("applied_at", TIME, server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("message_id", "line", name=op.f("pk_applied_events")),
        schema="reporting",
    )

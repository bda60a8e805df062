"""Limits, what users' positions and orders come to, and liquidations."""

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Identity,
    Index,
    Integer,
    Numeric,
    SmallInteger,
    Table,
    Text,
    text,
)

from storage.tables.common import AMOUNT, col, created, cursors, metadata, steps, updated

leverage_tiers = Table(
    "leverage_tiers",
    metadata,
    Column("instrument_id", Text, primary_key=True),
    Column("tier", SmallInteger, primary_key=True, autoincrement=False),
    col("notional_from", AMOUNT),
    col("max_leverage", Integer()),
    col("maintenance_margin_rate", Numeric(12, 8)),
    col("cumulative", AMOUNT),
    schema="risk",
)

risk_limits = Table(
    "risk_limits",
    metadata,
    Column("limit_id", BigInteger, Identity(), primary_key=True),
    col("user_id", BigInteger(), null=True),
    col("instrument_id", Text()),
    col("max_order_quantity", AMOUNT),
    col("max_position_notional", AMOUNT),
    col("max_leverage", Integer()),
    col("max_open_orders", Integer()),
    col("price_band", Numeric(12, 8)),
    updated(),
    # user_id NULL is the instrument's default row.
    Index("uq_risk_limits_scope", "instrument_id", "user_id", unique=True, postgresql_nulls_not_distinct=True),
    schema="risk",
)

exposures = Table(
    "exposures",
    metadata,
    Column("user_id", BigInteger, primary_key=True, autoincrement=False),
    Column("instrument_id", Text, primary_key=True),
    col("leverage", Integer()),
    col("margin_mode", Text(), default="'ISOLATED'"),
    col("signed_quantity", AMOUNT, default="0"),
    col("entry_notional", AMOUNT, default="0"),
    col("bid_quantity", AMOUNT, default="0"),
    col("bid_notional", AMOUNT, default="0"),
    col("ask_quantity", AMOUNT, default="0"),
    col("ask_notional", AMOUNT, default="0"),
    col("bid_loss", AMOUNT, default="0"),
    col("ask_loss", AMOUNT, default="0"),
    col("open_orders", Integer(), default="0"),
    col("order_margin", AMOUNT, default="0"),
    # The terms that the engine was told last (leverage, maintenance margin rate in millionths, mode): NULL, none.
    col("told_leverage", Integer(), null=True),
    col("told_maintenance", Integer(), null=True),
    col("told_mode", Text(), null=True),
    # What covers a cross position beyond its own margin, as the engine was told last (quote): NULL, never.
    col("told_cover", AMOUNT, null=True),
    # The last check whose margin the ledger may not hold yet: the next batch waits for it.
    col("pending_step", Text(), null=True),
    updated(),
    CheckConstraint(
        "bid_quantity >= 0 AND bid_notional >= 0 AND ask_quantity >= 0 AND ask_notional >= 0 AND open_orders >= 0"
        " AND order_margin >= 0 AND bid_loss >= 0 AND ask_loss >= 0",
        name="positive",
    ),
    Index("ix_exposures_told_cover", "user_id", postgresql_where=text("told_cover IS NOT NULL")),
    schema="risk",
    postgresql_with={"fillfactor": 70},
)

risk_snapshots = Table(
    "risk_snapshots",
    metadata,
    Column("snapshot_id", BigInteger, Identity(), primary_key=True),
    col("user_id", BigInteger()),
    col("instrument_id", Text()),
    col("mark_price", AMOUNT),
    col("margin", AMOUNT),
    col("unrealized_pnl", AMOUNT),
    col("maintenance_margin", AMOUNT),
    col("margin_ratio", Numeric(20, 8), null=True),
    col("liquidation_price", AMOUNT, null=True),
    col("status", Text()),
    created(),
    Index("ix_risk_snapshots_user", "user_id", "instrument_id", "created_at"),
    Index("ix_risk_snapshots_created_at", "created_at"),
    schema="risk",
)

liquidation_queue = Table(
    "liquidation_queue",
    metadata,
    Column("liquidation_id", BigInteger, Identity(), primary_key=True),
    col("position_id", BigInteger()),
    col("user_id", BigInteger()),
    col("instrument_id", Text()),
    col("reason", Text()),
    col("margin_mode", Text(), default="'ISOLATED'"),
    col("status", Text(), default="'PENDING'"),
    # An operator aborts it: nothing more is submitted. The seq of the last command that was.
    col("stopping", Boolean(), default="false"),
    col("command_seq", BigInteger(), default="0"),
    created(),
    updated(),
    CheckConstraint("status IN ('PENDING', 'PROCESSING', 'PROCESSED', 'ABORTED')", name="status"),
    Index("ix_liquidation_queue_open", "user_id", postgresql_where=text("status IN ('PENDING', 'PROCESSING')")),
    Index("ix_liquidation_queue_aborted", "position_id", "updated_at", postgresql_where=text("status = 'ABORTED'")),
    Index(
        "uq_liquidation_queue_open",
        "position_id",
        unique=True,
        postgresql_where=text("status IN ('PENDING', 'PROCESSING')"),
    ),
    schema="risk",
)

risk_cursors = cursors("risk")
risk_steps = steps("risk")

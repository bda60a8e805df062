"""Positions and what happened to them."""

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Identity,
    Index,
    Integer,
    Table,
    Text,
    UniqueConstraint,
    text,
)

from storage.tables.common import AMOUNT, TIME, col, created, metadata, updated

positions = Table(
    "positions",
    metadata,
    Column("position_id", BigInteger, Identity(), primary_key=True),
    col("user_id", BigInteger()),
    col("instrument_id", Text()),
    # Positive is LONG, negative SHORT. entry_notional is the exact sum of what was paid for it, never negative.
    col("signed_quantity", AMOUNT, default="0"),
    col("entry_notional", AMOUNT, default="0"),
    col("margin", AMOUNT, default="0"),
    col("margin_version", BigInteger(), default="0"),
    col("realized_pnl", AMOUNT, default="0"),
    col("leverage", Integer()),
    col("margin_mode", Text(), default="'ISOLATED'"),
    col("liquidation_price", AMOUNT, null=True),
    # The mark price at which its user is warned, and whether that has been done.
    col("warning_price", AMOUNT, null=True),
    col("warned", Boolean(), default="false"),
    # The mark price of the last PositionUpdated.
    col("told_price", AMOUNT, null=True),
    col("status", Text(), default="'OPEN'"),
    created(),
    updated(),
    CheckConstraint("status IN ('OPEN', 'LIQUIDATION_PENDING', 'CLOSED')", name="status"),
    CheckConstraint("margin >= 0 AND entry_notional >= 0", name="positive"),
    UniqueConstraint("user_id", "instrument_id"),
    Index("ix_positions_instrument_id", "instrument_id", "user_id"),
    # A mark price finds those it crosses, and looks at no others.
    *(
        Index(
            f"ix_positions_{side}_{price}",
            *columns,
            postgresql_where=text(f"signed_quantity {sign} 0 AND status = 'OPEN' AND margin_mode = 'ISOLATED'"),
        )
        for side, sign in (("long", ">"), ("short", "<"))
        for price, columns in (
            ("liquidation", ("instrument_id", "liquidation_price")),
            ("warning", ("instrument_id", "warned", "warning_price")),
        )
    ),
    Index("ix_positions_cross", "user_id", postgresql_where=text("margin_mode = 'CROSS' AND signed_quantity <> 0")),
    schema="positions",
    postgresql_with={"fillfactor": 70},
)

position_events = Table(
    "position_events",
    metadata,
    Column("event_id", BigInteger, Identity(), primary_key=True),
    col("user_id", BigInteger()),
    col("instrument_id", Text()),
    # Of a fill: the engine's event and the side of it. NULL of a funding payment, which has the time it was due, and of
    # a mark price by which the user was told of the position (cause MARK, kept for some days).
    col("seq", BigInteger(), null=True),
    col("role", Text(), null=True),
    col("funding_time", TIME, null=True),
    col("type", Text()),
    col("status", Text()),
    col("trade_id", BigInteger(), null=True),
    col("order_id", BigInteger(), null=True),
    col("side", Text()),
    col("price", AMOUNT),
    col("quantity", AMOUNT),
    col("fee", AMOUNT, default="0"),
    col("realized_pnl", AMOUNT, default="0"),
    col("signed_quantity_after", AMOUNT),
    col("entry_notional_after", AMOUNT),
    # At which new parts of the position are backed (and by how much more per base, for what they lose at once), and
    # whether the fill was of the user's own will.
    col("leverage", Integer()),
    col("open_loss", AMOUNT, default="0"),
    col("cause", Text(), default="'TRADE'"),
    created(),
    CheckConstraint("cause IN ('TRADE', 'LIQUIDATION', 'DELEVERAGE', 'FUNDING', 'MARK')", name="cause"),
    CheckConstraint("num_nonnulls(seq, funding_time) = CASE cause WHEN 'MARK' THEN 0 ELSE 1 END", name="origin"),
    Index("uq_position_events_seq", "instrument_id", "seq", "role", unique=True),
    Index(
        "uq_position_events_funding",
        "user_id",
        "funding_time",
        "instrument_id",
        unique=True,
        postgresql_where=text("funding_time IS NOT NULL"),
    ),
    Index("ix_position_events_user_id", "user_id", "event_id"),
    # For the fills after a funding time, which checks of orders ask for while it is not collected. Rows are written in
    # about this order, so an insertion costs next to nothing.
    Index("ix_position_events_created_at", "created_at"),
    Index("ix_position_events_told", "created_at", postgresql_where=text("cause = 'MARK'")),
    schema="positions",
)

# What everybody held at a funding time and gets (> 0) or pays for it in quote, until a while after it is settled.
funding_positions = Table(
    "funding_positions",
    metadata,
    Column("instrument_id", Text, primary_key=True),
    Column("funding_time", TIME, primary_key=True),
    Column("user_id", BigInteger, primary_key=True, autoincrement=False),
    col("signed_quantity", AMOUNT),
    col("payment", AMOUNT),
    schema="positions",
)

# `confirmed_seq` follows `applied_seq` once the ledger has settled the same events.
positions_cursors = Table(
    "cursors",
    metadata,
    Column("instrument_id", Text, primary_key=True),
    col("applied_seq", BigInteger(), default="0"),
    col("confirmed_seq", BigInteger(), default="0"),
    schema="positions",
)

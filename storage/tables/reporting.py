"""The read model of `reporting/`: sums by UTC day, each of which can be added to in any order.

Nothing else in the exchange depends on it, and all of it can be made anew from the other services' tables.
"""

from sqlalchemy import BigInteger, Boolean, CheckConstraint, Column, Date, Index, Integer, Numeric, Table, Text, text

from storage.tables.common import AMOUNT, TIME, col, metadata

pnl_days = Table(
    "pnl_days",
    metadata,
    Column("user_id", BigInteger, primary_key=True, autoincrement=False),
    Column("day", Date, primary_key=True),
    Column("instrument_id", Text, primary_key=True),
    Column("asset", Text, primary_key=True),
    # What the ledger booked on this day, signed as the user's money moved.
    col("realized_pnl", AMOUNT, default="0"),
    col("fees", AMOUNT, default="0"),
    col("funding", AMOUNT, default="0"),
    # Fees and surplus of liquidations, and what the insurance fund paid for the user.
    col("liquidation", AMOUNT, default="0"),
    col("insurance", AMOUNT, default="0"),
    Index("ix_pnl_days_day", "day", "instrument_id"),
    schema="reporting",
    postgresql_with={"fillfactor": 70},
)

trade_days = Table(
    "trade_days",
    metadata,
    Column("user_id", BigInteger, primary_key=True, autoincrement=False),
    Column("day", Date, primary_key=True),
    Column("instrument_id", Text, primary_key=True),
    # Quote; price times quantity has as many decimals as both together.
    col("maker_volume", Numeric(38, 16), default="0"),
    col("taker_volume", Numeric(38, 16), default="0"),
    col("maker_fees", AMOUNT, default="0"),
    col("taker_fees", AMOUNT, default="0"),
    col("maker_trades", BigInteger(), default="0"),
    col("taker_trades", BigInteger(), default="0"),
    # Bought less sold, with what auto-deleveraging did: all days together are the position.
    col("net_quantity", AMOUNT, default="0"),
    Index("ix_trade_days_day", "day", "instrument_id"),
    schema="reporting",
    postgresql_with={"fillfactor": 70},
)

# By how much the sum of all long positions changed on a day; it follows from the rows of those who traded.
open_interest_days = Table(
    "open_interest_days",
    metadata,
    Column("instrument_id", Text, primary_key=True),
    Column("day", Date, primary_key=True),
    col("change", AMOUNT, default="0"),
    schema="reporting",
    postgresql_with={"fillfactor": 70},
)

reported_liquidations = Table(
    "liquidations",
    metadata,
    Column("liquidation_id", BigInteger, primary_key=True, autoincrement=False),
    col("user_id", BigInteger()),
    col("instrument_id", Text()),
    col("position_id", BigInteger()),
    col("reason", Text()),
    col("triggered_at", TIME),
    Index("ix_liquidations_user_id", "user_id", "liquidation_id"),
    schema="reporting",
)

# One row: which making of the read model this is, and the last outbox message that it was made with.
reporting_builds = Table(
    "builds",
    metadata,
    Column("is_current", Boolean, primary_key=True, server_default=text("true")),
    col("generation", BigInteger()),
    col("watermark", BigInteger()),
    col("built_at", TIME),
    CheckConstraint("is_current", name="is_current"),
    schema="reporting",
)

# Up to where each stream is counted, and how many entries it had until there: from that a gap is known.
reporting_positions = Table(
    "stream_positions",
    metadata,
    Column("topic", Text, primary_key=True),
    col("entry_id", Text()),
    col("entries", BigInteger()),
    schema="reporting",
)

# Events that were counted: the relay may send one again, under the same id.
applied_events = Table(
    "applied_events",
    metadata,
    Column("message_id", BigInteger, primary_key=True, autoincrement=False),
    Column("line", Integer, primary_key=True, autoincrement=False),
    col("applied_at", TIME, default="now()"),
    schema="reporting",
)

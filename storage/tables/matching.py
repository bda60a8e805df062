"""Instruments, the engine's log of commands and events, and its cursors, snapshots and trades."""

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    Numeric,
    SmallInteger,
    Table,
    Text,
    UniqueConstraint,
)
from sqlalchemy.dialects.postgresql import JSON

from storage.tables.common import AMOUNT, TIME, col, created, metadata, updated

instruments = Table(
    "instruments",
    metadata,
    Column("instrument_id", Text, primary_key=True),
    col("number", SmallInteger()),
    col("base_asset", Text()),
    col("quote_asset", Text()),
    col("tick_size", AMOUNT),
    col("lot_size", AMOUNT),
    col("min_notional", AMOUNT),
    col("maker_fee_rate", Numeric(12, 8)),
    col("taker_fee_rate", Numeric(12, 8)),
    col("max_leverage", Integer()),
    col("default_leverage", Integer()),
    col("state", Text(), default="'TRADING'"),
    updated(),
    UniqueConstraint("number"),
    CheckConstraint("state IN ('TRADING', 'CANCEL_ONLY', 'HALTED')", name="state"),
    schema="matching",
)

# The row lock on `last_seq` is what makes the command log gapless.
sequencers = Table(
    "sequencers",
    metadata,
    Column("instrument_id", Text, ForeignKey(instruments.c.instrument_id), primary_key=True),
    col("last_seq", BigInteger(), default="0"),
    schema="matching",
    postgresql_with={"fillfactor": 50},
)

commands = Table(
    "commands",
    metadata,
    Column("instrument_id", Text, primary_key=True),
    Column("seq", BigInteger, primary_key=True, autoincrement=False),
    col("payload", JSON()),
    schema="matching",
)

matching_events = Table(
    "events",
    metadata,
    Column("instrument_id", Text, primary_key=True),
    Column("seq", BigInteger, primary_key=True, autoincrement=False),
    col("command_seq", BigInteger()),
    col("payload", JSON()),
    schema="matching",
)

# What the engine has done (command_seq in, event_seq out) and who may do it: `epoch` fences a former owner.
engine_cursors = Table(
    "cursors",
    metadata,
    Column("instrument_id", Text, ForeignKey(instruments.c.instrument_id), primary_key=True),
    col("command_seq", BigInteger(), default="0"),
    col("event_seq", BigInteger(), default="0"),
    col("owner", Text(), null=True),
    col("epoch", BigInteger(), default="0"),
    col("lease_until", TIME, null=True),
    schema="matching",
    postgresql_with={"fillfactor": 50},
)

# The engine's book after `command_seq`, from which a restart goes on.
engine_snapshots = Table(
    "snapshots",
    metadata,
    Column("instrument_id", Text, ForeignKey(instruments.c.instrument_id), primary_key=True),
    Column("command_seq", BigInteger, primary_key=True, autoincrement=False),
    col("event_seq", BigInteger()),
    col("version", Integer()),
    col("checksum", LargeBinary()),
    col("payload", LargeBinary()),
    created(),
    schema="matching",
)

# Up to which event each consumer of the log has got.
consumers = Table(
    "consumers",
    metadata,
    Column("instrument_id", Text, primary_key=True),
    Column("consumer", Text, primary_key=True),
    col("acked_seq", BigInteger(), default="0"),
    updated(),
    schema="matching",
    postgresql_with={"fillfactor": 50},
)

trade_tickers = Table(
    "trade_tickers",
    metadata,
    Column("trade_id", BigInteger, primary_key=True, autoincrement=False),
    col("instrument_id", Text()),
    col("seq", BigInteger()),
    col("price", AMOUNT),
    col("quantity", AMOUNT),
    col("taker_side", Text()),
    col("buy_order_id", BigInteger()),
    col("sell_order_id", BigInteger()),
    col("buyer_user_id", BigInteger()),
    col("seller_user_id", BigInteger()),
    col("maker_fee", AMOUNT),
    col("taker_fee", AMOUNT),
    col("executed_at", TIME),
    Index("ix_trade_tickers_instrument_id", "instrument_id", "seq"),
    schema="matching",
)

# What auto-deleveraging did; few, and kept for good. `side` is that of the bankrupt user's closing order.
deleveragings = Table(
    "deleveragings",
    metadata,
    Column("trade_id", BigInteger, primary_key=True, autoincrement=False),
    col("instrument_id", Text()),
    col("seq", BigInteger()),
    col("price", AMOUNT),
    col("quantity", AMOUNT),
    col("side", Text()),
    col("user_id", BigInteger()),
    col("counterparty_user_id", BigInteger()),
    col("executed_at", TIME),
    schema="matching",
)

# What was deleted of `events` and `trade_tickers`: everything up to `event_seq`, with the totals of those trades.
pruned = Table(
    "pruned",
    metadata,
    Column("instrument_id", Text, ForeignKey(instruments.c.instrument_id), primary_key=True),
    col("event_seq", BigInteger(), default="0"),
    col("trades", BigInteger(), default="0"),
    col("quantity", AMOUNT, default="0"),
    col("fees", AMOUNT, default="0"),
    updated(),
    schema="matching",
)

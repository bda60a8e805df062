"""Prices, klines, funding rates, and the market process's checkpoints."""

from sqlalchemy import BigInteger, Boolean, Column, Identity, Index, Integer, LargeBinary, Numeric, Table, Text
from sqlalchemy.dialects.postgresql import JSONB

from storage.tables.common import AMOUNT, TIME, col, created, metadata

# What the market process knew of an instrument after event `seq`, from which a restart goes on.
checkpoints = Table(
    "checkpoints",
    metadata,
    Column("instrument_id", Text, primary_key=True),
    Column("seq", BigInteger, primary_key=True, autoincrement=False),
    col("version", Integer()),
    col("checksum", LargeBinary()),
    col("payload", LargeBinary()),
    created(),
    schema="market",
)

mark_prices = Table(
    "mark_prices",
    metadata,
    Column("instrument_id", Text, primary_key=True),
    Column("calculated_at", TIME, primary_key=True),
    col("index_price", AMOUNT),
    col("mark_price", AMOUNT),
    col("fair_price", AMOUNT),
    col("premium_index", Numeric(20, 12)),
    col("funding_basis", Numeric(20, 12)),
    col("source", Text()),
    schema="market",
)

# `sources`: {"used": [{name, price, clamped, weight}], "dropped": {name: reason}}; no price when none was fresh.
index_prices = Table(
    "index_prices",
    metadata,
    Column("instrument_id", Text, primary_key=True),
    Column("calculated_at", TIME, primary_key=True),
    col("index_price", AMOUNT, null=True),
    col("source", Text()),
    col("sources", JSONB()),
    schema="market",
)

# Rewritten each round: `checked_at` that has grown old means that nobody calculates marks.
index_states = Table(
    "index_states",
    metadata,
    Column("instrument_id", Text, primary_key=True),
    col("source", Text()),
    col("checked_at", TIME),
    col("frozen_since", TIME, null=True),
    schema="market",
)

kline_buckets = Table(
    "kline_buckets",
    metadata,
    Column("instrument_id", Text, primary_key=True),
    Column("period", Text, primary_key=True),
    Column("open_time", TIME, primary_key=True),
    col("open", AMOUNT),
    col("high", AMOUNT),
    col("low", AMOUNT),
    col("close", AMOUNT),
    col("volume", AMOUNT),
    col("trade_count", BigInteger()),
    col("last_seq", BigInteger()),
    col("closed", Boolean(), default="false"),
    schema="market",
    postgresql_with={"fillfactor": 70},
)

market_snapshots = Table(
    "market_snapshots",
    metadata,
    Column("snapshot_id", BigInteger, Identity(), primary_key=True),
    col("instrument_id", Text()),
    col("seq", BigInteger()),
    col("bid_depth", JSONB()),
    col("ask_depth", JSONB()),
    col("last_price", AMOUNT, null=True),
    col("volume_24h", AMOUNT),
    created(),
    Index("ix_market_snapshots_instrument_id", "instrument_id", "created_at"),
    schema="market",
)

funding_rates = Table(
    "funding_rates",
    metadata,
    Column("instrument_id", Text, primary_key=True),
    Column("effective_at", TIME, primary_key=True),
    col("rate", Numeric(20, 12)),
    col("premium_average", Numeric(20, 12)),
    col("mark_price", AMOUNT),
    # Premium samples in the average; with none, the rate is that of a premium of zero.
    col("samples", Integer()),
    col("source", Text()),
    created(),
    schema="market",
)

# When funding falls due (the multiples of the interval since 1970), and the highest rate that it may come to.
funding_schedules = Table(
    "funding_schedules",
    metadata,
    Column("instrument_id", Text, primary_key=True),
    col("interval_seconds", Integer()),
    col("rate_cap", Numeric(20, 12)),
    schema="market",
)

"""Money: balances, holds, journals and their entries, the insurance fund's claims and draws, funding."""

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Identity,
    Index,
    Integer,
    Numeric,
    Table,
    Text,
    text,
)

from storage.tables.common import AMOUNT, TIME, col, created, cursors, metadata, steps, updated

ledger_balances = Table(
    "ledger_balances",
    metadata,
    Column("user_id", BigInteger, primary_key=True, autoincrement=False),
    Column("asset", Text, primary_key=True),
    col("available", AMOUNT, default="0"),
    col("reserved", AMOUNT, default="0"),
    updated(),
    CheckConstraint("available >= 0", name="available"),
    CheckConstraint("reserved >= 0", name="reserved"),
    schema="ledger",
    postgresql_with={"fillfactor": 70},
)

system_balances = Table(
    "system_balances",
    metadata,
    Column("account", Text, primary_key=True),
    Column("asset", Text, primary_key=True),
    col("balance", AMOUNT, default="0"),
    updated(),
    schema="ledger",
    postgresql_with={"fillfactor": 50},
)

# What of a user's `reserved` is held for which instrument, and as which kind of margin.
margin_holds = Table(
    "margin_holds",
    metadata,
    Column("user_id", BigInteger, primary_key=True, autoincrement=False),
    Column("instrument_id", Text, primary_key=True),
    col("asset", Text()),
    col("order_margin", AMOUNT, default="0"),
    col("position_margin", AMOUNT, default="0"),
    # Required order margin that is not held: > 0 when a loss left it uncovered (those orders are being cancelled),
    # < 0 when it was freed before its freeze came.
    col("order_short", AMOUNT, default="0"),
    # Counts the changes of position_margin; the copy in positions.positions says which one it is of.
    col("margin_version", BigInteger(), default="0"),
    CheckConstraint("order_margin >= 0 AND position_margin >= 0", name="positive"),
    Index("ix_margin_holds_uncovered", "instrument_id", "user_id", postgresql_where=text("order_short > 0")),
    schema="ledger",
    postgresql_with={"fillfactor": 70},
)

journals = Table(
    "journals",
    metadata,
    Column("reference_type", Text, primary_key=True),
    Column("reference_id", Text, primary_key=True),
    created(),
    schema="ledger",
)

# One row carries a user's two postings (available and reserved); a system account has only the first.
ledger_entries = Table(
    "ledger_entries",
    metadata,
    Column("entry_id", BigInteger, Identity(), primary_key=True),
    col("reference_type", Text()),
    col("reference_id", Text()),
    col("entry_type", Text()),
    col("account", Text()),
    col("user_id", BigInteger(), null=True),
    col("asset", Text()),
    col("instrument_id", Text(), null=True),
    col("delta_available", AMOUNT),
    col("delta_reserved", AMOUNT, default="0"),
    # Available of a user after this row; a system account's rows carry no running balance.
    col("balance_after", AMOUNT, null=True),
    created(),
    Index("ix_ledger_entries_user_id", "user_id", "entry_id", postgresql_where=text("user_id IS NOT NULL")),
    Index(
        "ix_ledger_entries_insurance_fund",
        "entry_id",
        postgresql_where=text("account = 'exchange:insurance_fund'"),
    ),
    schema="ledger",
)

# What liquidations under way may take from the insurance fund; the fund can promise what it has once only.
insurance_claims = Table(
    "insurance_claims",
    metadata,
    Column("liquidation_id", BigInteger, primary_key=True, autoincrement=False),
    Column("round", Integer, primary_key=True, autoincrement=False),
    col("asset", Text()),
    col("amount", AMOUNT),
    # What justifies it: how much is closed (signed, base), the mark, and the price at which there is nothing left.
    col("quantity", AMOUNT, default="0"),
    col("mark_price", AMOUNT, default="0"),
    col("bankruptcy_price", AMOUNT, default="0"),
    col("is_open", Boolean(), default="true"),
    created(),
    updated(),
    CheckConstraint("amount >= 0", name="amount"),
    Index("ix_insurance_claims_open", "asset", postgresql_where=text("is_open")),
    schema="ledger",
)

# What users lacked and the fund paid (or `exchange:shortfall`, when it could not), and what it was for: SETTLEMENT or
# FUNDING_FEE. `reference_id` is also that of the journal, which is of type INSURANCE_FUND.
insurance_draws = Table(
    "insurance_draws",
    metadata,
    Column("reference_type", Text, primary_key=True),
    Column("reference_id", Text, primary_key=True),
    Column("user_id", BigInteger, primary_key=True, autoincrement=False),
    col("instrument_id", Text()),
    col("asset", Text()),
    col("amount", AMOUNT),
    Column("liquidation_id", BigInteger, nullable=True),
    Column("round", Integer, nullable=True),
    Column("mark_price", AMOUNT, nullable=True),
    Column("bankruptcy_price", AMOUNT, nullable=True),
    created(),
    CheckConstraint("amount > 0", name="amount"),
    schema="ledger",
)

# One row per funding settlement: the rate and price it goes by, fixed once, and what it came to.
funding_runs = Table(
    "funding_runs",
    metadata,
    Column("instrument_id", Text, primary_key=True),
    Column("funding_time", TIME, primary_key=True),
    col("asset", Text()),
    col("rate", Numeric(20, 12)),
    col("mark_price", AMOUNT),
    col("status", Text(), default="'OPEN'"),
    col("positions", BigInteger(), default="0"),
    # Quote: by users and the insurance fund, to users, by the fund alone.
    col("paid", AMOUNT, default="0"),
    col("received", AMOUNT, default="0"),
    col("insurance", AMOUNT, default="0"),
    # Of users up to this one, what is due has been booked.
    col("collected_user_id", BigInteger(), default="0"),
    created(),
    updated(),
    CheckConstraint("status IN ('OPEN', 'DONE')", name="status"),
    schema="ledger",
)

# Up to which funding time every published rate has been settled; what is owed is looked for after it.
funding_cursors = Table(
    "funding_cursors",
    metadata,
    Column("instrument_id", Text, primary_key=True),
    col("collected_at", TIME),
    schema="ledger",
)

ledger_cursors = cursors("ledger")
ledger_steps = steps("ledger")

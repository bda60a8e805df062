"""Every table, one Postgres schema per service. Alembic derives its migrations from here.

A service reads and writes its own schema only; what others may read is published as a view `v_…`
(see `storage/views.py`). Tables whose rows are updated leave room in their pages, so that an update stays there.
"""

from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Date,
    DateTime,
    ForeignKey,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Numeric,
    Sequence,
    SmallInteger,
    Table,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, INET, JSON, JSONB, UUID
from sqlalchemy.sql.type_api import TypeEngine

SCHEMAS = (
    "users",
    "auth",
    "orders",
    "risk",
    "ledger",
    "positions",
    "matching",
    "market",
    "outbox",
    "reporting",
)

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
    }
)

AMOUNT = Numeric(38, 8)
TIME = DateTime(timezone=True)


def _col(name: str, kind: TypeEngine[Any], *, null: bool = False, default: str | None = None) -> Column[Any]:
    return Column(name, kind, nullable=null, server_default=text(default) if default is not None else None)


def _created() -> Column[Any]:
    return _col("created_at", TIME, default="now()")


def _updated() -> Column[Any]:
    return _col("updated_at", TIME, default="now()")


# --- users -----------------------------------------------------------------------------------------------------
user_id_seq = Sequence("user_id_seq", start=1000, schema="users", metadata=metadata)

users = Table(
    "users",
    metadata,
    Column("user_id", BigInteger, primary_key=True, server_default=user_id_seq.next_value()),
    _col("email", Text()),
    _col("status", Text(), default="'PREPARE'"),
    _col("roles", ARRAY(Text), default="'{user}'"),
    _created(),
    _updated(),
    CheckConstraint("status IN ('PREPARE', 'ACTIVE', 'FAILED')", name="status"),
    Index("uq_users_email", text("lower(email)"), unique=True),
    schema="users",
)

user_registration_prepare = Table(
    "user_registration_prepare",
    metadata,
    Column("user_id", BigInteger, ForeignKey(users.c.user_id), primary_key=True),
    _col("status", Text(), default="'PREPARE'"),
    # Cleared once the credential exists: the only copy then lives in auth.auth_credentials.
    _col("secret_hash", Text(), null=True),
    _col("attempts", Integer(), default="0"),
    _col("last_error", Text(), null=True),
    _created(),
    _updated(),
    CheckConstraint("status IN ('PREPARE', 'COMPLETED', 'FAILED')", name="status"),
    Index("ix_user_registration_prepare_open", "created_at", postgresql_where=text("status = 'PREPARE'")),
    schema="users",
)

# --- auth ------------------------------------------------------------------------------------------------------
auth_credentials = Table(
    "auth_credentials",
    metadata,
    Column("user_id", BigInteger, primary_key=True, autoincrement=False),
    Column("type", Text, primary_key=True),
    _col("email", Text(), null=True),
    _col("secret_hash", Text()),
    _col("roles", ARRAY(Text), default="'{user}'"),
    _col("status", Text(), default="'ACTIVE'"),
    _col("expires_at", TIME, null=True),
    # After too many failures, until then: unlike status LOCKED, which an operator sets and takes back.
    _col("locked_until", TIME, null=True),
    _created(),
    _updated(),
    CheckConstraint("status IN ('ACTIVE', 'LOCKED', 'EXPIRED')", name="status"),
    Index(
        "uq_auth_credentials_email",
        text("lower(email)"),
        unique=True,
        postgresql_where=text("type = 'PASSWORD'"),
    ),
    schema="auth",
)

login_audits = Table(
    "login_audits",
    metadata,
    Column("audit_id", BigInteger, Identity(), primary_key=True),
    _col("user_id", BigInteger(), null=True),
    _col("email", Text()),
    _col("outcome", Text()),
    _col("reason", Text(), null=True),
    _col("ip", INET(), null=True),
    _col("device", Text(), null=True),
    _created(),
    CheckConstraint("outcome IN ('SUCCESS', 'FAILED')", name="outcome"),
    Index("ix_login_audits_user_id", "user_id", "created_at"),
    schema="auth",
)

auth_sessions = Table(
    "auth_sessions",
    metadata,
    Column("session_id", UUID(as_uuid=False), primary_key=True),
    _col("user_id", BigInteger()),
    _col("roles", ARRAY(Text)),
    # SHA-256 of the only refresh token of this session that is still good; any other one presented is a reuse.
    _col("refresh_token_hash", Text()),
    _col("ip", INET(), null=True),
    _col("device_fingerprint", Text(), null=True),
    _col("expires_at", TIME),
    _col("revoked_at", TIME, null=True),
    _col("revoke_reason", Text(), null=True),
    _created(),
    _updated(),
    Index("ix_auth_sessions_user_id", "user_id", "created_at"),
    schema="auth",
)

# Keys of programs. A secret that signs with HMAC is encrypted; of an Ed25519 key only the public half is here.
api_keys = Table(
    "api_keys",
    metadata,
    Column("key_id", Text, primary_key=True),
    _col("user_id", BigInteger()),
    _col("label", Text()),
    _col("algorithm", Text()),
    _col("secret", LargeBinary()),
    _col("permissions", ARRAY(Text)),
    _col("allowed_addresses", ARRAY(Text)),
    _col("revoked_at", TIME, null=True),
    _created(),
    CheckConstraint("algorithm IN ('HMAC_SHA256', 'ED25519')", name="algorithm"),
    Index("ix_api_keys_user_id", "user_id", "created_at"),
    schema="auth",
)

# --- orders ----------------------------------------------------------------------------------------------------
order_id_seq = Sequence("order_id_seq", start=1, schema="orders", metadata=metadata)

orders = Table(
    "orders",
    metadata,
    Column("order_id", BigInteger, primary_key=True, autoincrement=False),
    _col("user_id", BigInteger()),
    _col("instrument_id", Text()),
    _col("client_order_id", Text(), null=True),
    _col("side", Text()),
    _col("type", Text()),
    _col("time_in_force", Text()),
    _col("price", AMOUNT, null=True),
    # The worst price this order may trade at: the limit, or a MARKET order's protection price.
    _col("bound_price", AMOUNT),
    # The price at which its initial margin is held (NULL: the bound), and what is held beyond it per base for what a
    # fill at the bound would lose at once against the mark.
    _col("margin_price", AMOUNT, null=True),
    _col("open_loss", AMOUNT, default="0"),
    _col("quantity", AMOUNT),
    _col("filled_quantity", AMOUNT, default="0"),
    _col("filled_notional", AMOUNT, default="0"),
    _col("status", Text(), default="'PENDING'"),
    _col("failure_reason", Text(), null=True),
    _col("stp_mode", Text(), default="'EXPIRE_TAKER'"),
    _col("post_only", Boolean(), default="false"),
    _col("reduce_only", Boolean(), default="false"),
    # Of stop and take-profit orders: the price that triggers them, and which price has to get there.
    _col("stop_price", AMOUNT, null=True),
    _col("working_type", Text(), null=True),
    _col("is_liquidation", Boolean(), default="false"),
    _created(),
    _updated(),
    CheckConstraint("quantity > 0 AND filled_quantity >= 0 AND filled_quantity <= quantity", name="quantity"),
    CheckConstraint("side IN ('BUY', 'SELL')", name="side"),
    CheckConstraint(
        "status IN ('PENDING', 'ACCEPTED', 'PLACED', 'PARTIALLY_FILLED', 'FILLED', 'FAILED', 'REJECTED',"
        " 'CANCEL_REQUESTED', 'CANCELLED', 'EXPIRED')",
        name="status",
    ),
    Index("ix_orders_user_id", "user_id", "order_id"),
    Index(
        "uq_orders_client_order_id",
        "user_id",
        "client_order_id",
        unique=True,
        postgresql_where=text("client_order_id IS NOT NULL"),
    ),
    schema="orders",
    postgresql_with={"fillfactor": 50},
)

# Changes to open orders, with ids from the same source. `price` and `quantity` (of the whole order) are what was asked
# for, NULL: as it is. The claim is what the amended order may need beyond what the order as it is does; whatever is
# filled on the way, both together cover it.
amendments = Table(
    "amendments",
    metadata,
    Column("amendment_id", BigInteger, primary_key=True, autoincrement=False),
    Column("order_id", BigInteger, ForeignKey(orders.c.order_id), nullable=False),
    _col("user_id", BigInteger()),
    _col("instrument_id", Text()),
    _col("side", Text()),
    _col("reduce_only", Boolean()),
    _col("price", AMOUNT, null=True),
    _col("quantity", AMOUNT, null=True),
    _col("open_quantity", AMOUNT),
    _col("claimed_quantity", AMOUNT, default="0"),
    _col("claimed_notional", AMOUNT, default="0"),
    _col("claimed_loss", AMOUNT, default="0"),
    # What the amended order's margin is held at, as of an order.
    _col("margin_price", AMOUNT, null=True),
    _col("open_loss", AMOUNT, default="0"),
    _col("status", Text(), default="'PENDING'"),
    _col("failure_reason", Text(), null=True),
    _created(),
    _updated(),
    CheckConstraint("price IS NOT NULL OR quantity IS NOT NULL", name="change"),
    CheckConstraint("status IN ('PENDING', 'ACCEPTED', 'AMENDED', 'REJECTED', 'FAILED')", name="status"),
    # An order is amended once at a time, so that an amendment always knows what it changes.
    Index(
        "uq_amendments_open",
        "order_id",
        unique=True,
        postgresql_where=text("status IN ('PENDING', 'ACCEPTED')"),
    ),
    schema="orders",
    postgresql_with={"fillfactor": 50},
)

# One row per intake of orders, amendments or cancellations, written with them: what is still to be run as a workflow.
# Intakes that wait together share a workflow; those that were left behind are swept up.
sagas = Table(
    "sagas",
    metadata,
    Column("saga_id", Text, primary_key=True),
    _col("workflow_id", Text()),
    _col("kind", Text()),
    _col("order_ids", ARRAY(BigInteger)),
    _col("swept", Boolean(), default="false"),
    _col("done", Boolean(), default="false"),
    _created(),
    CheckConstraint("kind IN ('PLACE', 'CANCEL')", name="kind"),
    Index("ix_sagas_open", "created_at", postgresql_where=text("NOT done")),
    Index("ix_sagas_open_workflow", "workflow_id", postgresql_where=text("NOT done")),
    schema="orders",
)


def _cursors(schema: str) -> Table:
    """Up to which engine event this service has applied each instrument; its row lock orders the batches."""
    return Table(
        "cursors",
        metadata,
        Column("instrument_id", Text, primary_key=True),
        _col("applied_seq", BigInteger(), default="0"),
        schema=schema,
    )


def _steps(schema: str) -> Table:
    """First result of every batch step, so that a repeat changes nothing and answers the same."""
    return Table(
        "steps",
        metadata,
        Column("step_id", Text, primary_key=True),
        _col("result", JSON()),
        _created(),
        Index(f"ix_{schema}_steps_created_at", "created_at"),
        schema=schema,
    )


# Dead-man switches: when to cancel everything a user has open.
countdowns = Table(
    "countdowns",
    metadata,
    Column("user_id", BigInteger, primary_key=True, autoincrement=False),
    _col("cancel_at", TIME),
    Index("ix_countdowns_cancel_at", "cancel_at"),
    schema="orders",
)

orders_cursors = _cursors("orders")

# --- risk ------------------------------------------------------------------------------------------------------
leverage_tiers = Table(
    "leverage_tiers",
    metadata,
    Column("instrument_id", Text, primary_key=True),
    Column("tier", SmallInteger, primary_key=True, autoincrement=False),
    _col("notional_from", AMOUNT),
    _col("max_leverage", Integer()),
    _col("maintenance_margin_rate", Numeric(12, 8)),
    _col("cumulative", AMOUNT),
    schema="risk",
)

risk_limits = Table(
    "risk_limits",
    metadata,
    Column("limit_id", BigInteger, Identity(), primary_key=True),
    _col("user_id", BigInteger(), null=True),
    _col("instrument_id", Text()),
    _col("max_order_quantity", AMOUNT),
    _col("max_position_notional", AMOUNT),
    _col("max_leverage", Integer()),
    _col("max_open_orders", Integer()),
    _col("price_band", Numeric(12, 8)),
    _updated(),
    # user_id NULL is the instrument's default row.
    Index("uq_risk_limits_scope", "instrument_id", "user_id", unique=True, postgresql_nulls_not_distinct=True),
    schema="risk",
)

exposures = Table(
    "exposures",
    metadata,
    Column("user_id", BigInteger, primary_key=True, autoincrement=False),
    Column("instrument_id", Text, primary_key=True),
    _col("leverage", Integer()),
    _col("margin_mode", Text(), default="'ISOLATED'"),
    _col("signed_quantity", AMOUNT, default="0"),
    _col("entry_notional", AMOUNT, default="0"),
    _col("bid_quantity", AMOUNT, default="0"),
    _col("bid_notional", AMOUNT, default="0"),
    _col("ask_quantity", AMOUNT, default="0"),
    _col("ask_notional", AMOUNT, default="0"),
    _col("bid_loss", AMOUNT, default="0"),
    _col("ask_loss", AMOUNT, default="0"),
    _col("open_orders", Integer(), default="0"),
    _col("order_margin", AMOUNT, default="0"),
    # The terms that the engine was told last (leverage, maintenance margin rate in millionths, mode): NULL, none.
    _col("told_leverage", Integer(), null=True),
    _col("told_maintenance", Integer(), null=True),
    _col("told_mode", Text(), null=True),
    # What covers a cross position beyond its own margin, as the engine was told last (quote): NULL, never.
    _col("told_cover", AMOUNT, null=True),
    # The last check whose margin the ledger may not hold yet: the next batch waits for it.
    _col("pending_step", Text(), null=True),
    _updated(),
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
    _col("user_id", BigInteger()),
    _col("instrument_id", Text()),
    _col("mark_price", AMOUNT),
    _col("margin", AMOUNT),
    _col("unrealized_pnl", AMOUNT),
    _col("maintenance_margin", AMOUNT),
    _col("margin_ratio", Numeric(20, 8), null=True),
    _col("liquidation_price", AMOUNT, null=True),
    _col("status", Text()),
    _created(),
    Index("ix_risk_snapshots_user", "user_id", "instrument_id", "created_at"),
    Index("ix_risk_snapshots_created_at", "created_at"),
    schema="risk",
)

liquidation_queue = Table(
    "liquidation_queue",
    metadata,
    Column("liquidation_id", BigInteger, Identity(), primary_key=True),
    _col("position_id", BigInteger()),
    _col("user_id", BigInteger()),
    _col("instrument_id", Text()),
    _col("reason", Text()),
    _col("margin_mode", Text(), default="'ISOLATED'"),
    _col("status", Text(), default="'PENDING'"),
    # An operator aborts it: nothing more is submitted. The seq of the last command that was.
    _col("stopping", Boolean(), default="false"),
    _col("command_seq", BigInteger(), default="0"),
    _created(),
    _updated(),
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

risk_cursors = _cursors("risk")
risk_steps = _steps("risk")

# --- ledger ----------------------------------------------------------------------------------------------------
ledger_balances = Table(
    "ledger_balances",
    metadata,
    Column("user_id", BigInteger, primary_key=True, autoincrement=False),
    Column("asset", Text, primary_key=True),
    _col("available", AMOUNT, default="0"),
    _col("reserved", AMOUNT, default="0"),
    _updated(),
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
    _col("balance", AMOUNT, default="0"),
    _updated(),
    schema="ledger",
    postgresql_with={"fillfactor": 50},
)

# What of a user's `reserved` is held for which instrument, and as which kind of margin.
margin_holds = Table(
    "margin_holds",
    metadata,
    Column("user_id", BigInteger, primary_key=True, autoincrement=False),
    Column("instrument_id", Text, primary_key=True),
    _col("asset", Text()),
    _col("order_margin", AMOUNT, default="0"),
    _col("position_margin", AMOUNT, default="0"),
    # Required order margin that is not held: > 0 when a loss left it uncovered (those orders are being cancelled),
    # < 0 when it was freed before its freeze came.
    _col("order_short", AMOUNT, default="0"),
    # Counts the changes of position_margin; the copy in positions.positions says which one it is of.
    _col("margin_version", BigInteger(), default="0"),
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
    _created(),
    schema="ledger",
)

# One row carries a user's two postings (available and reserved); a system account has only the first.
ledger_entries = Table(
    "ledger_entries",
    metadata,
    Column("entry_id", BigInteger, Identity(), primary_key=True),
    _col("reference_type", Text()),
    _col("reference_id", Text()),
    _col("entry_type", Text()),
    _col("account", Text()),
    _col("user_id", BigInteger(), null=True),
    _col("asset", Text()),
    _col("instrument_id", Text(), null=True),
    _col("delta_available", AMOUNT),
    _col("delta_reserved", AMOUNT, default="0"),
    # Available of a user after this row; a system account's rows carry no running balance.
    _col("balance_after", AMOUNT, null=True),
    _created(),
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
    _col("asset", Text()),
    _col("amount", AMOUNT),
    # What justifies it: how much is closed (signed, base), the mark, and the price at which there is nothing left.
    _col("quantity", AMOUNT, default="0"),
    _col("mark_price", AMOUNT, default="0"),
    _col("bankruptcy_price", AMOUNT, default="0"),
    _col("is_open", Boolean(), default="true"),
    _created(),
    _updated(),
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
    _col("instrument_id", Text()),
    _col("asset", Text()),
    _col("amount", AMOUNT),
    Column("liquidation_id", BigInteger, nullable=True),
    Column("round", Integer, nullable=True),
    Column("mark_price", AMOUNT, nullable=True),
    Column("bankruptcy_price", AMOUNT, nullable=True),
    _created(),
    CheckConstraint("amount > 0", name="amount"),
    schema="ledger",
)

# One row per funding settlement: the rate and price it goes by, fixed once, and what it came to.
funding_runs = Table(
    "funding_runs",
    metadata,
    Column("instrument_id", Text, primary_key=True),
    Column("funding_time", TIME, primary_key=True),
    _col("asset", Text()),
    _col("rate", Numeric(20, 12)),
    _col("mark_price", AMOUNT),
    _col("status", Text(), default="'OPEN'"),
    _col("positions", BigInteger(), default="0"),
    # Quote: by users and the insurance fund, to users, by the fund alone.
    _col("paid", AMOUNT, default="0"),
    _col("received", AMOUNT, default="0"),
    _col("insurance", AMOUNT, default="0"),
    # Of users up to this one, what is due has been booked.
    _col("collected_user_id", BigInteger(), default="0"),
    _created(),
    _updated(),
    CheckConstraint("status IN ('OPEN', 'DONE')", name="status"),
    schema="ledger",
)

# Up to which funding time every published rate has been settled; what is owed is looked for after it.
funding_cursors = Table(
    "funding_cursors",
    metadata,
    Column("instrument_id", Text, primary_key=True),
    _col("collected_at", TIME),
    schema="ledger",
)

ledger_cursors = _cursors("ledger")
ledger_steps = _steps("ledger")

# --- positions -------------------------------------------------------------------------------------------------
positions = Table(
    "positions",
    metadata,
    Column("position_id", BigInteger, Identity(), primary_key=True),
    _col("user_id", BigInteger()),
    _col("instrument_id", Text()),
    # Positive is LONG, negative SHORT. entry_notional is the exact sum of what was paid for it, never negative.
    _col("signed_quantity", AMOUNT, default="0"),
    _col("entry_notional", AMOUNT, default="0"),
    _col("margin", AMOUNT, default="0"),
    _col("margin_version", BigInteger(), default="0"),
    _col("realized_pnl", AMOUNT, default="0"),
    _col("leverage", Integer()),
    _col("margin_mode", Text(), default="'ISOLATED'"),
    _col("liquidation_price", AMOUNT, null=True),
    # The mark price at which its user is warned, and whether that has been done.
    _col("warning_price", AMOUNT, null=True),
    _col("warned", Boolean(), default="false"),
    # The mark price of the last PositionUpdated.
    _col("told_price", AMOUNT, null=True),
    _col("status", Text(), default="'OPEN'"),
    _created(),
    _updated(),
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
    _col("user_id", BigInteger()),
    _col("instrument_id", Text()),
    # Of a fill: the engine's event and the side of it. NULL of a funding payment, which has the time it was due, and of
    # a mark price by which the user was told of the position (cause MARK, kept for some days).
    _col("seq", BigInteger(), null=True),
    _col("role", Text(), null=True),
    _col("funding_time", TIME, null=True),
    _col("type", Text()),
    _col("status", Text()),
    _col("trade_id", BigInteger(), null=True),
    _col("order_id", BigInteger(), null=True),
    _col("side", Text()),
    _col("price", AMOUNT),
    _col("quantity", AMOUNT),
    _col("fee", AMOUNT, default="0"),
    _col("realized_pnl", AMOUNT, default="0"),
    _col("signed_quantity_after", AMOUNT),
    _col("entry_notional_after", AMOUNT),
    # At which new parts of the position are backed (and by how much more per base, for what they lose at once), and
    # whether the fill was of the user's own will.
    _col("leverage", Integer()),
    _col("open_loss", AMOUNT, default="0"),
    _col("cause", Text(), default="'TRADE'"),
    _created(),
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
    _col("signed_quantity", AMOUNT),
    _col("payment", AMOUNT),
    schema="positions",
)

# `confirmed_seq` follows `applied_seq` once the ledger has settled the same events.
positions_cursors = Table(
    "cursors",
    metadata,
    Column("instrument_id", Text, primary_key=True),
    _col("applied_seq", BigInteger(), default="0"),
    _col("confirmed_seq", BigInteger(), default="0"),
    schema="positions",
)

# --- matching --------------------------------------------------------------------------------------------------
instruments = Table(
    "instruments",
    metadata,
    Column("instrument_id", Text, primary_key=True),
    _col("number", SmallInteger()),
    _col("base_asset", Text()),
    _col("quote_asset", Text()),
    _col("tick_size", AMOUNT),
    _col("lot_size", AMOUNT),
    _col("min_notional", AMOUNT),
    _col("maker_fee_rate", Numeric(12, 8)),
    _col("taker_fee_rate", Numeric(12, 8)),
    _col("max_leverage", Integer()),
    _col("default_leverage", Integer()),
    _col("state", Text(), default="'TRADING'"),
    _updated(),
    UniqueConstraint("number"),
    CheckConstraint("state IN ('TRADING', 'CANCEL_ONLY', 'HALTED')", name="state"),
    schema="matching",
)

# The row lock on `last_seq` is what makes the command log gapless.
sequencers = Table(
    "sequencers",
    metadata,
    Column("instrument_id", Text, ForeignKey(instruments.c.instrument_id), primary_key=True),
    _col("last_seq", BigInteger(), default="0"),
    schema="matching",
    postgresql_with={"fillfactor": 50},
)

commands = Table(
    "commands",
    metadata,
    Column("instrument_id", Text, primary_key=True),
    Column("seq", BigInteger, primary_key=True, autoincrement=False),
    _col("payload", JSON()),
    schema="matching",
)

matching_events = Table(
    "events",
    metadata,
    Column("instrument_id", Text, primary_key=True),
    Column("seq", BigInteger, primary_key=True, autoincrement=False),
    _col("command_seq", BigInteger()),
    _col("payload", JSON()),
    schema="matching",
)

# What the engine has done (command_seq in, event_seq out) and who may do it: `epoch` fences a former owner.
engine_cursors = Table(
    "cursors",
    metadata,
    Column("instrument_id", Text, ForeignKey(instruments.c.instrument_id), primary_key=True),
    _col("command_seq", BigInteger(), default="0"),
    _col("event_seq", BigInteger(), default="0"),
    _col("owner", Text(), null=True),
    _col("epoch", BigInteger(), default="0"),
    _col("lease_until", TIME, null=True),
    schema="matching",
    postgresql_with={"fillfactor": 50},
)

# The engine's book after `command_seq`, from which a restart goes on.
engine_snapshots = Table(
    "snapshots",
    metadata,
    Column("instrument_id", Text, ForeignKey(instruments.c.instrument_id), primary_key=True),
    Column("command_seq", BigInteger, primary_key=True, autoincrement=False),
    _col("event_seq", BigInteger()),
    _col("version", Integer()),
    _col("checksum", LargeBinary()),
    _col("payload", LargeBinary()),
    _created(),
    schema="matching",
)

# Up to which event each consumer of the log has got.
consumers = Table(
    "consumers",
    metadata,
    Column("instrument_id", Text, primary_key=True),
    Column("consumer", Text, primary_key=True),
    _col("acked_seq", BigInteger(), default="0"),
    _updated(),
    schema="matching",
    postgresql_with={"fillfactor": 50},
)

trade_tickers = Table(
    "trade_tickers",
    metadata,
    Column("trade_id", BigInteger, primary_key=True, autoincrement=False),
    _col("instrument_id", Text()),
    _col("seq", BigInteger()),
    _col("price", AMOUNT),
    _col("quantity", AMOUNT),
    _col("taker_side", Text()),
    _col("buy_order_id", BigInteger()),
    _col("sell_order_id", BigInteger()),
    _col("buyer_user_id", BigInteger()),
    _col("seller_user_id", BigInteger()),
    _col("maker_fee", AMOUNT),
    _col("taker_fee", AMOUNT),
    _col("executed_at", TIME),
    Index("ix_trade_tickers_instrument_id", "instrument_id", "seq"),
    schema="matching",
)

# What auto-deleveraging did; few, and kept for good. `side` is that of the bankrupt user's closing order.
deleveragings = Table(
    "deleveragings",
    metadata,
    Column("trade_id", BigInteger, primary_key=True, autoincrement=False),
    _col("instrument_id", Text()),
    _col("seq", BigInteger()),
    _col("price", AMOUNT),
    _col("quantity", AMOUNT),
    _col("side", Text()),
    _col("user_id", BigInteger()),
    _col("counterparty_user_id", BigInteger()),
    _col("executed_at", TIME),
    schema="matching",
)

# What was deleted of `events` and `trade_tickers`: everything up to `event_seq`, with the totals of those trades.
pruned = Table(
    "pruned",
    metadata,
    Column("instrument_id", Text, ForeignKey(instruments.c.instrument_id), primary_key=True),
    _col("event_seq", BigInteger(), default="0"),
    _col("trades", BigInteger(), default="0"),
    _col("quantity", AMOUNT, default="0"),
    _col("fees", AMOUNT, default="0"),
    _updated(),
    schema="matching",
)

# --- market ----------------------------------------------------------------------------------------------------
# What the market process knew of an instrument after event `seq`, from which a restart goes on.
checkpoints = Table(
    "checkpoints",
    metadata,
    Column("instrument_id", Text, primary_key=True),
    Column("seq", BigInteger, primary_key=True, autoincrement=False),
    _col("version", Integer()),
    _col("checksum", LargeBinary()),
    _col("payload", LargeBinary()),
    _created(),
    schema="market",
)

mark_prices = Table(
    "mark_prices",
    metadata,
    Column("instrument_id", Text, primary_key=True),
    Column("calculated_at", TIME, primary_key=True),
    _col("index_price", AMOUNT),
    _col("mark_price", AMOUNT),
    _col("fair_price", AMOUNT),
    _col("premium_index", Numeric(20, 12)),
    _col("funding_basis", Numeric(20, 12)),
    _col("source", Text()),
    schema="market",
)

# `sources`: {"used": [{name, price, clamped, weight}], "dropped": {name: reason}}; no price when none was fresh.
index_prices = Table(
    "index_prices",
    metadata,
    Column("instrument_id", Text, primary_key=True),
    Column("calculated_at", TIME, primary_key=True),
    _col("index_price", AMOUNT, null=True),
    _col("source", Text()),
    _col("sources", JSONB()),
    schema="market",
)

# Rewritten each round: `checked_at` that has grown old means that nobody calculates marks.
index_states = Table(
    "index_states",
    metadata,
    Column("instrument_id", Text, primary_key=True),
    _col("source", Text()),
    _col("checked_at", TIME),
    _col("frozen_since", TIME, null=True),
    schema="market",
)

kline_buckets = Table(
    "kline_buckets",
    metadata,
    Column("instrument_id", Text, primary_key=True),
    Column("period", Text, primary_key=True),
    Column("open_time", TIME, primary_key=True),
    _col("open", AMOUNT),
    _col("high", AMOUNT),
    _col("low", AMOUNT),
    _col("close", AMOUNT),
    _col("volume", AMOUNT),
    _col("trade_count", BigInteger()),
    _col("last_seq", BigInteger()),
    _col("closed", Boolean(), default="false"),
    schema="market",
    postgresql_with={"fillfactor": 70},
)

market_snapshots = Table(
    "market_snapshots",
    metadata,
    Column("snapshot_id", BigInteger, Identity(), primary_key=True),
    _col("instrument_id", Text()),
    _col("seq", BigInteger()),
    _col("bid_depth", JSONB()),
    _col("ask_depth", JSONB()),
    _col("last_price", AMOUNT, null=True),
    _col("volume_24h", AMOUNT),
    _created(),
    Index("ix_market_snapshots_instrument_id", "instrument_id", "created_at"),
    schema="market",
)

funding_rates = Table(
    "funding_rates",
    metadata,
    Column("instrument_id", Text, primary_key=True),
    Column("effective_at", TIME, primary_key=True),
    _col("rate", Numeric(20, 12)),
    _col("premium_average", Numeric(20, 12)),
    _col("mark_price", AMOUNT),
    # Premium samples in the average; with none, the rate is that of a premium of zero.
    _col("samples", Integer()),
    _col("source", Text()),
    _created(),
    schema="market",
)

# When funding falls due (the multiples of the interval since 1970), and the highest rate that it may come to.
funding_schedules = Table(
    "funding_schedules",
    metadata,
    Column("instrument_id", Text, primary_key=True),
    _col("interval_seconds", Integer()),
    _col("rate_cap", Numeric(20, 12)),
    schema="market",
)

# --- reporting -------------------------------------------------------------------------------------------------
# The read model of `reporting/`: sums by UTC day, each of which can be added to in any order. Nothing else in the
# exchange depends on it, and all of it can be made anew from the other services' tables.
pnl_days = Table(
    "pnl_days",
    metadata,
    Column("user_id", BigInteger, primary_key=True, autoincrement=False),
    Column("day", Date, primary_key=True),
    Column("instrument_id", Text, primary_key=True),
    Column("asset", Text, primary_key=True),
    # What the ledger booked on this day, signed as the user's money moved.
    _col("realized_pnl", AMOUNT, default="0"),
    _col("fees", AMOUNT, default="0"),
    _col("funding", AMOUNT, default="0"),
    # Fees and surplus of liquidations, and what the insurance fund paid for the user.
    _col("liquidation", AMOUNT, default="0"),
    _col("insurance", AMOUNT, default="0"),
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
    _col("maker_volume", Numeric(38, 16), default="0"),
    _col("taker_volume", Numeric(38, 16), default="0"),
    _col("maker_fees", AMOUNT, default="0"),
    _col("taker_fees", AMOUNT, default="0"),
    _col("maker_trades", BigInteger(), default="0"),
    _col("taker_trades", BigInteger(), default="0"),
    # Bought less sold, with what auto-deleveraging did: all days together are the position.
    _col("net_quantity", AMOUNT, default="0"),
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
    _col("change", AMOUNT, default="0"),
    schema="reporting",
    postgresql_with={"fillfactor": 70},
)

reported_liquidations = Table(
    "liquidations",
    metadata,
    Column("liquidation_id", BigInteger, primary_key=True, autoincrement=False),
    _col("user_id", BigInteger()),
    _col("instrument_id", Text()),
    _col("position_id", BigInteger()),
    _col("reason", Text()),
    _col("triggered_at", TIME),
    Index("ix_liquidations_user_id", "user_id", "liquidation_id"),
    schema="reporting",
)

# One row: which making of the read model this is, and the last outbox message that it was made with.
reporting_builds = Table(
    "builds",
    metadata,
    Column("is_current", Boolean, primary_key=True, server_default=text("true")),
    _col("generation", BigInteger()),
    _col("watermark", BigInteger()),
    _col("built_at", TIME),
    CheckConstraint("is_current", name="is_current"),
    schema="reporting",
)

# Up to where each stream is counted, and how many entries it had until there: from that a gap is known.
reporting_positions = Table(
    "stream_positions",
    metadata,
    Column("topic", Text, primary_key=True),
    _col("entry_id", Text()),
    _col("entries", BigInteger()),
    schema="reporting",
)

# Events that were counted: the relay may send one again, under the same id.
applied_events = Table(
    "applied_events",
    metadata,
    Column("message_id", BigInteger, primary_key=True, autoincrement=False),
    Column("line", Integer, primary_key=True, autoincrement=False),
    _col("applied_at", TIME, default="now()"),
    schema="reporting",
)

# --- outbox ----------------------------------------------------------------------------------------------------
# `payload` holds one JSON document a line; the relay sends each as a stream entry and then deletes the row.
outbox_messages = Table(
    "messages",
    metadata,
    Column("message_id", BigInteger, Identity(), primary_key=True),
    _col("topic", Text()),
    _col("name", Text()),
    _col("payload", Text()),
    _created(),
    schema="outbox",
)

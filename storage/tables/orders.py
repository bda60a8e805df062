"""Orders, amendments of them, sagas to be run, and dead-man switches."""

from sqlalchemy import BigInteger, Boolean, CheckConstraint, Column, ForeignKey, Index, Sequence, Table, Text, text
from sqlalchemy.dialects.postgresql import ARRAY

from storage.tables.common import AMOUNT, TIME, col, created, cursors, metadata, updated

order_id_seq = Sequence("order_id_seq", start=1, schema="orders", metadata=metadata)

orders = Table(
    "orders",
    metadata,
    Column("order_id", BigInteger, primary_key=True, autoincrement=False),
    col("user_id", BigInteger()),
    col("instrument_id", Text()),
    col("client_order_id", Text(), null=True),
    col("side", Text()),
    col("type", Text()),
    col("time_in_force", Text()),
    col("price", AMOUNT, null=True),
    # The worst price this order may trade at: the limit, or a MARKET order's protection price.
    col("bound_price", AMOUNT),
    # The price at which its initial margin is held (NULL: the bound), and what is held beyond it per base for what a
    # fill at the bound would lose at once against the mark.
    col("margin_price", AMOUNT, null=True),
    col("open_loss", AMOUNT, default="0"),
    col("quantity", AMOUNT),
    col("filled_quantity", AMOUNT, default="0"),
    col("filled_notional", AMOUNT, default="0"),
    col("status", Text(), default="'PENDING'"),
    col("failure_reason", Text(), null=True),
    col("stp_mode", Text(), default="'EXPIRE_TAKER'"),
    col("post_only", Boolean(), default="false"),
    col("reduce_only", Boolean(), default="false"),
    # Of stop and take-profit orders: the price that triggers them, and which price has to get there.
    col("stop_price", AMOUNT, null=True),
    col("working_type", Text(), null=True),
    col("is_liquidation", Boolean(), default="false"),
    created(),
    updated(),
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
    col("user_id", BigInteger()),
    col("instrument_id", Text()),
    col("side", Text()),
    col("reduce_only", Boolean()),
    col("price", AMOUNT, null=True),
    col("quantity", AMOUNT, null=True),
    col("open_quantity", AMOUNT),
    col("claimed_quantity", AMOUNT, default="0"),
    col("claimed_notional", AMOUNT, default="0"),
    col("claimed_loss", AMOUNT, default="0"),
    # What the amended order's margin is held at, as of an order.
    col("margin_price", AMOUNT, null=True),
    col("open_loss", AMOUNT, default="0"),
    col("status", Text(), default="'PENDING'"),
    col("failure_reason", Text(), null=True),
    created(),
    updated(),
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
    col("workflow_id", Text()),
    col("kind", Text()),
    col("order_ids", ARRAY(BigInteger)),
    col("swept", Boolean(), default="false"),
    col("done", Boolean(), default="false"),
    created(),
    CheckConstraint("kind IN ('PLACE', 'CANCEL')", name="kind"),
    Index("ix_sagas_open", "created_at", postgresql_where=text("NOT done")),
    Index("ix_sagas_open_workflow", "workflow_id", postgresql_where=text("NOT done")),
    schema="orders",
)


# Dead-man switches: when to cancel everything a user has open.
countdowns = Table(
    "countdowns",
    metadata,
    Column("user_id", BigInteger, primary_key=True, autoincrement=False),
    col("cancel_at", TIME),
    Index("ix_countdowns_cancel_at", "cancel_at"),
    schema="orders",
)

orders_cursors = cursors("orders")

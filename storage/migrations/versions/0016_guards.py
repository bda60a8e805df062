"""guards: what orders hold beyond initial margin, and the terms that the engine knows"""

import sqlalchemy as sa
from alembic import op

revision = "0016"
down_revision = "0015"

AMOUNT = sa.Numeric(38, 8)


def upgrade() -> None:
    zero = sa.text("0")
    # So far a total that was compared once; from here on what is held per base. Orders of before hold nothing.
    op.execute("UPDATE orders.orders SET open_loss = 0 WHERE open_loss <> 0")
    op.execute("UPDATE orders.amendments SET open_loss = 0 WHERE open_loss <> 0")
    op.add_column("orders", sa.Column("margin_price", AMOUNT, nullable=True), schema="orders")
    op.add_column("amendments", sa.Column("margin_price", AMOUNT, nullable=True), schema="orders")
    op.add_column("amendments", sa.Column("claimed_loss", AMOUNT, server_default=zero, nullable=False), schema="orders")
    for name in ("bid_loss", "ask_loss"):
        op.add_column("exposures", sa.Column(name, AMOUNT, server_default=zero, nullable=False), schema="risk")
    op.add_column("exposures", sa.Column("told_leverage", sa.Integer(), nullable=True), schema="risk")
    op.add_column("exposures", sa.Column("told_maintenance", sa.Integer(), nullable=True), schema="risk")
    op.add_column("exposures", sa.Column("told_mode", sa.Text(), nullable=True), schema="risk")
    op.drop_constraint(op.f("ck_exposures_positive"), "exposures", schema="risk", type_="check")
    op.create_check_constraint(
        op.f("ck_exposures_positive"),
        "exposures",
        "bid_quantity >= 0 AND bid_notional >= 0 AND ask_quantity >= 0 AND ask_notional >= 0 AND open_orders >= 0"
        " AND order_margin >= 0 AND bid_loss >= 0 AND ask_loss >= 0",
        schema="risk",
    )
    op.add_column(
        "position_events", sa.Column("open_loss", AMOUNT, server_default=zero, nullable=False), schema="positions"
    )
    # Only the bands that nobody has chosen.
    op.execute("""
        UPDATE risk.risk_limits l SET price_band = n.band, updated_at = now()
        FROM (VALUES ('BTC-USDT-PERP', 0.05), ('ETH-USDT-PERP', 0.075), ('SOL-USDT-PERP', 0.1)) AS n (name, band)
        WHERE l.instrument_id = n.name AND l.price_band = 0.5
    """)


def downgrade() -> None:
    op.drop_column("position_events", "open_loss", schema="positions")
    for name in ("bid_loss", "ask_loss", "told_leverage", "told_maintenance", "told_mode"):
        op.drop_column("exposures", name, schema="risk")
    op.drop_column("amendments", "claimed_loss", schema="orders")
    op.drop_column("amendments", "margin_price", schema="orders")
    op.drop_column("orders", "margin_price", schema="orders")

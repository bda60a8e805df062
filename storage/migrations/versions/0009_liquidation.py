"""liquidation"""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    op.add_column("position_events", sa.Column("leverage", sa.Integer()), schema="positions")
    op.execute(
        "UPDATE positions.position_events e SET leverage = p.leverage FROM positions.positions p"
        " WHERE p.user_id = e.user_id AND p.instrument_id = e.instrument_id"
    )
    op.alter_column("position_events", "leverage", nullable=False, schema="positions")
    op.add_column(
        "position_events",
        sa.Column("cause", sa.Text(), server_default=sa.text("'TRADE'"), nullable=False),
        schema="positions",
    )
    op.create_check_constraint(
        op.f("ck_position_events_cause"),
        "position_events",
        "cause IN ('TRADE', 'LIQUIDATION', 'DELEVERAGE')",
        schema="positions",
    )
    for schema, table in (("ledger", "margin_holds"), ("positions", "positions")):
        column = sa.Column("margin_version", sa.BigInteger(), server_default=sa.text("0"), nullable=False)
        op.add_column(table, column, schema=schema)

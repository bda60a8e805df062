"""told marks: a position's events tell by which mark prices its user was told of it"""

import sqlalchemy as sa
from alembic import op

revision = "0017"
down_revision = "0016"

CAUSES = "'TRADE', 'LIQUIDATION', 'DELEVERAGE', 'FUNDING'"


def upgrade() -> None:
    origin = "num_nonnulls(seq, funding_time) = CASE cause WHEN 'MARK' THEN 0 ELSE 1 END"
    _constrain(f"cause IN ({CAUSES}, 'MARK')", origin)
    op.create_index(
        "ix_position_events_told",
        "position_events",
        ["created_at"],
        schema="positions",
        postgresql_where=sa.text("cause = 'MARK'"),
    )


def downgrade() -> None:
    op.drop_index("ix_position_events_told", "position_events", schema="positions")
    op.execute("DELETE FROM positions.position_events WHERE cause = 'MARK'")
    _constrain(f"cause IN ({CAUSES})", "(seq IS NULL) = (funding_time IS NOT NULL)")


def _constrain(cause: str, origin: str) -> None:
    for name, condition in (("cause", cause), ("origin", origin)):
        full_name = op.f(f"ck_position_events_{name}")
        op.drop_constraint(full_name, "position_events", schema="positions", type_="check")
        op.create_check_constraint(full_name, "position_events", condition, schema="positions")

"""told cover: what the engine was told last of what covers a cross position; orders that lack cover are found at once"""

import sqlalchemy as sa
from alembic import op

revision = "0020"
down_revision = "0019"


def upgrade() -> None:
    op.add_column("exposures", sa.Column("told_cover", sa.Numeric(38, 8), nullable=True), schema="risk")
    op.create_index(
        "ix_exposures_told_cover",
        "exposures",
        ["user_id"],
        schema="risk",
        postgresql_where=sa.text("told_cover IS NOT NULL"),
    )
    op.create_index(
        "ix_margin_holds_uncovered",
        "margin_holds",
        ["instrument_id", "user_id"],
        schema="ledger",
        postgresql_where=sa.text("order_short > 0"),
    )


def downgrade() -> None:
    op.drop_index("ix_margin_holds_uncovered", "margin_holds", schema="ledger")
    op.drop_index("ix_exposures_told_cover", "exposures", schema="risk")
    op.drop_column("exposures", "told_cover", schema="risk")

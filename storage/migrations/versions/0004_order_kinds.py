"""order kinds"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    false = sa.text("false")
    op.add_column("orders", sa.Column("post_only", sa.Boolean(), server_default=false, nullable=False), schema="orders")
    op.add_column(
        "orders", sa.Column("reduce_only", sa.Boolean(), server_default=false, nullable=False), schema="orders"
    )
    op.add_column("orders", sa.Column("stop_price", sa.Numeric(precision=38, scale=8), nullable=True), schema="orders")
    op.add_column("orders", sa.Column("working_type", sa.Text(), nullable=True), schema="orders")

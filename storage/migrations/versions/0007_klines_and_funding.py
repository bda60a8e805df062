"""klines and funding rates"""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    # The bucket that is open is rewritten with every trade.
    op.execute("ALTER TABLE market.kline_buckets SET (fillfactor = 70)")
    op.add_column("funding_rates", sa.Column("samples", sa.Integer(), nullable=False), schema="market")

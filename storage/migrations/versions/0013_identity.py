"""locks that end by themselves, keys of programs"""

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0011"


def upgrade() -> None:
    op.add_column(
        "auth_credentials", sa.Column("locked_until", sa.DateTime(timezone=True), nullable=True), schema="auth"
    )
    op.create_table(
        "api_keys",
        sa.Column("key_id", sa.Text(), nullable=False),
        sa.Column("user_id", sa.BigInteger(), nullable=False),
        sa.Column("label", sa.Text(), nullable=False),
        sa.Column("algorithm", sa.Text(), nullable=False),
        sa.Column("secret", sa.LargeBinary(), nullable=False),
        sa.Column("permissions", sa.ARRAY(sa.Text()), nullable=False),
        sa.Column("allowed_addresses", sa.ARRAY(sa.Text()), nullable=False),
        sa.Column("revoked_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.CheckConstraint("algorithm IN ('HMAC_SHA256', 'ED25519')", name=op.f("ck_api_keys_algorithm")),
        sa.PrimaryKeyConstraint("key_id", name=op.f("pk_api_keys")),
        schema="auth",
    )
    op.create_index("ix_api_keys_user_id", "api_keys", ["user_id", "created_at"], schema="auth")

"""failures lock nobody's account; sessions that answer a repeated refresh alike and are pruned; keys that expire, are bound and show their use"""

import sqlalchemy as sa
from alembic import op

revision = "0021"
down_revision = "0020"


def upgrade() -> None:
    # Failures are counted by where they come from, and no longer lock the account.
    op.drop_column("auth_credentials", "locked_until", schema="auth")
    op.add_column("auth_sessions", sa.Column("previous_token_hash", sa.Text(), nullable=True), schema="auth")
    op.add_column("auth_sessions", sa.Column("rotated_at", sa.DateTime(timezone=True), nullable=True), schema="auth")
    op.create_index(
        "ix_auth_sessions_ended", "auth_sessions", [sa.text("LEAST(revoked_at, expires_at)")], schema="auth"
    )
    op.add_column("api_keys", sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True), schema="auth")
    op.add_column("api_keys", sa.Column("last_used_at", sa.DateTime(timezone=True), nullable=True), schema="auth")
    op.add_column(
        "api_keys",
        sa.Column("instruments", sa.ARRAY(sa.Text()), server_default=sa.text("'{}'"), nullable=False),
        schema="auth",
    )
    # Keys of before had no end: a quarter of a year from now on, in which their users can make others.
    op.execute("UPDATE auth.api_keys SET expires_at = now() + interval '90 days'")
    op.alter_column("api_keys", "expires_at", nullable=False, schema="auth")


def downgrade() -> None:
    op.drop_column("api_keys", "instruments", schema="auth")
    op.drop_column("api_keys", "last_used_at", schema="auth")
    op.drop_column("api_keys", "expires_at", schema="auth")
    op.drop_index("ix_auth_sessions_ended", "auth_sessions", schema="auth")
    op.drop_column("auth_sessions", "rotated_at", schema="auth")
    op.drop_column("auth_sessions", "previous_token_hash", schema="auth")
    op.add_column(
        "auth_credentials", sa.Column("locked_until", sa.DateTime(timezone=True), nullable=True), schema="auth"
    )

"""Credentials, sessions, API keys, and attempts to sign in."""

from sqlalchemy import BigInteger, CheckConstraint, Column, Identity, Index, LargeBinary, Table, Text, text
from sqlalchemy.dialects.postgresql import ARRAY, INET, UUID

from storage.tables.common import TIME, col, created, metadata, updated

auth_credentials = Table(
    "auth_credentials",
    metadata,
    Column("user_id", BigInteger, primary_key=True, autoincrement=False),
    Column("type", Text, primary_key=True),
    col("email", Text(), null=True),
    col("secret_hash", Text()),
    col("roles", ARRAY(Text), default="'{user}'"),
    col("status", Text(), default="'ACTIVE'"),
    col("expires_at", TIME, null=True),
    created(),
    updated(),
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
    col("user_id", BigInteger(), null=True),
    col("email", Text()),
    col("outcome", Text()),
    col("reason", Text(), null=True),
    col("ip", INET(), null=True),
    col("device", Text(), null=True),
    created(),
    CheckConstraint("outcome IN ('SUCCESS', 'FAILED')", name="outcome"),
    Index("ix_login_audits_user_id", "user_id", "created_at"),
    schema="auth",
)

auth_sessions = Table(
    "auth_sessions",
    metadata,
    Column("session_id", UUID(as_uuid=False), primary_key=True),
    col("user_id", BigInteger()),
    col("roles", ARRAY(Text)),
    # SHA-256 of the only refresh token of this session that is still good, and of the one before; that one gets the
    # same answer again within seconds of `rotated_at`.
    col("refresh_token_hash", Text()),
    col("previous_token_hash", Text(), null=True),
    col("rotated_at", TIME, null=True),
    col("ip", INET(), null=True),
    col("device_fingerprint", Text(), null=True),
    col("expires_at", TIME),
    col("revoked_at", TIME, null=True),
    col("revoke_reason", Text(), null=True),
    created(),
    updated(),
    Index("ix_auth_sessions_user_id", "user_id", "created_at"),
    Index("ix_auth_sessions_ended", text("LEAST(revoked_at, expires_at)")),
    schema="auth",
)

# Keys of programs. A secret that signs with HMAC is encrypted; of an Ed25519 key only the public half is here.
api_keys = Table(
    "api_keys",
    metadata,
    Column("key_id", Text, primary_key=True),
    col("user_id", BigInteger()),
    col("label", Text()),
    col("algorithm", Text()),
    col("secret", LargeBinary()),
    col("permissions", ARRAY(Text)),
    col("allowed_addresses", ARRAY(Text)),
    # Which instruments its orders may be about; none: all.
    col("instruments", ARRAY(Text), default="'{}'"),
    col("expires_at", TIME),
    col("last_used_at", TIME, null=True),
    col("revoked_at", TIME, null=True),
    created(),
    CheckConstraint("algorithm IN ('HMAC_SHA256', 'ED25519')", name="algorithm"),
    Index("ix_api_keys_user_id", "user_id", "created_at"),
    schema="auth",
)

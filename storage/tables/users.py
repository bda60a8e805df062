"""Users and their registration."""

from sqlalchemy import BigInteger, CheckConstraint, Column, ForeignKey, Index, Integer, Sequence, Table, Text, text
from sqlalchemy.dialects.postgresql import ARRAY

from storage.tables.common import col, created, metadata, updated

user_id_seq = Sequence("user_id_seq", start=1000, schema="users", metadata=metadata)

users = Table(
    "users",
    metadata,
    Column("user_id", BigInteger, primary_key=True, server_default=user_id_seq.next_value()),
    col("email", Text()),
    col("status", Text(), default="'PREPARE'"),
    col("roles", ARRAY(Text), default="'{user}'"),
    created(),
    updated(),
    CheckConstraint("status IN ('PREPARE', 'ACTIVE', 'FAILED')", name="status"),
    Index("uq_users_email", text("lower(email)"), unique=True),
    schema="users",
)

user_registration_prepare = Table(
    "user_registration_prepare",
    metadata,
    Column("user_id", BigInteger, ForeignKey(users.c.user_id), primary_key=True),
    col("status", Text(), default="'PREPARE'"),
    # Cleared once the credential exists: the only copy then lives in auth.auth_credentials.
    col("secret_hash", Text(), null=True),
    col("attempts", Integer(), default="0"),
    col("last_error", Text(), null=True),
    created(),
    updated(),
    CheckConstraint("status IN ('PREPARE', 'COMPLETED', 'FAILED')", name="status"),
    Index("ix_user_registration_prepare_open", "created_at", postgresql_where=text("status = 'PREPARE'")),
    schema="users",
)

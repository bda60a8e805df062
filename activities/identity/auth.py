"""The auth service: credentials and the record of who tried to sign in."""

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from ipaddress import IPv4Address, IPv6Address
from typing import Literal

from temporalio import activity
from temporalio.exceptions import ApplicationError

from activities.identity.users import take_pending_credential
from domain.contracts.registration import CREATE_CREDENTIALS, REGISTRATION_ATTEMPTS_MAX, Registration
from domain.identity import PASSWORD_CREDENTIAL
from storage.db import DATABASE_ERRORS, Connection, Pool

DEVICE_LENGTH_MAX = 256

_INSERT = """
INSERT INTO auth.auth_credentials (user_id, type, email, secret_hash, roles)
SELECT user_id, $2, email, $3, roles FROM users.v_users WHERE user_id = $1
ON CONFLICT (user_id, type) DO NOTHING
"""
_FIND = "SELECT user_id, type, status, created_at FROM auth.auth_credentials WHERE user_id = $1 AND type = $2"
_FIND_BY_EMAIL = """
SELECT user_id, email, roles, status, expires_at, secret_hash FROM auth.auth_credentials
WHERE lower(email) = lower($1) AND type = 'PASSWORD'
"""
_FIND_BY_USER = """
SELECT user_id, email, roles, status, expires_at, secret_hash FROM auth.auth_credentials
WHERE user_id = $1 AND type = 'PASSWORD'
"""
_REPLACE_HASH = """
UPDATE auth.auth_credentials SET secret_hash = $3, updated_at = now()
WHERE user_id = $1 AND type = 'PASSWORD' AND secret_hash = $2
"""
_UPSERT = """
INSERT INTO auth.auth_credentials (user_id, type, email, secret_hash, roles)
SELECT user_id, 'PASSWORD', email, $2, roles FROM users.v_users WHERE user_id = $1
ON CONFLICT (user_id, type) DO UPDATE
SET email = excluded.email, secret_hash = excluded.secret_hash, roles = excluded.roles, status = 'ACTIVE',
    expires_at = NULL, updated_at = now()
"""
_CHANGE = """
UPDATE auth.auth_credentials
SET secret_hash = $3, status = CASE status WHEN 'EXPIRED' THEN 'ACTIVE' ELSE status END, expires_at = NULL,
    updated_at = now()
WHERE user_id = $1 AND type = 'PASSWORD' AND secret_hash = $2
RETURNING true
"""
_SET_STATUS = """
UPDATE auth.auth_credentials SET status = $2,
    expires_at = CASE $2 WHEN 'ACTIVE' THEN NULL ELSE expires_at END, updated_at = now()
WHERE user_id = $1 AND type = 'PASSWORD'
RETURNING user_id, email, roles, status, expires_at, secret_hash
"""
_AUDIT = """
INSERT INTO auth.login_audits (user_id, email, outcome, reason, ip, device) VALUES ($1, $2, $3, $4, $5, $6)
"""
# Ids rise with time: the oldest rows are found without an index on their times.
_FORGET_AUDITS = """
DELETE FROM auth.login_audits WHERE created_at < now() - $1::interval
    AND audit_id IN (SELECT audit_id FROM auth.login_audits ORDER BY audit_id LIMIT $2)
"""


@dataclass(frozen=True)
class Credential:
    """A credential without its secret."""

    user_id: int
    type: str
    status: str
    created_at: datetime


@dataclass(frozen=True)
class PasswordCredential:
    """What signing in with a password needs to know. Status LOCKED is an operator's word, and ends when one says so."""

    user_id: int
    email: str
    roles: list[str]
    status: str
    expires_at: datetime | None
    secret_hash: str = field(repr=False)


@dataclass(frozen=True)
class Device:
    """Where a request comes from, as far as it says."""

    ip: IPv4Address | IPv6Address | None
    agent: str | None
    fingerprint: str | None


async def create_credential(pool: Pool, user_id: int, kind: str, secret_hash: str) -> Credential | None:
    """The user's credential of this kind, created unless it exists (then unchanged). None without such a user."""
    await pool.execute(_INSERT, user_id, kind, secret_hash)
    row = await pool.fetchrow(_FIND, user_id, kind)
    return Credential(**row) if row is not None else None


async def find_password(pool: Pool, email: str) -> PasswordCredential | None:
    """The password credential of this address."""
    row = await pool.fetchrow(_FIND_BY_EMAIL, email)
    return PasswordCredential(**row) if row is not None else None


async def find_password_of(pool: Pool, user_id: int) -> PasswordCredential | None:
    """The password credential of this user."""
    row = await pool.fetchrow(_FIND_BY_USER, user_id)
    return PasswordCredential(**row) if row is not None else None


async def change_password(conn: Connection, user_id: int, old_hash: str, new_hash: str) -> bool:
    """Give the user another password, which ends expiry. False when the old one is no longer `old_hash`."""
    return bool(await conn.fetchval(_CHANGE, user_id, old_hash, new_hash))


async def set_status(
    conn: Connection, user_id: int, status: Literal["ACTIVE", "LOCKED", "EXPIRED"]
) -> PasswordCredential | None:
    """Put the user's credential into this state. None without a credential."""
    row = await conn.fetchrow(_SET_STATUS, user_id, status)
    return PasswordCredential(**row) if row is not None else None


async def replace_hash(conn: Connection, user_id: int, old_hash: str, new_hash: str) -> None:
    """Store the same password hashed anew, unless the password has been changed meanwhile."""
    await conn.execute(_REPLACE_HASH, user_id, old_hash, new_hash)


async def set_password(conn: Connection, user_id: int, secret_hash: str) -> None:
    """Give the user this password, an unlocked credential, and the address and roles of the account."""
    await conn.execute(_UPSERT, user_id, secret_hash)


async def audit_login(
    conn: Connection | Pool, *, email: str, user_id: int | None, device: Device, reason: str | None
) -> None:
    """Record one attempt to sign in; `reason` says why it failed, None that it did not."""
    outcome = "SUCCESS" if reason is None else "FAILED"
    await conn.execute(_AUDIT, user_id, email, outcome, reason, device.ip, device.agent)


async def forget_login_audits(conn: Connection, kept: timedelta, limit: int) -> int:
    """Delete the records of attempts to sign in that are older than `kept`, up to `limit`; how many it was."""
    status = await conn.execute(_FORGET_AUDITS, kept, limit)
    return int(status.removeprefix("DELETE "))


class AuthActivities:
    """The auth service's step of the registration workflow."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    @activity.defn(name=CREATE_CREDENTIALS)
    async def create_credentials(self, registration: Registration) -> None:
        """Turn the hash that waits with the registration into a credential; a repeat changes nothing."""
        pending = await take_pending_credential(self._pool, registration.user_id)
        if pending is None:
            return
        if pending.attempts > REGISTRATION_ATTEMPTS_MAX:
            message = f"No credential after {REGISTRATION_ATTEMPTS_MAX} attempts"
            raise ApplicationError(message, type="ATTEMPTS_EXHAUSTED", non_retryable=True)
        try:
            await create_credential(self._pool, registration.user_id, PASSWORD_CREDENTIAL, pending.secret_hash)
        except DATABASE_ERRORS as error:
            # Only the kind: Postgres may quote the row, and this message goes into the workflow's history.
            message = f"The credential store failed: {type(error).__name__}"
            raise ApplicationError(message, type="REMOTE_SERVICE_ERROR") from None

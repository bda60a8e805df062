"""API keys of the auth service: programs that act for a user."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Literal

from redis.asyncio import Redis

from activities.identity.sessions import REVOKED_CHANNEL
from domain.problems import Problem
from storage.db import Connection, Pool

ACTIVE_KEYS_MAX = 20
# How exactly it is known when a key was used last.
USE_NOTED = timedelta(seconds=60)
Algorithm = Literal["HMAC_SHA256", "ED25519"]
Permission = Literal["READ", "TRADE"]

_COLUMNS = (
    "key_id, user_id, label, algorithm, secret, permissions, allowed_addresses, instruments, created_at, expires_at,"
    " last_used_at"
)
# The row of the password is locked so that two requests cannot both make the last key.
_LOCK_USER = "SELECT FROM auth.auth_credentials WHERE user_id = $1 AND type = 'PASSWORD' FOR UPDATE"
_COUNT = "SELECT count(*) FROM auth.api_keys WHERE user_id = $1 AND revoked_at IS NULL AND expires_at > $2"
_INSERT = f"INSERT INTO auth.api_keys ({_COLUMNS}) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, NULL)"
_LIST = f"SELECT {_COLUMNS} FROM auth.api_keys WHERE user_id = $1 AND revoked_at IS NULL ORDER BY created_at DESC"
# An operator's lock of the user stops the user's programs too.
_FIND = f"""
SELECT {_COLUMNS} FROM auth.api_keys k
WHERE key_id = $1 AND revoked_at IS NULL AND expires_at > clock_timestamp() AND NOT EXISTS (
    SELECT FROM auth.auth_credentials c WHERE c.user_id = k.user_id AND c.type = 'PASSWORD' AND c.status = 'LOCKED'
)
"""
_REVOKE = """
UPDATE auth.api_keys SET revoked_at = $3
WHERE user_id = $1 AND ($2::text IS NULL OR key_id = $2) AND revoked_at IS NULL
RETURNING key_id
"""
_RENAME = f"""
UPDATE auth.api_keys SET label = $3 WHERE user_id = $1 AND key_id = $2 AND revoked_at IS NULL RETURNING {_COLUMNS}
"""
_USED = """
UPDATE auth.api_keys SET last_used_at = $2
WHERE key_id = $1 AND (last_used_at IS NULL OR last_used_at < $2::timestamptz - $3::interval)
"""
_LOCK_SECRETS = """
SELECT key_id, secret FROM auth.api_keys
WHERE algorithm = 'HMAC_SHA256' AND revoked_at IS NULL ORDER BY key_id FOR UPDATE
"""
_REPLACE_SECRETS = """
UPDATE auth.api_keys k SET secret = n.secret FROM unnest($1::text[], $2::bytea[]) AS n (key_id, secret)
WHERE k.key_id = n.key_id
"""


@dataclass(frozen=True)
class ApiKey:
    """A key that is not revoked. `secret`: the encrypted HMAC secret, or the 32 bytes of an Ed25519 public key."""

    key_id: str
    user_id: int
    label: str
    algorithm: Algorithm
    secret: bytes = field(repr=False)
    permissions: Sequence[Permission]
    # Networks from which it may be used; none: from everywhere.
    allowed_addresses: Sequence[str]
    # What it may trade; none: all.
    instruments: Sequence[str]
    created_at: datetime
    expires_at: datetime
    # Up to `USE_NOTED` late.
    last_used_at: datetime | None = None


async def add_key(conn: Connection, key: ApiKey) -> None:
    """Store a new key. Raises Problem VALIDATION_FAILED when the user has `ACTIVE_KEYS_MAX` already."""
    await conn.execute(_LOCK_USER, key.user_id)
    if await conn.fetchval(_COUNT, key.user_id, key.created_at) >= ACTIVE_KEYS_MAX:
        raise Problem("VALIDATION_FAILED", f"A user may have {ACTIVE_KEYS_MAX} API keys; revoke one first")
    await conn.execute(
        _INSERT,
        key.key_id,
        key.user_id,
        key.label,
        key.algorithm,
        key.secret,
        key.permissions,
        key.allowed_addresses,
        key.instruments,
        key.created_at,
        key.expires_at,
    )


async def keys_of(pool: Pool, user_id: int) -> list[ApiKey]:
    """The user's keys, newest first; also those that have expired, since a program may still use one."""
    return [ApiKey(**row) for row in await pool.fetch(_LIST, user_id)]


async def find_key(pool: Pool, key_id: str) -> ApiKey | None:
    """The key, unless it is revoked or has expired, or its user is locked."""
    row = await pool.fetchrow(_FIND, key_id)
    return ApiKey(**row) if row is not None else None


async def revoke_keys(conn: Connection | Pool, user_id: int, key_id: str | None, now: datetime) -> list[str]:
    """End a key of the user, or all of them when `key_id` is None; the ids of those that ended. `tell_key_changed` has
    to follow, after the caller's transaction."""
    return [row["key_id"] for row in await conn.fetch(_REVOKE, user_id, key_id, now)]


async def rename_key(pool: Pool, user_id: int, key_id: str, label: str) -> ApiKey | None:
    """Give a key of the user another label. None when there is no such key."""
    row = await pool.fetchrow(_RENAME, user_id, key_id, label)
    return ApiKey(**row) if row is not None else None


async def note_use(pool: Pool, key_id: str, now: datetime) -> None:
    """Remember that the key was used, unless that was noted within `USE_NOTED`."""
    await pool.execute(_USED, key_id, now, USE_NOTED)


async def replace_secrets(conn: Connection, replaced: Callable[[bytes], bytes]) -> int:
    """Put `replaced(secret)` in place of every encrypted secret of a key that is not revoked; how many there are."""
    rows = await conn.fetch(_LOCK_SECRETS)
    secrets = [replaced(row["secret"]) for row in rows]
    await conn.execute(_REPLACE_SECRETS, [row["key_id"] for row in rows], secrets)
    return len(rows)


async def tell_key_changed(redis: Redis, *key_ids: str) -> None:
    """Make every api process look at these keys anew. One that does not hear it does so within a second."""
    for key_id in key_ids:
        await redis.publish(REVOKED_CHANNEL, key_id)

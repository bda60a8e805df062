"""Sessions of the auth service: rows in auth.auth_sessions, mirrored in Redis for the gateway.

A Redis key exists only for a session whose row is good. Whoever writes or deletes the key holds the row's lock
while doing so; thus a lost key can be restored without ever bringing back a revoked session.
"""

import hmac
import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

import asyncpg
from redis.asyncio import Redis

from domain.events import AuthSessionRevoked
from domain.identity import (
    PASSWORD_CREDENTIAL,
    REFRESH_REPEATED,
    SESSION_LIFETIME,
    SESSION_LIFETIME_MAX,
    SESSIONS_MAX,
    require_usable_credential,
)
from domain.problems import Problem
from storage.db import Connection, Pool
from storage.outbox import emit

REVOKED_CHANNEL = "auth:revoked"

_INSERT = """
INSERT INTO auth.auth_sessions
    (session_id, user_id, roles, refresh_token_hash, ip, device_fingerprint, expires_at, created_at, updated_at)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $8)
"""
_LOCK_WITH_CREDENTIAL = """
SELECT s.session_id, s.user_id, s.roles, c.roles AS roles_now, s.ip, s.device_fingerprint, s.created_at, s.expires_at,
       s.refresh_token_hash, s.previous_token_hash, s.rotated_at, c.status, c.expires_at AS credential_expires_at
FROM auth.auth_sessions s JOIN auth.auth_credentials c ON c.user_id = s.user_id AND c.type = $2
WHERE s.session_id = $1 AND s.revoked_at IS NULL AND s.expires_at > $3
FOR UPDATE OF s
"""
_ROTATE = """
UPDATE auth.auth_sessions
SET refresh_token_hash = $2, previous_token_hash = refresh_token_hash, rotated_at = $5, roles = $3, expires_at = $4,
    updated_at = $5
WHERE session_id = $1
"""
_LOCK_GOOD = """
SELECT session_id, user_id, roles, ip, device_fingerprint, created_at, expires_at FROM auth.auth_sessions
WHERE session_id = $1 AND revoked_at IS NULL AND expires_at > $2
FOR SHARE
"""
_LIST_GOOD = """
SELECT session_id, user_id, roles, ip, device_fingerprint, created_at, expires_at FROM auth.auth_sessions
WHERE user_id = $1 AND revoked_at IS NULL AND expires_at > $2 AND ($3::uuid IS NULL OR (created_at, session_id) < (
    SELECT created_at, session_id FROM auth.auth_sessions WHERE session_id = $3 AND user_id = $1
))
ORDER BY created_at DESC, session_id DESC LIMIT $4
"""
_REVOKE = """
UPDATE auth.auth_sessions SET revoked_at = $3, revoke_reason = $4, updated_at = $3
WHERE user_id = $1 AND revoked_at IS NULL AND ($2::uuid IS NULL OR session_id = $2)
    AND ($5::uuid IS NULL OR session_id <> $5)
RETURNING session_id
"""
_OPENED_AT = "SELECT created_at FROM auth.auth_sessions WHERE session_id = $1"
_TOO_MANY = """
SELECT session_id FROM auth.auth_sessions WHERE user_id = $1 AND revoked_at IS NULL AND expires_at > $2
ORDER BY created_at DESC, session_id DESC OFFSET $3
"""
_FORGET_ENDED = """
DELETE FROM auth.auth_sessions WHERE session_id IN (
    SELECT session_id FROM auth.auth_sessions WHERE LEAST(revoked_at, expires_at) < now() - $1::interval LIMIT $2
)
"""


@dataclass(frozen=True)
class Session:
    """One signed-in device."""

    session_id: str
    user_id: int
    roles: list[str]
    ip: str | None
    device_fingerprint: str | None
    created_at: datetime
    expires_at: datetime


def session_key(session_id: str) -> str:
    """The Redis key whose existence says that the session is good."""
    return f"auth:session:{session_id}"


def new_session(user_id: int, roles: list[str], ip: str | None, device: str | None, now: datetime) -> Session:
    """A session of seven days, not yet stored."""
    return Session(str(uuid.uuid4()), user_id, roles, ip, device, now, now + SESSION_LIFETIME)


async def open_session(conn: Connection, redis: Redis, session: Session, refresh_hash: str) -> None:
    """Write the row and the key of a new session; the caller's transaction holds the row until it commits. Of more than
    SESSIONS_MAX the oldest end."""
    await conn.execute(
        _INSERT,
        session.session_id,
        session.user_id,
        session.roles,
        refresh_hash,
        session.ip,
        session.device_fingerprint,
        session.expires_at,
        session.created_at,
    )
    await _mirror(redis, session)
    now = session.created_at
    for row in await conn.fetch(_TOO_MANY, session.user_id, now, SESSIONS_MAX):
        oldest = str(row["session_id"])
        await revoke(conn, redis, session.user_id, session_id=oldest, reason="TOO_MANY_SESSIONS", now=now)


async def restore(pool: Pool, redis: Redis, session_id: str, now: datetime) -> bool:
    """Re-create the key that Redis has lost. False when the session is over."""
    async with pool.acquire() as conn, conn.transaction():
        row = await conn.fetchrow(_LOCK_GOOD, session_id, now)
        if row is None:
            return False
        await _mirror(redis, _session(row))
        return True


@dataclass(frozen=True)
class Rotation:
    """A session, the SHA-256 of the refresh token that is good for it now, and since when that is."""

    session: Session
    token_hash: str
    at: datetime


async def rotate(
    pool: Pool,
    redis: Redis,
    session_id: str,
    token_hash: str,
    *,
    next_hashes: Sequence[str],
    is_ours: bool,
    now: datetime,
) -> Rotation:
    """Exchange a refresh token for the next one and prolong the session by seven days, up to thirty in all.

    The one before, within REFRESH_REPEATED, gets the same again if the next one is in `next_hashes`. Any other that
    `is_ours` was stolen, or its successor was, and revokes the session; one that is not changes nothing.
    Raises Problem UNAUTHENTICATED, CREDENTIAL_….
    """
    async with pool.acquire() as conn, conn.transaction():
        row = await conn.fetchrow(_LOCK_WITH_CREDENTIAL, session_id, PASSWORD_CREDENTIAL, now)
        if row is None:
            raise Problem("UNAUTHENTICATED", "The session is over; sign in again")
        if hmac.compare_digest(row["refresh_token_hash"], token_hash):
            require_usable_credential(row["status"], row["credential_expires_at"], now)
            return await _rotate(conn, redis, row, next_hashes[0], now)
        if _is_repeated(row, token_hash, next_hashes, now):
            require_usable_credential(row["status"], row["credential_expires_at"], now)
            return Rotation(_session(row), row["refresh_token_hash"], row["rotated_at"])
        if is_ours:
            await revoke(conn, redis, row["user_id"], session_id=session_id, reason="REFRESH_TOKEN_REUSED", now=now)
    if is_ours:
        raise Problem("UNAUTHENTICATED", "The refresh token was used before: the session is revoked")
    raise Problem("UNAUTHENTICATED", "The refresh token is not valid")


async def _rotate(conn: Connection, redis: Redis, row: asyncpg.Record, next_hash: str, now: datetime) -> Rotation:
    expires_at = min(now + SESSION_LIFETIME, row["created_at"] + SESSION_LIFETIME_MAX)
    session = replace(_session(row, expires_at), roles=list(row["roles_now"]))
    await conn.execute(_ROTATE, session.session_id, next_hash, session.roles, expires_at, now)
    await _mirror(redis, session)
    return Rotation(session, next_hash, now)


def _is_repeated(row: asyncpg.Record, token_hash: str, next_hashes: Sequence[str], now: datetime) -> bool:
    previous = row["previous_token_hash"]
    return (
        previous is not None
        and hmac.compare_digest(previous, token_hash)
        and now - row["rotated_at"] <= REFRESH_REPEATED
        and row["refresh_token_hash"] in next_hashes
    )


async def revoke(
    conn: Connection,
    redis: Redis,
    user_id: int,
    *,
    session_id: str | None,
    reason: str,
    now: datetime,
    but: str | None = None,
) -> list[str]:
    """End one session of the user, or all of them but one when `session_id` is None; the ids of those that ended.

    Runs in the caller's transaction.
    """
    revoked = [str(row["session_id"]) for row in await conn.fetch(_REVOKE, user_id, session_id, now, reason, but)]
    if revoked:
        await emit(conn, [AuthSessionRevoked(each, str(user_id), reason) for each in revoked])
        await _forget(redis, revoked)
    return revoked


async def opened_at(pool: Pool, session_id: str) -> datetime | None:
    """When somebody signed in with this session, with a password: refreshing it proves less."""
    moment: datetime | None = await pool.fetchval(_OPENED_AT, session_id)
    return moment


async def good_sessions(pool: Pool, user_id: int, now: datetime, after: str | None, limit: int) -> list[Session]:
    """The user's sessions that are neither revoked nor expired, newest first, from the one that follows `after` on."""
    return [_session(row) for row in await pool.fetch(_LIST_GOOD, user_id, now, after, limit)]


async def forget_sessions(conn: Connection, kept: timedelta, limit: int) -> int:
    """Delete up to `limit` sessions that ended more than `kept` ago; how many it was."""
    status = await conn.execute(_FORGET_ENDED, kept, limit)
    return int(status.removeprefix("DELETE "))


async def _mirror(redis: Redis, session: Session) -> None:
    value = {
        "userId": str(session.user_id),
        "roles": session.roles,
        "ip": session.ip,
        "deviceFingerprint": session.device_fingerprint,
    }
    await redis.set(session_key(session.session_id), json.dumps(value), exat=session.expires_at)


async def _forget(redis: Redis, session_ids: Sequence[str]) -> None:
    # Before the commit: if that fails, the next request restores the keys; after it, a crash would leave them behind.
    async with redis.pipeline(transaction=False) as pipeline:
        pipeline.delete(*map(session_key, session_ids))
        for session_id in session_ids:
            pipeline.publish(REVOKED_CHANNEL, session_id)
        await pipeline.execute()


def _session(row: asyncpg.Record | dict[str, Any], expires_at: datetime | None = None) -> Session:
    return Session(
        session_id=str(row["session_id"]),
        user_id=row["user_id"],
        roles=list(row["roles"]),
        ip=str(row["ip"]) if row["ip"] is not None else None,
        device_fingerprint=row["device_fingerprint"],
        created_at=row["created_at"],
        expires_at=expires_at or row["expires_at"],
    )

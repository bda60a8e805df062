"""Users' credentials in the hands of operators: lock, unlock, demand a new password."""

import logging
from datetime import UTC, datetime
from typing import Annotated, Literal

from fastapi import APIRouter, Path

from activities.identity.api_keys import keys_of, tell_key_changed
from activities.identity.auth import set_status
from activities.identity.sessions import revoke
from api.edge.gateway import Admin
from api.schema.models import ApiModel, Timestamp, UserId
from api.schema.openapi import problems
from api.state import AppState, State
from domain.identity import Identity
from domain.problems import Problem

log = logging.getLogger(__name__)

router = APIRouter(prefix="/api/admin/users", tags=["admin"])
UserIdInPath = Annotated[UserId, Path(alias="userId")]


class CredentialStateResponse(ApiModel):
    """LOCKED and EXPIRED open no session; `expiresAt` is when an ACTIVE one will have expired."""

    user_id: UserId
    status: Literal["ACTIVE", "LOCKED", "EXPIRED"]
    expires_at: Timestamp | None


@router.post("/{userId}/lock", responses=problems("NOT_FOUND"))
async def lock(state: State, admin: Admin, user_id: UserIdInPath) -> CredentialStateResponse:
    """Lock a user out until `unlock`: no sign-in, no refresh; open sessions, sockets and API keys stop at once."""
    return await _put(state, admin, user_id, "LOCKED")


@router.post("/{userId}/unlock", responses=problems("NOT_FOUND"))
async def unlock(state: State, admin: Admin, user_id: UserIdInPath) -> CredentialStateResponse:
    """Take back a lock and expiry, and forget all failures at the account."""
    return await _put(state, admin, user_id, "ACTIVE")


@router.post("/{userId}/expire", responses=problems("NOT_FOUND"))
async def expire(state: State, admin: Admin, user_id: UserIdInPath) -> CredentialStateResponse:
    """Demand a new password (`POST /api/auth/password/renew`): the old one opens and prolongs no session."""
    return await _put(state, admin, user_id, "EXPIRED")


async def _put(
    state: AppState, admin: Identity, user_id: int, status: Literal["ACTIVE", "LOCKED", "EXPIRED"]
) -> CredentialStateResponse:
    async with state.pool.acquire() as conn, conn.transaction():
        credential = await set_status(conn, user_id, status)
        if credential is None:
            raise Problem("NOT_FOUND", f"User {user_id} has no password")
        if status == "LOCKED":
            await revoke(conn, state.redis, user_id, session_id=None, reason="LOCKED", now=datetime.now(UTC))
    if status == "ACTIVE":
        await state.throttle.forget(credential.email)
    await tell_key_changed(state.redis, *[key.key_id for key in await keys_of(state.pool, user_id)])
    log.warning("operator %d has made the credential of user %d %s", admin.user_id, user_id, status)
    return CredentialStateResponse(user_id=user_id, status=status, expires_at=credential.expires_at)

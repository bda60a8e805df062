"""Passwords at the door: every check is throttled, audited and logged, whichever route asks for it."""

import logging
from datetime import datetime
from typing import Annotated

from fastapi import Depends, Request

from activities.identity.auth import (
    DEVICE_LENGTH_MAX,
    Device,
    PasswordCredential,
    audit_login,
    find_password,
    find_password_of,
)
from activities.identity.sessions import opened_at
from api.identity.addresses import client_address
from api.limits.login_throttle import Place
from api.state import AppState
from domain.identity import PROOF_LIFETIME, Identity, require_usable_credential
from domain.problems import Problem

log = logging.getLogger(__name__)


def device_of(request: Request) -> Device:
    """Where the request comes from. The headers say what the client likes: they are kept, never trusted."""
    agent = request.headers.get("user-agent", "")[:DEVICE_LENGTH_MAX] or None
    fingerprint = request.headers.get("x-device-fingerprint", "")[:DEVICE_LENGTH_MAX] or agent
    return Device(client_address(request.scope), agent, fingerprint)


ClientDevice = Annotated[Device, Depends(device_of)]


async def require_fresh_proof(
    state: AppState, user: Identity, password: str | None, device: Device, now: datetime
) -> None:
    """Let through only whoever knows the password: gives it now, or has signed in within PROOF_LIFETIME. An access
    token that was stolen later is not enough. Raises Problem PASSWORD_NEEDED, INVALID_CREDENTIALS, CREDENTIAL_…."""
    if password is None:
        opened = await opened_at(state.pool, user.session_id)
        if opened is None or now - opened > PROOF_LIFETIME:
            raise Problem("PASSWORD_NEEDED", "Send the password along, or sign in anew")
        return
    credential = await find_password_of(state.pool, user.user_id)
    if credential is None:
        raise Problem("FORBIDDEN", "There is no password to prove")
    await verified(state, credential.email, password, device, Place(device.ip, user.session_id), now)


async def verified(
    state: AppState,
    email: str,
    password: str,
    device: Device,
    place: Place,
    now: datetime,
    *,
    may_be_expired: bool = False,
) -> PasswordCredential:
    """The credential that this password opens. Every attempt that fails is counted, audited and logged."""
    credential = await find_password(state.pool, email)
    try:
        matched = await _matches(state, email, password, credential, place)
        return _usable(credential, now, matched=matched, may_be_expired=may_be_expired)
    except Problem as problem:
        user_id = credential.user_id if credential else None
        await audit_login(state.pool, email=email, user_id=user_id, device=device, reason=problem.code)
        log.warning("sign-in from %s refused for user %s: %s", device.ip, user_id, problem.code)
        raise


async def _matches(
    state: AppState, email: str, password: str, credential: PasswordCredential | None, place: Place
) -> bool:
    attempt = await state.throttle.admit(email, place)
    try:
        matched = await state.passwords.matches(password, credential.secret_hash if credential else None)
    except Problem:
        await state.throttle.take_back(attempt)
        raise
    if matched:
        await state.throttle.succeeded(attempt)
    elif attempt.locks and credential is not None:
        log.error("user %d: %s is locked out after %d failures", credential.user_id, place.ip, attempt.failures)
    return matched


def _usable(
    credential: PasswordCredential | None, now: datetime, *, matched: bool, may_be_expired: bool
) -> PasswordCredential:
    # One answer for both: nobody learns which addresses have an account.
    if credential is None or not matched:
        raise Problem("INVALID_CREDENTIALS", "Wrong email or password")
    try:
        require_usable_credential(credential.status, credential.expires_at, now)
    except Problem as problem:
        if not (may_be_expired and problem.code == "CREDENTIAL_EXPIRED"):
            raise
    return credential

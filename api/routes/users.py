"""Users: registration and one's own account."""

import asyncio
import logging
from typing import Annotated

from fastapi import APIRouter, Depends
from pydantic import AfterValidator, Field, ValidationInfo, field_validator
from temporalio.client import WorkflowFailureError
from temporalio.common import SearchAttributePair, TypedSearchAttributes, WorkflowIDConflictPolicy
from temporalio.service import RPCError

from activities.identity.users import find_account, prepare_registration, require_email_free
from api.edge.gateway import User, limit_sign_ins
from api.schema.models import ApiModel, RequestModel, Timestamp, UserId
from api.schema.openapi import problems
from api.state import AppState, State
from domain.contracts.queues import OPERATIONS_QUEUE
from domain.contracts.registration import USER_REGISTRATION, Registration, registration_workflow_id
from domain.contracts.search import USER_ID
from domain.identity import EMAIL_LENGTH_MAX, PASSWORD_LENGTH_MAX, PASSWORD_LENGTH_MIN, valid_email
from domain.passwords import good_password
from domain.problems import Problem

log = logging.getLogger(__name__)

REGISTRATION_SECONDS_MAX = 5.0

router = APIRouter(prefix="/api/users", tags=["users"])


class UserRegisterRequest(RequestModel):
    """A new user."""

    email: Annotated[str, Field(max_length=EMAIL_LENGTH_MAX), AfterValidator(valid_email)]
    password: str = Field(min_length=PASSWORD_LENGTH_MIN, max_length=PASSWORD_LENGTH_MAX, repr=False)

    @field_validator("password")
    @classmethod
    def _not_common(cls, password: str, others: ValidationInfo) -> str:
        return good_password(password, others.data.get("email", ""))


class UserResponse(ApiModel):
    """An account; `status` is PREPARE, ACTIVE or FAILED."""

    user_id: UserId
    email: str
    status: str
    created_at: Timestamp


@router.post("", dependencies=[Depends(limit_sign_ins)], responses=problems("EMAIL_ALREADY_EXISTS"))
async def register(request: UserRegisterRequest, state: State) -> UserResponse:
    """Register a user; 400 when the email is taken, 500 when the credential could not be created in time."""
    await require_email_free(state.pool, request.email)
    secret_hash = await state.passwords.hash(request.password)
    user_id = await prepare_registration(state.pool, request.email, secret_hash)
    await _finish_registration(state, user_id)
    return await _account(state, user_id)


@router.get("/me", responses=problems("NOT_FOUND"))
async def me(user: User, state: State) -> UserResponse:
    """One's own account."""
    return await _account(state, user.user_id)


async def _finish_registration(state: AppState, user_id: int) -> None:
    # The row is committed: whatever happens from here on, the workflow or the sweep finishes the registration.
    try:
        async with asyncio.timeout(REGISTRATION_SECONDS_MAX):
            handle = await state.temporal.start_workflow(
                USER_REGISTRATION,
                Registration(user_id),
                id=registration_workflow_id(user_id),
                task_queue=OPERATIONS_QUEUE,
                id_conflict_policy=WorkflowIDConflictPolicy.USE_EXISTING,
                static_summary=f"Registers user {user_id}",
                search_attributes=TypedSearchAttributes([SearchAttributePair(USER_ID, str(user_id))]),
            )
            await handle.result()
    except (TimeoutError, WorkflowFailureError, RPCError) as error:
        log.warning("registration of user %d is not finished: %r", user_id, error)
        detail = "The credential is not created yet; it will be retried, so try to sign in later"
        raise Problem("REMOTE_SERVICE_ERROR", detail, userId=str(user_id)) from error


async def _account(state: AppState, user_id: int) -> UserResponse:
    account = await find_account(state.pool, user_id)
    if account is None:
        raise Problem("NOT_FOUND", "There is no such user")
    return UserResponse(
        user_id=account.user_id, email=account.email, status=account.status, created_at=account.created_at
    )

"""The users service: accounts, and registrations that wait for their credential."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from temporalio import activity
from temporalio.client import (
    Schedule,
    ScheduleActionStartWorkflow,
    ScheduleIntervalSpec,
    ScheduleOverlapPolicy,
    SchedulePolicy,
    ScheduleSpec,
)

from domain.contracts.queues import OPERATIONS_QUEUE
from domain.contracts.registration import (
    COMPLETE_REGISTRATION,
    FAIL_REGISTRATION,
    REGISTRATION_RESUMER,
    REGISTRATION_STALLED_AFTER,
    REGISTRATION_SWEEP_MAX,
    STALLED_REGISTRATIONS,
    FailedRegistration,
    Registration,
    StalledRegistrations,
)
from domain.identity import ADMIN_ROLE, USER_ROLE
from domain.problems import Problem
from storage.db import Connection, Pool
from telemetry.alerts import REGISTRATION_FAILED, alert

RESUMER_SCHEDULE_ID = "registration-resumer"
RESUMER_SCHEDULE = Schedule(
    action=ScheduleActionStartWorkflow(
        REGISTRATION_RESUMER,
        id=RESUMER_SCHEDULE_ID,
        task_queue=OPERATIONS_QUEUE,
        static_summary="Restarts registrations whose workflow is gone",
    ),
    spec=ScheduleSpec(intervals=[ScheduleIntervalSpec(every=timedelta(minutes=1))]),
    policy=SchedulePolicy(overlap=ScheduleOverlapPolicy.SKIP, catchup_window=timedelta(minutes=1)),
)

_EMAIL_TAKEN = "SELECT EXISTS (SELECT FROM users.users WHERE lower(email) = lower($1) AND status <> 'FAILED')"
_INSERT = """
WITH created AS (
    INSERT INTO users.users (email) VALUES ($1)
    ON CONFLICT (lower(email)) DO UPDATE SET status = 'PREPARE', updated_at = now() WHERE users.status = 'FAILED'
    RETURNING user_id
)
INSERT INTO users.user_registration_prepare (user_id, secret_hash) SELECT user_id, $2 FROM created
ON CONFLICT (user_id) DO UPDATE
SET status = 'PREPARE', secret_hash = excluded.secret_hash, attempts = 0, last_error = NULL, created_at = now(),
    updated_at = now()
RETURNING user_id
"""
_FIND = "SELECT user_id, email, status, created_at FROM users.users WHERE user_id = $1"
# A registration that was given up and is run again by an operator starts counting anew.
_TAKE = """
UPDATE users.user_registration_prepare
SET attempts = CASE status WHEN 'FAILED' THEN 1 ELSE attempts + 1 END, status = 'PREPARE', updated_at = now()
WHERE user_id = $1 AND status <> 'COMPLETED'
RETURNING attempts, secret_hash
"""
_COMPLETE = """
WITH completed AS (
    UPDATE users.user_registration_prepare
    SET status = 'COMPLETED', secret_hash = NULL, last_error = NULL, updated_at = now()
    WHERE user_id = $1 AND status <> 'COMPLETED'
    RETURNING user_id
)
UPDATE users.users SET status = 'ACTIVE', updated_at = now() WHERE user_id = (SELECT user_id FROM completed)
"""
_FAIL = """
WITH failed AS (
    UPDATE users.user_registration_prepare SET status = 'FAILED', last_error = $2, updated_at = now()
    WHERE user_id = $1 AND status = 'PREPARE'
    RETURNING user_id
)
UPDATE users.users SET status = 'FAILED', updated_at = now() WHERE user_id = (SELECT user_id FROM failed)
"""
_STALLED = """
SELECT user_id FROM users.user_registration_prepare
WHERE status = 'PREPARE' AND created_at < $1 ORDER BY created_at LIMIT $2
"""
_FIRST_OPERATOR = "SELECT user_id, email FROM users.users WHERE $1 = ANY(roles) ORDER BY user_id LIMIT 1"
_ADD_OPERATOR = """
INSERT INTO users.users (email, status, roles) VALUES ($1, 'ACTIVE', $2) ON CONFLICT (lower(email)) DO NOTHING
RETURNING user_id
"""
# Whoever starts the exchange twice at once makes one operator.
_LOCK_OPERATORS = "SELECT pg_advisory_xact_lock(hashtext('users.first_operator'))"


@dataclass(frozen=True)
class Account:
    """What a user may know of their account."""

    user_id: int
    email: str
    status: str
    created_at: datetime


@dataclass(frozen=True)
class PendingCredential:
    """The hash a registration waits to hand over, and how often that was tried, this time included."""

    attempts: int
    secret_hash: str


async def require_email_free(pool: Pool, email: str) -> None:
    """Raise Problem EMAIL_ALREADY_EXISTS when a user has this address, or a registration under way."""
    if await pool.fetchval(_EMAIL_TAKEN, email):
        raise Problem("EMAIL_ALREADY_EXISTS", "A user with this email exists already")


async def prepare_registration(pool: Pool, email: str, secret_hash: str) -> int:
    """Create the user and its registration, both PREPARE; the id. One that has FAILED begins anew, with this password.

    Raises Problem EMAIL_ALREADY_EXISTS.
    """
    user_id: int | None = await pool.fetchval(_INSERT, email, secret_hash)
    if user_id is None:
        raise Problem("EMAIL_ALREADY_EXISTS", "A user with this email exists already")
    return user_id


async def find_account(pool: Pool, user_id: int) -> Account | None:
    """The account, or None when there is no such user."""
    row = await pool.fetchrow(_FIND, user_id)
    return Account(**row) if row is not None else None


async def take_pending_credential(pool: Pool, user_id: int) -> PendingCredential | None:
    """Count one more attempt and hand out the hash; None when nothing is left to do for this user."""
    row = await pool.fetchrow(_TAKE, user_id)
    return PendingCredential(**row) if row is not None else None


async def first_operator(conn: Connection) -> tuple[int, str] | None:
    """Id and address of the operator that was made first, if there is any; no other is made until the caller's
    transaction ends."""
    await conn.execute(_LOCK_OPERATORS)
    row = await conn.fetchrow(_FIRST_OPERATOR, ADMIN_ROLE)
    return (row["user_id"], row["email"]) if row is not None else None


async def add_operator(conn: Connection, email: str) -> int:
    """Create an active operator; the id. Raises Problem EMAIL_ALREADY_EXISTS: no account becomes an operator's."""
    user_id: int | None = await conn.fetchval(_ADD_OPERATOR, email, [USER_ROLE, ADMIN_ROLE])
    if user_id is None:
        raise Problem("EMAIL_ALREADY_EXISTS", "A user with this email exists already")
    return user_id


class UserActivities:
    """The users service's steps of the registration workflows."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    @activity.defn(name=COMPLETE_REGISTRATION)
    async def complete_registration(self, registration: Registration) -> None:
        """The credential exists: the user is ACTIVE, and the hash is forgotten here."""
        await self._pool.execute(_COMPLETE, registration.user_id)

    @activity.defn(name=FAIL_REGISTRATION)
    async def fail_registration(self, failed: FailedRegistration) -> None:
        """Give the registration up and tell the operators. The hash stays, for them to run it again."""
        await self._pool.execute(_FAIL, failed.user_id, failed.error)
        alert(REGISTRATION_FAILED, "registration of user %d failed: %s", failed.user_id, failed.error)

    @activity.defn(name=STALLED_REGISTRATIONS)
    async def stalled_registrations(self) -> StalledRegistrations:
        """The registrations that wait for too long, oldest first, at most `REGISTRATION_SWEEP_MAX`."""
        before = datetime.now(UTC) - REGISTRATION_STALLED_AFTER
        rows = await self._pool.fetch(_STALLED, before, REGISTRATION_SWEEP_MAX)
        return StalledRegistrations([row["user_id"] for row in rows])

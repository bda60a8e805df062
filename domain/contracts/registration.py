"""Names and messages of the registration workflows."""

from dataclasses import dataclass
from datetime import timedelta

USER_REGISTRATION = "UserRegistrationWorkflow"
REGISTRATION_RESUMER = "RegistrationResumerWorkflow"
CREATE_CREDENTIALS = "auth.create_credentials"
COMPLETE_REGISTRATION = "users.complete_registration"
FAIL_REGISTRATION = "users.fail_registration"
STALLED_REGISTRATIONS = "users.stalled_registrations"
# Tries of the credential store, over all runs of a registration, before it is FAILED: about five minutes.
REGISTRATION_ATTEMPTS_MAX = 25
# A younger PREPARE row may still be on its way from the API to its workflow.
REGISTRATION_STALLED_AFTER = timedelta(seconds=10)
REGISTRATION_SWEEP_MAX = 500


@dataclass(frozen=True)
class Registration:
    """The user whose credential is to be created; the password's hash stays in its row."""

    user_id: int


@dataclass(frozen=True)
class FailedRegistration:
    """A registration that is given up, and why."""

    user_id: int
    error: str


@dataclass(frozen=True)
class StalledRegistrations:
    """Users that have waited for their credential for longer than `REGISTRATION_STALLED_AFTER`."""

    user_ids: list[int]


def registration_workflow_id(user_id: int) -> str:
    """The one workflow that registers this user."""
    return f"registration-{user_id}"

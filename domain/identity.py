"""Who a caller is."""

import re
from dataclasses import dataclass
from datetime import datetime, timedelta

from domain.problems import Problem

USER_ROLE = "user"
ADMIN_ROLE = "admin"
# Given to callers that present the service token; never stored with a user.
INTERNAL_ROLE = "internal"
PASSWORD_CREDENTIAL = "PASSWORD"
EMAIL_LENGTH_MAX = 254
PASSWORD_LENGTH_MIN = 8
PASSWORD_LENGTH_MAX = 128
ACCESS_TOKEN_LIFETIME = timedelta(minutes=15)
# Since it was last refreshed; and since it was opened, however often it was refreshed.
SESSION_LIFETIME = timedelta(days=7)
SESSION_LIFETIME_MAX = timedelta(days=30)
# For so long after a password was shown nothing asks for it again.
PROOF_LIFETIME = timedelta(minutes=5)
# Of one user; the oldest gives way.
SESSIONS_MAX = 100
# For so long a refresh gets the same answer again: its answer was lost, or two tabs asked.
REFRESH_REPEATED = timedelta(seconds=30)

_EMAIL = re.compile(r"[^@\s]+@[^@\s.]+(\.[^@\s.]+)+")


@dataclass(frozen=True, slots=True)
class Identity:
    """An authenticated caller, by session or by API key. A service has neither, user id 0 and the role `internal`."""

    user_id: int
    roles: frozenset[str]
    session_id: str
    key_id: str = ""
    # What an API key may trade; none: all.
    instruments: frozenset[str] = frozenset()

    def may_trade(self, instrument_id: str) -> bool:
        """Whether this caller may change something about an instrument."""
        return not self.instruments or instrument_id in self.instruments

    @property
    def is_admin(self) -> bool:
        """Whether this is an operator."""
        return ADMIN_ROLE in self.roles

    @property
    def is_internal(self) -> bool:
        """Whether this is one of our own services."""
        return INTERNAL_ROLE in self.roles

    def may_act_for(self, user_id: int) -> bool:
        """Whether what belongs to `user_id` may be shown to this caller."""
        return self.user_id == user_id or self.is_admin or self.is_internal


SERVICE = Identity(user_id=0, roles=frozenset({INTERNAL_ROLE}), session_id="")


def normalised_email(email: str) -> str:
    """`email` in the form in which addresses are compared and stored: trimmed, lower case."""
    return email.strip().lower()


def valid_email(email: str) -> str:
    """`email`, normalised. Raises ValueError when it has not the form of an address."""
    address = normalised_email(email)
    if len(address) > EMAIL_LENGTH_MAX or not _EMAIL.fullmatch(address) or not address.isprintable():
        raise ValueError("must be an email address")
    return address


def require_usable_credential(status: str, expires_at: datetime | None, now: datetime) -> None:
    """Raise Problem CREDENTIAL_LOCKED or CREDENTIAL_EXPIRED unless a credential in this state may be used."""
    if status == "LOCKED":
        raise Problem("CREDENTIAL_LOCKED", "The credential is locked")
    if status == "EXPIRED" or (expires_at is not None and expires_at <= now):
        raise Problem("CREDENTIAL_EXPIRED", "The credential has expired")

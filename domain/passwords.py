"""Which passwords are refused: those that everybody tries first."""

from zxcvbn.frequency_lists import FREQUENCY_LISTS

from domain.identity import PASSWORD_LENGTH_MAX, PASSWORD_LENGTH_MIN

# The 30,000 most frequent passwords of public leaks, as far as their length would be allowed.
COMMON = frozenset(word for word in FREQUENCY_LISTS["passwords"] if len(word) >= PASSWORD_LENGTH_MIN)


def good_password(password: str, email: str) -> str:
    """`password`, unchanged. Raises ValueError when its length is not allowed or it is too easily guessed."""
    if not PASSWORD_LENGTH_MIN <= len(password) <= PASSWORD_LENGTH_MAX:
        raise ValueError(f"must have {PASSWORD_LENGTH_MIN} to {PASSWORD_LENGTH_MAX} characters")
    lowered = password.lower()
    if lowered in COMMON or len(set(lowered)) == 1:
        raise ValueError("must not be one of the most common passwords")
    if email and lowered in (email.lower(), email.lower().partition("@")[0]):
        raise ValueError("must not be the email address")
    return password

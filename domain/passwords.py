"""Which passwords are refused: those that everybody tries first."""

import re

from zxcvbn.frequency_lists import FREQUENCY_LISTS

from domain.identity import PASSWORD_LENGTH_MAX, PASSWORD_LENGTH_MIN

# The most frequent passwords of public leaks, words and names, as far as their length would be allowed.
COMMON = frozenset(word for words in FREQUENCY_LISTS.values() for word in words if len(word) >= PASSWORD_LENGTH_MIN)
# Shorter parts of an address are in many a good password by chance.
NAME_LENGTH_MIN = 4
_OURS = ("exchange", "saga")
_WORDS = re.compile(r"[^\W_]+")


def good_password(password: str, email: str) -> str:
    """`password`, unchanged. Raises ValueError when its length is not allowed or it is too easily guessed."""
    if not PASSWORD_LENGTH_MIN <= len(password) <= PASSWORD_LENGTH_MAX:
        raise ValueError(f"must have {PASSWORD_LENGTH_MIN} to {PASSWORD_LENGTH_MAX} characters")
    lowered = password.lower()
    if lowered in COMMON or len(set(lowered)) == 1:
        raise ValueError("must not be one of the most common passwords")
    if lowered in email.lower() or len(_without_names(lowered, email.lower())) < PASSWORD_LENGTH_MIN:
        raise ValueError("must not be little more than the email address, a name in it, or ours")
    return password


def _without_names(password: str, email: str) -> str:
    local = email.partition("@")[0]
    names = {email, local, *_WORDS.findall(email), *_OURS}
    # The longest first: it contains others.
    for name in sorted(names, key=lambda name: (-len(name), name)):
        if len(name) >= NAME_LENGTH_MIN:
            password = password.replace(name, "")
    return password

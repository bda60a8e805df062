"""Which passwords are refused."""

import pytest

from domain.passwords import COMMON, good_password


@pytest.mark.parametrize(
    ("password", "email"),
    [
        ("alice.smith", "alice.smith@example.com"),
        ("Alice.Smith@Example.com", "alice.smith@example.com"),
        ("smith1234", "alice.smith@example.com"),
        ("2026example", "alice@example.com"),
        ("Exchange2026", "a@b.co"),
        ("saga-exchange", "a@b.co"),
        ("aaaaaaaaaa", "a@b.co"),
        ("PASSWORD1", "a@b.co"),
        # Words and names, not only passwords that leaked.
        ("television", "a@b.co"),
        ("Christopher", "a@b.co"),
        ("short", "a@b.co"),
        ("x" * 129, "a@b.co"),
    ],
)
def test_what_is_guessed_first_is_refused(password: str, email: str) -> None:
    with pytest.raises(ValueError, match="must"):
        good_password(password, email)


@pytest.mark.parametrize(
    ("password", "email"),
    [
        ("correct horse battery", "alice@example.com"),
        ("alice likes horses", "alice@example.com"),
        # A part of two letters is in many a password by chance.
        ("turquoise-lamb", "qu@amb.io"),
        ("kT9#vexq", "a@b.co"),
    ],
)
def test_others_are_taken_as_they_are(password: str, email: str) -> None:
    assert good_password(password, email) == password


def test_the_list_is_a_large_one() -> None:
    assert len(COMMON) > 40_000

"""Emails, passwords and who may see what."""

import asyncio
from datetime import UTC, datetime, timedelta

import pytest
from argon2 import PasswordHasher

from api.identity import passwords
from api.identity.passwords import Passwords, is_argon2id
from domain.identity import SERVICE, Identity, require_usable_credential, valid_email
from domain.problems import Problem

NOW = datetime(2026, 3, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    ("given", "stored"),
    [
        ("alice@example.com", "alice@example.com"),
        (" Alice@Example.COM\n", "alice@example.com"),
        ("o'brien+tag@mail.example.co.uk", "o'brien+tag@mail.example.co.uk"),
        ("用戶@例子.台灣", "用戶@例子.台灣"),
    ],
)
def test_an_address_is_stored_trimmed_and_in_lower_case(given: str, stored: str) -> None:
    assert valid_email(given) == stored


@pytest.mark.parametrize(
    "given",
    ["", "alice", "@example.com", "alice@", "alice@example", "a@b@c.de", "a b@c.de", "a@.de", "a@c..de", "a\x07@c.de"],
)
def test_what_has_not_the_form_of_an_address_is_refused(given: str) -> None:
    with pytest.raises(ValueError, match="email address"):
        valid_email(given)


def test_users_act_for_themselves_operators_and_services_for_all() -> None:
    alice, admin = Identity(1, frozenset({"user"}), "s"), Identity(2, frozenset({"user", "admin"}), "s")
    assert (alice.may_act_for(1), alice.may_act_for(2)) == (True, False)
    assert admin.may_act_for(1)
    assert SERVICE.may_act_for(1)


@pytest.mark.parametrize(
    ("status", "expires_at", "code"),
    [
        ("LOCKED", None, "CREDENTIAL_LOCKED"),
        ("EXPIRED", None, "CREDENTIAL_EXPIRED"),
        ("ACTIVE", NOW, "CREDENTIAL_EXPIRED"),
    ],
)
def test_a_locked_or_expired_credential_is_not_usable(status: str, expires_at: datetime | None, code: str) -> None:
    with pytest.raises(Problem) as raised:
        require_usable_credential(status, expires_at, NOW)
    assert raised.value.code == code


def test_an_active_credential_is_usable_until_it_expires() -> None:
    require_usable_credential("ACTIVE", None, NOW)
    require_usable_credential("ACTIVE", NOW + timedelta(seconds=1), NOW)


async def test_a_password_matches_its_own_hash_only() -> None:
    vault = Passwords()
    secret_hash = await vault.hash("correct horse")
    assert secret_hash.startswith("$argon2id$v=19$m=47104,t=1,p=1$")
    assert await vault.matches("correct horse", secret_hash)
    assert not await vault.matches("Correct horse", secret_hash)
    assert not await vault.matches("correct horse", None)
    assert not await vault.matches("correct horse", "damaged")
    vault.close()


async def test_a_hash_with_other_parameters_still_matches_and_is_outdated() -> None:
    vault = Passwords()
    old = PasswordHasher(memory_cost=8192, time_cost=1, parallelism=1).hash("correct horse")
    assert await vault.matches("correct horse", old)
    assert vault.outdated(old)
    assert not vault.outdated(await vault.hash("correct horse"))
    vault.close()


async def test_too_many_waiting_passwords_are_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passwords, "WAITING_MAX", 3)
    vault = Passwords()
    answers = await asyncio.gather(*(vault.hash("correct horse") for _ in range(5)), return_exceptions=True)
    refused = [answer.code for answer in answers if isinstance(answer, Problem)]
    assert refused == ["OVERLOADED", "OVERLOADED"]
    assert await vault.hash("correct horse")
    vault.close()


def test_only_argon2id_hashes_are_taken() -> None:
    hasher = PasswordHasher(memory_cost=8192, time_cost=1, parallelism=1)
    assert is_argon2id(hasher.hash("x"))
    assert not is_argon2id(hasher.hash("x").replace("argon2id", "argon2i"))
    assert not is_argon2id("$2b$12$bcrypt")

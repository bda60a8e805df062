"""Access tokens: only ours, only for us, only as long as they last."""

import base64
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from api.identity import tokens
from api.identity.tokens import AUDIENCE, ISSUER, AccessTokens, key_id, load_keys
from domain.identity import Identity
from domain.problems import Problem

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
OLDER = Ed25519PrivateKey.from_private_bytes(bytes(range(2, 34)))
RSA = generate_private_key(65537, 2048)
ALICE = Identity(1000, frozenset({"user"}), "6f1f1f5e-0000-4000-8000-000000000001")
MINUTE = timedelta(minutes=1)


def claims(**changes: object) -> dict[str, Any]:
    usual: dict[str, Any] = {
        "iss": ISSUER,
        "aud": AUDIENCE,
        "sub": "1000",
        "sid": ALICE.session_id,
        "roles": ["user"],
        "iat": int(NOW.timestamp()),
        "exp": int(NOW.timestamp()) + 900,
        "jti": "x",
    }
    changed = {**usual, **changes}
    return {name: value for name, value in changed.items() if value is not None}


def signed(
    body: dict[str, Any], *, key: Any = KEY, algorithm: str = "EdDSA", kid: str | None = None, typ: str = "at+jwt"
) -> str:
    return jwt.encode(body, key, algorithm=algorithm, headers={"typ": typ, "kid": kid or key_id(KEY)})


def unsigned(body: dict[str, Any]) -> str:
    parts = ({"alg": "none", "typ": "at+jwt", "kid": key_id(KEY)}, body)
    return ".".join(base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in parts) + "."


def refused(token: str, now: datetime = NOW) -> None:
    with pytest.raises(Problem) as raised:
        AccessTokens(KEY).verify(token, now)
    assert raised.value.code == "UNAUTHENTICATED"


def test_an_issued_token_names_its_user_session_and_roles() -> None:
    admin = Identity(7, frozenset({"user", "admin"}), ALICE.session_id)
    service = AccessTokens(KEY)
    assert service.verify(service.issue(admin, NOW), NOW + MINUTE) == admin


def test_an_issued_token_carries_the_agreed_header_and_claims() -> None:
    decoded = jwt.decode_complete(AccessTokens(KEY).issue(ALICE, NOW), options={"verify_signature": False})
    assert decoded["header"] == {"alg": "EdDSA", "typ": "at+jwt", "kid": key_id(KEY)}
    expected = claims(jti=decoded["payload"]["jti"])
    assert decoded["payload"] == expected
    assert len(decoded["payload"]["jti"]) >= 16


def test_the_tokens_of_this_test_are_accepted_unchanged() -> None:
    assert AccessTokens(KEY).verify(signed(claims()), NOW) == ALICE


@pytest.mark.parametrize("remembered", [True, False])
def test_a_token_ends_after_15_minutes_also_when_it_was_verified_before(*, remembered: bool) -> None:
    service = AccessTokens(KEY)
    token = service.issue(ALICE, NOW)
    if remembered:
        service.verify(token, NOW + 15 * MINUTE - timedelta(seconds=1))
    with pytest.raises(Problem, match="expired"):
        service.verify(token, NOW + 15 * MINUTE)


def test_algorithm_none_is_refused() -> None:
    refused(unsigned(claims()))


def test_a_key_that_is_not_ours_is_refused() -> None:
    refused(signed(claims(), key=Ed25519PrivateKey.generate()))


def test_our_public_key_used_as_an_hmac_secret_is_refused() -> None:
    public = KEY.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    refused(signed(claims(), key=public, algorithm="HS256"))


def test_another_signature_algorithm_is_refused() -> None:
    refused(signed(claims(), key=generate_private_key(65537, 2048), algorithm="RS256"))


def test_a_changed_payload_is_refused() -> None:
    header, _, signature = signed(claims()).split(".")
    _, payload, _ = signed(claims(roles=["user", "admin"])).split(".")
    refused(f"{header}.{payload}.{signature}")


@pytest.mark.parametrize("change", [{"aud": "another"}, {"aud": None}, {"iss": "another"}, {"iss": None}])
def test_a_token_for_or_from_somebody_else_is_refused(change: dict[str, object]) -> None:
    refused(signed(claims(**change)))


@pytest.mark.parametrize("claim", ["sub", "sid", "exp", "iat", "jti", "roles"])
def test_a_token_without_one_of_its_claims_is_refused(claim: str) -> None:
    refused(signed(claims(**{claim: None})))


@pytest.mark.parametrize("change", [{"sub": "alice"}, {"exp": "soon"}, {"roles": 5}])
def test_a_claim_of_the_wrong_kind_is_refused(change: dict[str, object]) -> None:
    refused(signed(claims(**change)))


def test_another_type_of_token_is_refused() -> None:
    refused(signed(claims(), typ="JWT"))


def test_another_key_id_is_refused() -> None:
    refused(signed(claims(), kid="other"))


@pytest.mark.parametrize("text", ["", "x", "a.b.c", "6f1f1f5e-0000-4000-8000-000000000001.secret", "é.é.é", "\ud800"])
def test_what_is_no_token_is_refused(text: str) -> None:
    refused(text)


def test_no_more_than_the_last_tokens_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "VERIFIED_MAX", 3)
    service = AccessTokens(KEY)
    issued = [service.issue(ALICE, NOW) for _ in range(5)]
    for token in issued:
        service.verify(token, NOW)
    assert list(service._verified) == issued[2:]


def test_the_key_id_is_the_rfc_8037_thumbprint() -> None:
    # Appendix A.1 and A.3 of RFC 8037.
    secret = base64.urlsafe_b64decode("nWGxne_9WmC6hEr0kuwsxERJxWl7MmkZcDusAxyuf2A=")
    assert key_id(Ed25519PrivateKey.from_private_bytes(secret)) == "kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k"


def test_the_first_key_of_a_file_signs_and_all_verify(tmp_path: Path) -> None:
    path, other = tmp_path / "keys.pem", Ed25519PrivateKey.generate()
    path.write_bytes(private_pem(KEY) + b"\nthe one of last year\n" + public_pem(other) + private_pem(OLDER))
    signing, others = load_keys(path)
    assert key_id(signing) == key_id(KEY)
    assert [key_id(key) for key in others] == [key_id(other), key_id(OLDER)]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (lambda: b"", "Expected a key"),
        (lambda: b"-----BEGIN PRIVATE KEY-----\n", "Expected a key"),
        (lambda: private_pem(RSA), "Expected an Ed25519 key"),
        (lambda: private_pem(KEY) + public_pem(RSA), "Expected an Ed25519 key"),
        (lambda: public_pem(KEY) + private_pem(KEY), "Expected a private key first"),
    ],
)
def test_a_file_without_a_key_to_sign_with_is_refused(tmp_path: Path, content: Callable[[], bytes], why: str) -> None:
    path = tmp_path / "keys.pem"
    path.write_bytes(content())
    with pytest.raises(ValueError, match=why):
        load_keys(path)


def private_pem(key: Ed25519PrivateKey | RSAPrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def public_pem(key: Ed25519PrivateKey | RSAPrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def test_keys_are_changed_without_anybody_noticing() -> None:
    old, new = KEY, Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33)))
    before = AccessTokens(old)
    announced = AccessTokens(old, [new.public_key()])
    after = AccessTokens(new, [old.public_key()])
    # While the processes are restarted one by one, those of two neighbouring steps run side by side.
    for issuer, verifiers in (
        (before, [before, announced]),
        (announced, [announced, after]),
        (after, [announced, after]),
    ):
        for verifier in verifiers:
            assert verifier.verify(issuer.issue(ALICE, NOW), NOW) == ALICE
    with pytest.raises(Problem):
        AccessTokens(new).verify(before.issue(ALICE, NOW), NOW)
    assert [key["kid"] for key in after.public_keys()] == [key_id(new), key_id(old)]
    assert all("d" not in key for key in after.public_keys())


def test_one_keys_name_does_not_open_what_another_signed() -> None:
    other = Ed25519PrivateKey.generate()
    service = AccessTokens(KEY, [other.public_key()])
    with pytest.raises(Problem):
        service.verify(signed(claims(), key=other, kid=key_id(KEY)), NOW)


def test_a_token_without_a_key_id_or_of_later_is_refused() -> None:
    refused(jwt.encode(claims(), KEY, algorithm="EdDSA", headers={"typ": "at+jwt"}))
    refused(signed(claims(nbf=int(datetime.now(UTC).timestamp()) + 3600)))

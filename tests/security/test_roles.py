"""Every route of the OpenAPI document refuses everybody whom its `security` does not name."""

import time

import pytest

from api.app import create_app
from settings import Settings
from tests.integration.identity_app import INTERNAL_TOKEN, Exchange
from tests.integration.test_identity_api_keys import Sign, make, signed
from tests.security.conftest import sign_in
from tests.security.document import Call, calls, undeclared

REFUSED = (401, 403)


def test_every_route_says_who_may_call_it() -> None:
    assert undeclared(create_app(Settings()).openapi()) == []


def test_a_new_route_that_does_not_say_so_is_noticed() -> None:
    app = create_app(Settings())

    @app.get("/api/orders/export")
    async def export() -> None: ...

    assert undeclared(app.openapi()) == ["GET /api/orders/export"]


def test_what_a_declaration_may_say_is_known_to_this_test() -> None:
    for call in calls(create_app(Settings()).openapi()):
        assert set(call.schemes) <= {"accessToken", "apiKey", "internalToken"}, call.name
        assert call.roles <= {"admin", "internal"}, call.name
        assert call.path.startswith("/api/admin/") <= (call.roles == {"admin"}), call.name


async def test_each_route_serves_whom_it_names_and_refuses_everybody_else(
    exchange: Exchange, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("activities.identity.api_keys.ACTIVE_KEYS_MAX", 10**6)
    admin_id = await exchange.add_user("root@example.com")
    for call in calls(exchange.app.openapi()):
        # Fresh ones for each call: some of them end sessions and keys.
        key_id, sign = await make(exchange, await sign_in(exchange, admin_id, "admin"))
        callers = {
            "anonymous": {},
            "stranger": {"Authorization": "Bearer x", "X-Internal-Token": "x"},
            "user": await sign_in(exchange, 1000),
            "internal": {"X-Internal-Token": INTERNAL_TOKEN},
            # Before the admin, who may end it.
            "key of an admin": _signed(call, key_id, sign),
            "admin": await sign_in(exchange, admin_id, "admin"),
        }
        for who, headers in callers.items():
            body = b"{}" if call.body is not None else b""
            answer = await exchange.client.request(
                call.method, call.url(), content=body, headers={**headers, "Content-Type": "application/json"}
            )
            # 503: nothing has a price here.
            assert answer.status_code < 500 or answer.status_code == 503, (call.name, who, answer.text)
            expected = _refusal(call, who)
            if expected is None:
                allowed = answer.status_code not in REFUSED or answer.json()["code"] == "INVALID_CREDENTIALS"
                assert allowed, (call.name, who, answer.text)
            else:
                assert answer.status_code == expected, (call.name, who, answer.text)


def _signed(call: Call, key_id: str, sign: Sign) -> dict[str, str]:
    body = b"{}" if call.body is not None else b""
    return signed(key_id, sign, call.method, call.url(), body, nonce=str(time.time_ns()))


def _refusal(call: Call, who: str) -> int | None:
    """The status with which this caller must be refused; None: is served."""
    if call.security == []:
        return None
    scheme = {"user": "accessToken", "admin": "accessToken", "internal": "internalToken", "key of an admin": "apiKey"}
    if call.roles == {"internal"}:
        # Known, and not the right one.
        return {"internal": None, "anonymous": 401, "stranger": 401}.get(who, 403)
    if scheme.get(who) not in call.schemes:
        return 401
    return 403 if call.roles == {"admin"} and who == "user" else None

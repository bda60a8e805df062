"""Registration: the API, its workflow, the sweep, and a credential store that is away."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import pytest_asyncio
from redis.asyncio import Redis
from temporalio.client import Client, WorkflowFailureError
from temporalio.exceptions import ApplicationError

from activities.identity.auth import AuthActivities
from activities.identity.users import RESUMER_SCHEDULE, RESUMER_SCHEDULE_ID, UserActivities, prepare_registration
from domain.contracts.queues import OPERATIONS_QUEUE
from domain.contracts.registration import (
    REGISTRATION_ATTEMPTS_MAX,
    REGISTRATION_RESUMER,
    USER_REGISTRATION,
    Registration,
    registration_workflow_id,
)
from settings import Settings
from storage.db import Pool
from tests.integration.identity_app import (
    INTERNAL_TOKEN,
    PASSWORD,
    Exchange,
    complete,
    operations_worker,
    running_exchange,
)
from tests.replay import replay, save_history
from tests.sagas import details
from workflows.registration import WORKFLOWS

HASH = "$argon2id$v=19$m=47104,t=1,p=1$YgJVTMAv87A9/n4+YGRxcQ$vsLXY6jI0+iPk2wQ2mORcnwNat1A9aAxMVrGTmaxAjI"


@pytest_asyncio.fixture
async def exchange(
    settings: Settings, redis: Redis, temporal: Client, pool: Pool, tmp_path: Path
) -> AsyncIterator[Exchange]:
    async with operations_worker(temporal, pool), running_exchange(complete(settings, tmp_path)) as exchange:
        yield exchange


@asynccontextmanager
async def credential_store_down(pool: Pool) -> AsyncIterator[None]:
    await pool.execute("ALTER TABLE auth.auth_credentials RENAME TO auth_credentials_away")
    try:
        yield
    finally:
        await pool.execute("ALTER TABLE auth.auth_credentials_away RENAME TO auth_credentials")


async def prepared(pool: Pool, email: str, *, age_seconds: int = 60, attempts: int = 0) -> int:
    """A registration whose API process died before it could start the workflow."""
    user_id = await prepare_registration(pool, email, HASH)
    await pool.execute(
        "UPDATE users.user_registration_prepare SET attempts = $2, created_at = now() - make_interval(secs => $3)"
        " WHERE user_id = $1",
        user_id,
        attempts,
        age_seconds,
    )
    return user_id


async def statuses(pool: Pool, user_id: int) -> tuple[str, str]:
    row = await pool.fetchrow(
        "SELECT u.status AS account, p.status AS registration FROM users.users u"
        " JOIN users.user_registration_prepare p USING (user_id) WHERE user_id = $1",
        user_id,
    )
    assert row is not None
    return row["account"], row["registration"]


async def sweep(temporal: Client, name: str = "sweep") -> list[int]:
    resumed: list[int] = await temporal.execute_workflow(
        REGISTRATION_RESUMER, id=name, task_queue=OPERATIONS_QUEUE, result_type=list[int]
    )
    return resumed


async def test_a_registered_user_is_active_and_has_a_credential(exchange: Exchange, pool: Pool) -> None:
    response = await exchange.client.post("/api/users", json={"email": " Alice@Example.com ", "password": PASSWORD})
    assert response.status_code == 200
    body = response.json()
    assert set(body) == {"userId", "email", "status", "createdAt"}
    assert (body["email"], body["status"]) == ("alice@example.com", "ACTIVE")
    user_id = int(body["userId"])
    assert await statuses(pool, user_id) == ("ACTIVE", "COMPLETED")
    credential = await pool.fetchrow("SELECT * FROM auth.auth_credentials WHERE user_id = $1", user_id)
    assert credential is not None
    assert credential["secret_hash"].startswith("$argon2id$v=19$m=47104,t=1,p=1$")
    assert credential["roles"] == ["user"]


async def test_the_hash_is_in_neither_the_history_nor_the_registration_row(
    exchange: Exchange, pool: Pool, temporal: Client
) -> None:
    user_id = int(await exchange.register())
    assert (
        await pool.fetchval("SELECT secret_hash FROM users.user_registration_prepare WHERE user_id = $1", user_id)
        is None
    )
    handle = temporal.get_workflow_handle(registration_workflow_id(user_id))
    history = (await handle.fetch_history()).to_json()
    assert "argon2" not in history
    assert "alice" not in history
    await save_history(handle, "registration")


async def test_an_email_can_be_registered_once_whatever_its_case(exchange: Exchange, pool: Pool) -> None:
    await exchange.register("alice@example.com")
    response = await exchange.client.post("/api/users", json={"email": "ALICE@example.COM", "password": PASSWORD})
    assert (response.status_code, response.json()["code"]) == (400, "EMAIL_ALREADY_EXISTS")
    assert await pool.fetchval("SELECT count(*) FROM users.users") == 1


async def test_of_simultaneous_registrations_of_one_email_one_wins(exchange: Exchange, pool: Pool) -> None:
    body = {"email": "alice@example.com", "password": PASSWORD}
    answers = await asyncio.gather(*(exchange.client.post("/api/users", json=body) for _ in range(5)))
    assert sorted(answer.status_code for answer in answers) == [200, 400, 400, 400, 400]
    assert await pool.fetchval("SELECT count(*) FROM users.users") == 1


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"email": "alice@example.com"}, "password"),
        ({"email": "alice@example.com", "password": "1234567"}, "password"),
        ({"email": "alice@example.com", "password": "x" * 129}, "password"),
        ({"email": "alice@example.com", "password": "NUL\x00inside!"}, "password"),
        ({"email": "alice@example.com", "password": 12345678}, "password"),
        ({"email": "alice", "password": PASSWORD}, "email"),
        ({"email": "a@b", "password": PASSWORD}, "email"),
        ({"email": "a b@example.com", "password": PASSWORD}, "email"),
        ({"email": "alice\x00@example.com", "password": PASSWORD}, "email"),
        ({"email": "x" * 250 + "@example.com", "password": PASSWORD}, "email"),
        ({"email": None, "password": PASSWORD}, "email"),
    ],
)
async def test_bad_input_is_refused_field_by_field_and_never_echoed(
    exchange: Exchange, pool: Pool, body: dict[str, object], field: str
) -> None:
    response = await exchange.client.post("/api/users", json=body)
    assert response.status_code == 422
    problem = response.json()
    assert problem["code"] == "VALIDATION_FAILED"
    assert [error["field"] for error in problem["errors"]] == [field]
    assert str(body.get("password", "absent")) not in response.text
    assert await pool.fetchval("SELECT count(*) FROM users.users") == 0


async def test_a_lone_surrogate_is_refused(exchange: Exchange) -> None:
    body = rb'{"email": "alice@example.com", "password": "12345678\ud800"}'
    response = await exchange.client.post("/api/users", content=body, headers={"Content-Type": "application/json"})
    assert (response.status_code, response.json()["code"]) == (422, "VALIDATION_FAILED")


async def test_while_the_credential_store_is_down_the_registration_waits_and_then_completes(
    exchange: Exchange, pool: Pool, temporal: Client
) -> None:
    body = {"email": "alice@example.com", "password": PASSWORD}
    async with credential_store_down(pool):
        response = await exchange.client.post("/api/users", json=body)
        assert (response.status_code, response.json()["code"]) == (500, "REMOTE_SERVICE_ERROR")
        user_id = int(response.json()["userId"])
        assert await statuses(pool, user_id) == ("PREPARE", "PREPARE")
        again = await exchange.client.post("/api/users", json=body)
        assert (again.status_code, again.json()["code"]) == (400, "EMAIL_ALREADY_EXISTS")
        assert await sweep(temporal) == []  # Its workflow is still at work.
        handle = temporal.get_workflow_handle(registration_workflow_id(user_id))
        assert await details(handle) == "Creates the credential, in up to 25 attempts"
    await asyncio.wait_for(handle.result(), 30)
    assert await details(handle) == "The user is active"
    assert await statuses(pool, user_id) == ("ACTIVE", "COMPLETED")
    await exchange.login()


async def test_the_sweep_restarts_what_has_no_workflow_and_leaves_the_rest(
    exchange: Exchange, pool: Pool, temporal: Client
) -> None:
    orphan = await prepared(pool, "orphan@example.com")
    young = await prepared(pool, "young@example.com", age_seconds=1)
    done = int(await exchange.register("done@example.com"))
    await pool.execute(
        "UPDATE users.user_registration_prepare SET created_at = now() - interval '1 h' WHERE user_id = $1", done
    )
    assert await sweep(temporal) == [orphan]
    await temporal.get_workflow_handle(registration_workflow_id(orphan)).result()
    assert await statuses(pool, orphan) == ("ACTIVE", "COMPLETED")
    assert await statuses(pool, young) == ("PREPARE", "PREPARE")
    assert await details(temporal.get_workflow_handle("sweep")) == "1 registrations were started again"
    await save_history(temporal.get_workflow_handle("sweep"), "registration_resumer")


async def test_the_sweep_takes_up_a_registration_that_an_operator_cancelled(
    exchange: Exchange, pool: Pool, temporal: Client
) -> None:
    user_id = await prepared(pool, "alice@example.com")
    async with credential_store_down(pool):
        handle = await temporal.start_workflow(
            USER_REGISTRATION,
            Registration(user_id),
            id=registration_workflow_id(user_id),
            task_queue=OPERATIONS_QUEUE,
        )
        await handle.cancel()
        with pytest.raises(WorkflowFailureError):
            await handle.result()
        assert await statuses(pool, user_id) == ("PREPARE", "PREPARE")
    assert await sweep(temporal) == [user_id]
    await temporal.get_workflow_handle(registration_workflow_id(user_id)).result()
    assert await statuses(pool, user_id) == ("ACTIVE", "COMPLETED")


async def test_after_the_last_attempt_the_registration_fails_operators_are_told_and_can_run_it_again(
    exchange: Exchange, pool: Pool, temporal: Client, caplog: pytest.LogCaptureFixture
) -> None:
    user_id = await prepared(pool, "alice@example.com", attempts=REGISTRATION_ATTEMPTS_MAX - 1)
    async with credential_store_down(pool):
        with caplog.at_level(logging.ERROR, logger="alerts"):
            assert await sweep(temporal) == [user_id]
            handle = temporal.get_workflow_handle(registration_workflow_id(user_id))
            with pytest.raises(WorkflowFailureError) as failure:
                await handle.result()
    assert isinstance(failure.value.cause, ApplicationError)
    assert failure.value.cause.type == "REGISTRATION_FAILED"
    assert await statuses(pool, user_id) == ("FAILED", "FAILED")
    assert f"registration of user {user_id} failed" in caplog.text
    error = await pool.fetchval("SELECT last_error FROM users.user_registration_prepare WHERE user_id = $1", user_id)
    assert str(REGISTRATION_ATTEMPTS_MAX) in error
    await save_history(handle, "registration_failed")
    assert await sweep(temporal, "later") == []

    await temporal.execute_workflow(
        USER_REGISTRATION, Registration(user_id), id=registration_workflow_id(user_id), task_queue=OPERATIONS_QUEUE
    )
    assert await statuses(pool, user_id) == ("ACTIVE", "COMPLETED")


async def test_whoever_registered_in_vain_registers_again_with_any_password(
    exchange: Exchange, pool: Pool, temporal: Client
) -> None:
    user_id = await prepared(pool, "alice@example.com", attempts=REGISTRATION_ATTEMPTS_MAX - 1)
    body = {"email": "Alice@example.com", "password": "quite another battery"}
    # While it is under way nobody takes it over.
    taken = await exchange.client.post("/api/users", json=body)
    assert (taken.status_code, taken.json()["code"]) == (400, "EMAIL_ALREADY_EXISTS")
    async with credential_store_down(pool):
        assert await sweep(temporal) == [user_id]
        with pytest.raises(WorkflowFailureError):
            await temporal.get_workflow_handle(registration_workflow_id(user_id)).result()
    assert await statuses(pool, user_id) == ("FAILED", "FAILED")
    again = await exchange.client.post("/api/users", json=body)
    assert (again.status_code, again.json()["userId"], again.json()["status"]) == (200, str(user_id), "ACTIVE")
    assert await statuses(pool, user_id) == ("ACTIVE", "COMPLETED")
    await exchange.login(password="quite another battery")
    taken = await exchange.client.post("/api/users", json=body)
    assert (taken.status_code, taken.json()["code"]) == (400, "EMAIL_ALREADY_EXISTS")


async def test_every_step_may_run_twice(pool: Pool) -> None:
    user_id = await prepared(pool, "alice@example.com")
    registration = Registration(user_id)
    auth, users = AuthActivities(pool), UserActivities(pool)
    for _ in range(2):
        await auth.create_credentials(registration)
    for _ in range(2):
        await users.complete_registration(registration)
    await auth.create_credentials(registration)
    assert await statuses(pool, user_id) == ("ACTIVE", "COMPLETED")
    assert await pool.fetchval("SELECT count(*) FROM auth.auth_credentials") == 1
    assert await pool.fetchval("SELECT attempts FROM users.user_registration_prepare WHERE user_id = $1", user_id) == 2


async def test_a_store_error_never_carries_the_hash(pool: Pool) -> None:
    user_id = await prepared(pool, "alice@example.com")
    # Postgres quotes the refused row in such an error.
    await pool.execute("ALTER TABLE auth.auth_credentials ADD CHECK (secret_hash = '')")
    with pytest.raises(ApplicationError) as raised:
        await AuthActivities(pool).create_credentials(Registration(user_id))
    assert raised.value.message == "The credential store failed: CheckViolationError"
    assert raised.value.__cause__ is None


async def test_the_schedule_runs_the_sweep(exchange: Exchange, pool: Pool, temporal: Client) -> None:
    user_id = await prepared(pool, "alice@example.com")
    schedule = await temporal.create_schedule(RESUMER_SCHEDULE_ID, RESUMER_SCHEDULE)
    try:
        await schedule.trigger()
        for _ in range(300):
            if await statuses(pool, user_id) == ("ACTIVE", "COMPLETED"):
                break
            await asyncio.sleep(0.1)
        assert await statuses(pool, user_id) == ("ACTIVE", "COMPLETED")
    finally:
        await schedule.delete()


async def test_without_a_worker_the_caller_is_told_after_a_bounded_time(
    settings: Settings, redis: Redis, temporal: Client, pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api.routes.users.REGISTRATION_SECONDS_MAX", 0.5)
    async with running_exchange(complete(settings, tmp_path)) as exchange:
        response = await exchange.client.post("/api/users", json={"email": "a@example.com", "password": PASSWORD})
        assert (response.status_code, response.json()["code"]) == (500, "REMOTE_SERVICE_ERROR")
    user_id = int(response.json()["userId"])
    async with operations_worker(temporal, pool):
        await temporal.get_workflow_handle(registration_workflow_id(user_id)).result()
    assert await statuses(pool, user_id) == ("ACTIVE", "COMPLETED")


async def test_credentials_are_created_by_services_only(exchange: Exchange, pool: Pool) -> None:
    user_id = await prepared(pool, "alice@example.com")
    body = {"userId": str(user_id), "type": "PASSWORD", "secretHash": HASH}
    url = "/api/auth/credentials"
    assert (await exchange.client.post(url, json=body)).status_code == 401
    wrong = await exchange.client.post(url, json=body, headers={"X-Internal-Token": "wrong"})
    assert wrong.status_code == 401
    await exchange.register("bob@example.com")
    tokens = await exchange.login("bob@example.com")
    as_user = await exchange.client.post(url, json=body, headers={"Authorization": f"Bearer {tokens['accessToken']}"})
    assert (as_user.status_code, as_user.json()["code"]) == (403, "FORBIDDEN")
    for headers in ({"X-Internal-Token": INTERNAL_TOKEN}, {"Authorization": f"Bearer {INTERNAL_TOKEN}"}):
        created = await exchange.client.post(url, json=body, headers=headers)
        assert created.status_code == 201
        assert created.json()["userId"] == str(user_id)
        assert "secretHash" not in created.json()
    snake = await exchange.client.post(
        url,
        json={"user_id": user_id, "type": "PASSWORD", "secret_hash": HASH},
        headers={"X-Internal-Token": INTERNAL_TOKEN},
    )
    assert snake.status_code == 201


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"secretHash": "plain text"}, 422),
        ({"secretHash": HASH.replace("argon2id", "argon2i")}, 422),
        ({"type": "PIN"}, 422),
        ({"userId": "9" * 30}, 422),
        ({"userId": "4711"}, 404),
    ],
)
async def test_a_credential_nobody_could_use_is_refused(
    exchange: Exchange, pool: Pool, change: dict[str, str], status: int
) -> None:
    user_id = await prepared(pool, "alice@example.com")
    body = {"userId": str(user_id), "type": "PASSWORD", "secretHash": HASH, **change}
    response = await exchange.client.post(
        "/api/auth/credentials", json=body, headers={"X-Internal-Token": INTERNAL_TOKEN}
    )
    assert response.status_code == status
    assert await pool.fetchval("SELECT count(*) FROM auth.auth_credentials") == 0


@pytest.mark.parametrize("name", ["registration", "registration_failed", "registration_resumer"])
async def test_saved_registration_histories_replay(name: str) -> None:
    await replay(name, WORKFLOWS)

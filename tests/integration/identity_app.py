"""The api and the operations worker in this process, for the tests of identity and gateway."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import httpx
from cryptography.fernet import Fernet
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from fastapi import FastAPI
from pydantic import SecretStr
from temporalio.client import Client
from temporalio.worker import Worker

from activities.identity.auth import AuthActivities, create_credential
from activities.identity.users import UserActivities, prepare_registration
from api.app import create_app
from api.identity.passwords import HASHER
from api.state import AppState
from clients import OPERATIONS_QUEUE
from domain.identity import PASSWORD_CREDENTIAL, Registration
from settings import Settings
from storage.db import Pool
from tests.sandbox import CalmSandbox
from workflows.registration import WORKFLOWS

INTERNAL_TOKEN = "internal-token-of-the-tests"
PASSWORD = "correct horse battery"


@dataclass(frozen=True)
class Exchange:
    """A running api: its HTTP client and what is behind it."""

    client: httpx.AsyncClient
    app: FastAPI
    state: AppState

    async def register(self, email: str = "alice@example.com", password: str = PASSWORD) -> str:
        """Register a user; the id."""
        response = await self.client.post("/api/users", json={"email": email, "password": password})
        assert response.status_code == 200, response.text
        return str(response.json()["userId"])

    async def add_user(self, email: str = "alice@example.com", password: str = PASSWORD) -> int:
        """A registered user, written straight into the services: for exchanges without a worker; the id."""
        secret_hash = _hashed(password)
        user_id = await prepare_registration(self.state.pool, email, secret_hash)
        await create_credential(self.state.pool, user_id, PASSWORD_CREDENTIAL, secret_hash)
        await UserActivities(self.state.pool).complete_registration(Registration(user_id))
        return user_id

    async def login(self, email: str = "alice@example.com", password: str = PASSWORD) -> dict[str, Any]:
        """Sign in; the tokens."""
        response = await self.client.post("/api/auth/login", json={"email": email, "password": password})
        assert response.status_code == 200, response.text
        tokens: dict[str, Any] = response.json()
        return tokens


@cache
def _hashed(password: str) -> str:
    """Once for all tests: it is made to take long."""
    return HASHER.hash(password)


def bearer(token: str) -> dict[str, str]:
    """The header that presents an access token."""
    return {"Authorization": f"Bearer {token}"}


def write_key(path: Path) -> Path:
    """A new Ed25519 key as a PEM file."""
    key = Ed25519PrivateKey.generate()
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return path


def complete(settings: Settings, folder: Path) -> Settings:
    """The settings with a signing key and a service token of their own."""
    secrets_file = folder / "api-key-secrets"
    secrets_file.write_bytes(Fernet.generate_key())
    changes = {
        "jwt_private_key_file": write_key(folder / "jwt.pem"),
        "api_key_secrets_file": secrets_file,
        "internal_token": SecretStr(INTERNAL_TOKEN),
    }
    return settings.model_copy(update=changes)


@asynccontextmanager
async def running_exchange(settings: Settings) -> AsyncIterator[Exchange]:
    """The api, without a worker; `settings` must be complete."""
    app = create_app(settings)
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app, raise_app_exceptions=False, client=("127.0.0.1", 50_000))
        async with httpx.AsyncClient(transport=transport, base_url="http://exchange") as client:
            yield Exchange(client, app, app.state.exchange)


def settings_without_workflows(database_url: str, redis_url: str, temporal_address: str, folder: Path) -> Settings:
    """Complete settings whose Temporal namespace nobody works in: a test that needs none keeps none busy."""
    servers = Settings(database_url=database_url, redis_url=redis_url, temporal_address=temporal_address)
    return complete(servers.model_copy(update={"temporal_namespace": "test-0"}), folder)


def operations_worker(temporal: Client, pool: Pool) -> Worker:
    """A worker for the registration workflows, in the sandbox."""
    auth, users = AuthActivities(pool), UserActivities(pool)
    return Worker(
        temporal,
        task_queue=OPERATIONS_QUEUE,
        workflows=WORKFLOWS,
        activities=[
            auth.create_credentials,
            users.complete_registration,
            users.fail_registration,
            users.stalled_registrations,
        ],
        workflow_runner=CalmSandbox(),
    )

"""docs/identity.md, the changes of keys, on two real api processes that are restarted one by one under use."""

import asyncio
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.fernet import Fernet

from client import Account, ApiKey, Exchange, Session, sign_in
from client.session import Login
from settings import Settings
from stack.ports import free_port
from tests.exchange import environment_of
from tests.integration.identity_app import PASSWORD, complete, running_exchange
from tests.servers import ROOT
from tests.waiting import until

EMAIL = "alice@example.com"
PATIENCE = 30.0


class Api:
    """One api process, and a client of it that waits while it restarts."""

    def __init__(self) -> None:
        self.port = free_port()
        self.client = Exchange(f"http://127.0.0.1:{self.port}", patience=PATIENCE)
        self._process: subprocess.Popen[bytes] | None = None

    async def restart(self, settings: Settings) -> None:
        """Stop it as an operator does, and start it with these settings."""
        await self.stop()
        self._start(settings)
        await until(self._is_ready, PATIENCE, "the api to be ready")

    def _start(self, settings: Settings) -> None:
        environment = environment_of(settings.model_copy(update={"api_port": self.port}))
        with (settings.state_dir / f"api-{self.port}.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "api"], cwd=ROOT, env=environment, stdout=log, stderr=log
            )

    async def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            # uvicorn ends by the signal that told it to.
            assert await asyncio.to_thread(self._process.wait, PATIENCE) in (0, -signal.SIGTERM)
        self._process = None

    async def keys(self) -> int:
        """How many keys verify access tokens here."""
        async with httpx.AsyncClient(base_url=self.client.url, trust_env=False) as client:
            return len((await client.get("/.well-known/jwks.json")).json()["keys"])

    async def _is_ready(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None
        with suppress(httpx.TransportError):
            async with httpx.AsyncClient(base_url=self.client.url, trust_env=False) as client:
                return (await client.get("/health/ready")).is_success
        return False


@pytest.fixture
async def settings_of_all(settings: Settings, tmp_path: Path) -> Settings:
    """Complete settings, of an exchange with one user."""
    whole = complete(settings, tmp_path)
    async with running_exchange(whole) as exchange:
        await exchange.add_user(EMAIL)
    return whole


@pytest.fixture
async def apis(settings_of_all: Settings) -> AsyncIterator[tuple[Api, Api]]:
    pair = Api(), Api()
    try:
        await asyncio.gather(*(api.restart(settings_of_all) for api in pair))
        yield pair
    finally:
        for api in pair:
            await api.client.close()
            await api.stop()


@asynccontextmanager
async def in_use(*accounts: Account) -> AsyncIterator[list[int]]:
    """Each account is used all the time; how often each was. The first call that is refused fails the block."""
    counts = [0] * len(accounts)

    async def use(number: int) -> None:
        while True:
            assert (await accounts[number].me()).email == EMAIL
            counts[number] += 1
            await asyncio.sleep(0.1)

    async with asyncio.TaskGroup() as group:
        users = [group.create_task(use(number)) for number in range(len(accounts))]
        yield counts
        for user in users:
            user.cancel()


async def made_key(session: Session) -> ApiKey:
    """A key with a secret, made just now."""
    made = await session.create_api_key("bot", ["READ"])
    assert made.secret is not None
    return ApiKey.with_secret(made.key_id, made.secret)


async def require_all_known_everywhere(apis: tuple[Api, Api]) -> None:
    """Tokens and keys made at either api are good at the other."""
    for here, there in (apis, apis[::-1]):
        session = await sign_in(here.client, EMAIL, PASSWORD)
        assert isinstance(session.caller, Login)
        # No renewing: the token itself must be good.
        headers = session.caller.headers("GET", "/api/users/me", b"")
        async with httpx.AsyncClient(base_url=there.client.url, trust_env=False) as client:
            assert (await client.get("/api/users/me", headers=headers)).status_code == 200
        made = await session.create_api_key("bot", ["READ"])
        assert made.secret is not None
        program = Account(there.client, ApiKey.with_secret(made.key_id, made.secret))
        assert (await program.me()).email == EMAIL
        await session.revoke_api_key(made.key_id)


def openssl(*arguments: str | Path) -> str:
    return subprocess.run(["openssl", *arguments], check=True, capture_output=True, text=True).stdout


async def test_keys_are_changed_under_use_and_nobody_notices(
    settings_of_all: Settings, apis: tuple[Api, Api], monkeypatch: pytest.MonkeyPatch
) -> None:
    pem, secrets = settings_of_all.jwt_private_key_file, settings_of_all.api_key_secrets_file
    assert pem is not None
    assert secrets is not None
    old_key, new_key = pem.read_text(), openssl("genpkey", "-algorithm", "ed25519")
    old_secret = secrets.read_text().strip()
    new_secret = openssl("rand", "-base64", "32").translate(str.maketrans("+/", "-_")).strip()

    async def restart_one_by_one() -> None:
        for api in apis:
            await api.restart(settings_of_all)
            await require_all_known_everywhere(apis)

    session = await sign_in(apis[0].client, EMAIL, PASSWORD)
    login, program = session.caller, await made_key(session)
    assert isinstance(login, Login)
    renewals = 0
    renew = login.renew

    async def counting_renew(refused_headers: Any) -> bool:
        nonlocal renewals
        renewals += 1
        return await renew(refused_headers)

    monkeypatch.setattr(login, "renew", counting_renew)
    callers = [Account(api.client, caller) for api in apis for caller in (login, program)]
    async with in_use(*callers) as counts:
        secrets.write_text(f"{old_secret}\n{new_secret}\n")
        pem.write_text(old_key + new_key)
        await restart_one_by_one()
        assert await apis[0].keys() == 2
        secrets.write_text(f"{new_secret}\n{old_secret}\n")
        pem.write_text(new_key + old_key)
        await restart_one_by_one()
        assert renewals == 0
        environment = environment_of(settings_of_all)
        await asyncio.to_thread(
            subprocess.run, [sys.executable, "-m", "api.identity.vault"], cwd=ROOT, env=environment, check=True
        )
        secrets.write_text(f"{new_secret}\n")
        # Before the old tokens have expired, as when the old key was stolen: they are refused, and refreshed.
        old_headers = login.headers("GET", "/api/users/me", b"")
        pem.write_text(new_key)
        await restart_one_by_one()
        before = counts.copy()
        await until(lambda: _all_above(counts, before), 10, "everybody to be served")
        assert [await api.keys() for api in apis] == [1, 1]
        assert renewals > 0
        async with httpx.AsyncClient(base_url=apis[0].client.url, trust_env=False) as client:
            assert (await client.get("/api/users/me", headers=old_headers)).status_code == 401
    assert min(counts) > 10


async def _all_above(counts: list[int], before: list[int]) -> bool:
    return all(now > then for now, then in zip(counts, before, strict=True))


async def test_a_secret_that_no_key_of_the_file_opens_stops_the_change_and_leaves_all_as_it_was(
    settings_of_all: Settings, tmp_path: Path
) -> None:
    secrets = settings_of_all.api_key_secrets_file
    assert secrets is not None
    async with running_exchange(settings_of_all) as exchange:
        tokens = await exchange.login(EMAIL)
        body = {"label": "bot", "algorithm": "HMAC_SHA256", "permissions": ["READ"]}
        headers = {"Authorization": f"Bearer {tokens['accessToken']}"}
        assert (await exchange.client.post("/api/auth/api-keys", json=body, headers=headers)).status_code == 201
        stored = await exchange.state.pool.fetchval("SELECT secret FROM auth.api_keys")
        secrets.write_bytes(Fernet.generate_key())
        vault = [sys.executable, "-m", "api.identity.vault"]
        outcome = await asyncio.to_thread(
            subprocess.run, vault, cwd=ROOT, env=environment_of(settings_of_all), capture_output=True
        )
        assert outcome.returncode == 1
        assert b"InvalidToken" in outcome.stderr
        assert await exchange.state.pool.fetchval("SELECT secret FROM auth.api_keys") == stored

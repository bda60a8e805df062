"""A whole exchange for tests from outside: its own Valkey and Temporal, and the four real processes, each of which
can be killed and started again. Only Postgres is the test run's, with a database of the exchange's own.
"""

import os
import subprocess
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
from cryptography.fernet import Fernet
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from pydantic import SecretStr

from activities.identity.sessions import new_session, open_session
from api.bootstrap import bootstrap
from api.identity.tokens import AccessTokens, load_keys
from client import Exchange as Client
from client import Operator, Session, register, sign_in
from clients import open_redis
from domain.identity import Identity
from settings import Settings
from stack import servers
from stack.ports import free_port
from stack.processes import SERVICES
from storage.db import Pool, open_pool
from tests.servers import ROOT
from tests.waiting import until

BTC, ETH, SOL = "BTC-USDT-PERP", "ETH-USDT-PERP", "SOL-USDT-PERP"
MARKS = {BTC: "60000", ETH: "3000", SOL: "150"}
NAMESPACE = "exchange"
PASSWORD = "correct horse battery"
ADMIN_EMAIL = "admin@exchange.local"
INTERNAL_TOKEN = "internal-token-of-the-tests"
READY_SECONDS = 60
# Statuses from which an order moves on by itself.
MOVING = {"PENDING", "ACCEPTED", "CANCEL_REQUESTED"}


@dataclass(frozen=True)
class Trader:
    """A signed-in user: `client` sends their token."""

    user_id: str
    client: httpx.AsyncClient
    session: Session

    @property
    def operator(self) -> Operator:
        """What only operators may do."""
        return self.session.operator()

    async def send(self, order: dict[str, Any], *, wait: bool = False) -> httpx.Response:
        """POST an order as it is."""
        return await self.client.post("/api/orders", json=order, params={"wait": "placed"} if wait else None)

    async def place(self, side: str, quantity: str, price: str | None = None, **terms: Any) -> dict[str, Any]:
        """Place an order (LIMIT with a price, else MARKET; BTC unless told) and wait for the engine; its view."""
        kind = "MARKET" if price is None else "LIMIT"
        order = {"instrumentId": BTC, "side": side, "type": kind, "quantity": quantity, "price": price, **terms}
        answer = await self.send(order, wait=True)
        assert answer.status_code == 200, answer.text
        view: dict[str, Any] = answer.json()
        return view

    async def get(self, path: str, **query: Any) -> Any:
        """The JSON of a GET that must succeed."""
        answer = await self.client.get(path, params=query)
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def order(self, order_id: int) -> dict[str, Any]:
        """One of the trader's orders."""
        view: dict[str, Any] = await self.get(f"/api/orders/{order_id}")
        return view

    async def pages(self, path: str, limit: int, **query: Any) -> list[dict[str, Any]]:
        """Every item of a list, part by part."""
        items: list[dict[str, Any]] = []
        cursor = None
        while True:
            part = await self.get(path, limit=limit, **query, **({"cursor": cursor} if cursor else {}))
            assert len(part["items"]) <= limit
            items += part["items"]
            cursor = part["nextCursor"]
            if cursor is None:
                return items

    async def balance(self) -> tuple[Decimal, Decimal]:
        """Available and reserved USDT."""
        rows = await self.get("/api/ledger/balances")
        return next(((Decimal(row["available"]), Decimal(row["reserved"])) for row in rows), (Decimal(0), Decimal(0)))

    async def position(self, instrument_id: str = BTC) -> dict[str, Any]:
        """The position in an instrument, which must exist."""
        rows = await self.get("/api/positions")
        found: dict[str, Any] = next(row for row in rows if row["instrumentId"] == instrument_id)
        return found


@dataclass(frozen=True)
class _Token:
    """A caller with an access token and nothing else."""

    token: str

    def headers(self, method: str, target: str, body: bytes) -> Mapping[str, str]:
        """See `client.exchange.Caller`."""
        return {"Authorization": f"Bearer {self.token}"}

    async def renew(self, refused_headers: Mapping[str, str]) -> bool:
        """There is nothing to renew it with."""
        return False


class Exchange:
    """The processes of one exchange by name: temporal, engine, worker, market, api."""

    def __init__(self, settings: Settings, commands: dict[str, Sequence[str]], logs: Path, pool: Pool) -> None:
        self.settings = settings
        self.pool = pool
        self.logs = logs
        self.client = self._client()
        self.api = Client(self.url)
        self._commands = commands
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._traders: list[httpx.AsyncClient] = [self.client]

    @property
    def url(self) -> str:
        """Where the api listens."""
        return f"http://127.0.0.1:{self.settings.api_port}"

    def start(self, *names: str) -> None:
        """Start processes; `until_ready` waits for them."""
        for name in names:
            with (self.logs / f"{name}.log").open("ab") as log:
                self._children[name] = subprocess.Popen(
                    self._commands[name],
                    cwd=ROOT,
                    env=environment_of(self.settings),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )

    def kill(self, name: str) -> None:
        """kill -9."""
        child = self._children.pop(name)
        child.kill()
        child.wait()

    def signal(self, name: str, number: int) -> None:
        """Send a signal to a process."""
        self._children[name].send_signal(number)

    def is_running(self, name: str) -> bool:
        """Whether the process has not ended by itself."""
        return self._children[name].poll() is None

    async def until_ready(self) -> None:
        """Returns when the api serves, and every instrument has a mark price and an engine."""
        await until(self._is_ready, READY_SECONDS, "the exchange to be ready")

    async def _is_ready(self) -> bool:
        for name in self._children:
            assert self.is_running(name), f"{name} ended: {self.log(name)[-2000:]}"
        try:
            ready = await self.client.get("/health/ready")
            marks = [await self.client.get(f"/api/market/mark-price/{name}") for name in MARKS]
        except httpx.TransportError:
            return False
        owned = await self.pool.fetchval(
            "SELECT bool_and(owner IS NOT NULL AND lease_until > clock_timestamp()) FROM matching.cursors"
        )
        return bool(owned) and all(answer.status_code == 200 for answer in [ready, *marks])

    def log(self, name: str) -> str:
        """What the process has said."""
        return (self.logs / f"{name}.log").read_text(encoding="utf-8", errors="replace")

    async def sign_in(self, email: str, password: str = PASSWORD) -> Trader:
        """A user who is registered already."""
        return await self._trader(await sign_in(self.api, email, password))

    async def _trader(self, session: Session) -> Trader:
        client = self._signed_in(session.caller.headers("", "", b""))
        return Trader((await session.me()).user_id, client, session)

    def _signed_in(self, headers: Mapping[str, str]) -> httpx.AsyncClient:
        client = self._client(headers)
        self._traders.append(client)
        return client

    def _client(self, headers: Mapping[str, str] | None = None) -> httpx.AsyncClient:
        # Connections are given up before the api gives them up, and no certificates are loaded for plain HTTP.
        limits = httpx.Limits(keepalive_expiry=2)
        return httpx.AsyncClient(
            base_url=self.url, trust_env=False, timeout=30, headers=headers, limits=limits, verify=False
        )

    async def crowd(self, count: int) -> list[Trader]:
        """New users, signed in, without passwords: registering each would take most of a test's time."""
        now = datetime.now(UTC)
        tokens = AccessTokens(*load_keys(_required(self.settings.jwt_private_key_file)))
        traders = []
        async with open_redis(self.settings) as redis, self.pool.acquire() as conn, conn.transaction():
            rows = await conn.fetch(
                "INSERT INTO users.users (email, status) SELECT gen_random_uuid() || '@example.com', 'ACTIVE'"
                " FROM generate_series(1, $1::int) RETURNING user_id, roles",
                count,
            )
            for user_id, roles in rows:
                session = new_session(user_id, roles, None, None, now)
                await open_session(conn, redis, session, "")
                token = tokens.issue(Identity(user_id, frozenset(roles), session.session_id), now)
                caller = _Token(token)
                client = self._signed_in(caller.headers("", "", b""))
                traders.append(Trader(str(user_id), client, Session(self.api, caller)))
        return traders

    async def admin(self) -> Trader:
        """The operator."""
        return await self.sign_in(ADMIN_EMAIL)

    async def trader(self, admin: Trader, deposit: str | None = None) -> Trader:
        """A new user, with money if told."""
        trader = await self._trader(await register(self.api, f"{uuid.uuid4().hex}@example.com", PASSWORD))
        if deposit is not None:
            await self.deposit(admin, trader, deposit)
        return trader

    async def deposit(self, admin: Trader, trader: Trader, amount: str) -> None:
        """Credit USDT."""
        await admin.operator.deposit(trader.user_id, "USDT", Decimal(amount), reference=uuid.uuid4().hex)

    async def hold_marks(self, admin: Trader) -> None:
        """Stop the simulated index at MARKS."""
        for name, price in MARKS.items():
            await admin.operator.hold_index(name, Decimal(price))

    async def until_settled(self, seconds: float = 10) -> None:
        """Returns when nothing moves: no saga is open, and every service has applied all that the engine did."""
        await until(self._is_settled, seconds, "everything to be settled")

    async def _is_settled(self) -> bool:
        return bool(
            await self.pool.fetchval(
                "SELECT NOT EXISTS (SELECT FROM orders.sagas WHERE NOT done) AND bool_and("
                "   s.last_seq = m.command_seq AND m.event_seq = p.confirmed_seq AND m.event_seq = r.applied_seq"
                "   AND m.event_seq = l.applied_seq AND m.event_seq = o.applied_seq)"
                " FROM matching.sequencers s JOIN matching.cursors m USING (instrument_id)"
                " JOIN positions.cursors p USING (instrument_id) JOIN risk.cursors r USING (instrument_id)"
                " JOIN ledger.cursors l USING (instrument_id) JOIN orders.cursors o USING (instrument_id)"
            )
        )

    async def audit(self, admin: Trader) -> None:
        """Fails unless every invariant of the ledger holds, with nothing in motion."""
        report = await admin.operator.audit()
        assert report.ok, report
        assert not any(check.detail for check in report.checks), report

    async def close(self) -> None:
        """End every process and connection."""
        for client in self._traders:
            await client.aclose()
        await self.api.close()
        for name in list(self._children):
            self.kill(name)


@asynccontextmanager
async def running_exchange(database_url: str, folder: Path, **others: Any) -> AsyncIterator[Exchange]:
    """An exchange on an empty migrated database, its marks held; killed at the end. `others`: settings."""
    valkey, temporal = servers.valkey(folder), servers.temporal(folder, free_port(), None, [NAMESPACE])
    settings = Settings(
        database_url=database_url,
        redis_url=valkey.endpoint.url,
        temporal_address=temporal.endpoint.url,
        temporal_namespace=NAMESPACE,
        api_port=free_port(),
        state_dir=folder,
        admin_email=ADMIN_EMAIL,
        admin_password=PASSWORD,
        internal_token=INTERNAL_TOKEN,
        jwt_private_key_file=_write_key(folder / "jwt.pem"),
        api_key_secrets_file=_write_secrets(folder / "api-key-secrets"),
        **others,
    )
    commands = {server.process.name: server.process.command for server in (valkey, temporal)}
    commands |= {process.name: process.command for process in SERVICES}
    pool = await open_pool(database_url)
    exchange = Exchange(settings, commands, folder, pool)
    try:
        exchange.start("valkey", "temporal")
        await servers.wait_until_ready(valkey.endpoint, READY_SECONDS)
        await bootstrap(settings, pool)
        await servers.wait_until_ready(temporal.endpoint, READY_SECONDS)
        exchange.start("engine", "worker", "market", "api")
        await exchange.until_ready()
        await exchange.hold_marks(await exchange.admin())
        yield exchange
    finally:
        await exchange.close()
        pool.terminate()


def _required(path: Path | None) -> Path:
    assert path is not None
    return path


def _write_key(path: Path) -> Path:
    key = Ed25519PrivateKey.generate()
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return path


def _write_secrets(path: Path) -> Path:
    path.write_bytes(Fernet.generate_key())
    return path


def environment_of(settings: Settings) -> dict[str, str]:
    """Our environment, with the exchange's settings from `settings` alone."""
    others = {name: value for name, value in os.environ.items() if not name.startswith("EXCHANGE_")}
    ours = {f"EXCHANGE_{name.upper()}": _plain(value) for name, value in settings if value is not None}
    return others | ours | {"PYTHONUNBUFFERED": "1"}


def _plain(value: object) -> str:
    return value.get_secret_value() if isinstance(value, SecretStr) else str(value)

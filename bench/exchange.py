"""A whole exchange for a benchmark: started in a folder of its own, spoken to over its public API."""

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg

from stack.ports import free_port

ROOT = Path(__file__).parent.parent
READY_SECONDS = 90
PASSWORD = "benchmark password 1"
Json = dict[str, Any]


@dataclass(frozen=True)
class Addresses:
    """Where a running exchange answers."""

    api: str
    database: str
    temporal: str
    admin_password: str
    stack_pid: int


@dataclass(frozen=True)
class Trader:
    """A registered, funded user."""

    user_id: int
    headers: dict[str, str]


@contextmanager
def running_exchange(settings: Mapping[str, str] | None = None) -> Iterator[Addresses]:
    """`python -m stack` in a temporary folder, ready; stopped in the end. `settings` are environment variables."""
    with tempfile.TemporaryDirectory(prefix="exchange-bench-") as folder:
        os.chmod(folder, 0o711)
        port = free_port()
        own = {"EXCHANGE_STATE_DIR": f"{folder}/state", "EXCHANGE_API_PORT": str(port)}
        environment = {**os.environ, **own, **(settings or {})}
        with open(f"{folder}/stack.log", "wb") as log:
            stack = subprocess.Popen([sys.executable, "-m", "stack"], cwd=ROOT, env=environment, stdout=log, stderr=log)
        try:
            _wait_ready(stack, Path(folder))
            yield _addresses(Path(folder, "state"), port, stack.pid)
        finally:
            stack.send_signal(signal.SIGTERM)
            stack.wait(60)


def _wait_ready(stack: "subprocess.Popen[bytes]", folder: Path) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while "ready" not in Path(folder, "stack.log").read_text():
        if stack.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"The exchange did not start: {Path(folder, 'stack.log').read_text()[-2000:]}")
        time.sleep(0.1)


def _addresses(state: Path, port: int, stack_pid: int) -> Addresses:
    lines = (state / "environment").read_text().splitlines()
    values = {name: value.strip("'") for name, _, value in (line.partition("=") for line in lines)}
    return Addresses(
        f"http://127.0.0.1:{port}",
        values["EXCHANGE_DATABASE_URL"],
        values["EXCHANGE_TEMPORAL_ADDRESS"],
        (state / "admin-password").read_text().strip(),
        stack_pid,
    )


class Api:
    """The public API from outside."""

    def __init__(self, session: aiohttp.ClientSession, addresses: Addresses) -> None:
        self._session = session
        self._addresses = addresses

    async def call(self, method: str, path: str, headers: dict[str, str] | None = None, body: object = None) -> Any:
        """The decoded answer. Raises RuntimeError when it is not a success."""
        async with self._session.request(method, self._addresses.api + path, headers=headers, json=body) as answer:
            document = await answer.json(content_type=None)
            if answer.status >= 300:
                raise RuntimeError(f"{method} {path}: {answer.status} {document}")
            return document

    async def login(self, email: str, password: str) -> dict[str, str]:
        """Headers of a signed-in user."""
        answer = await self.call("POST", "/api/auth/login", body={"email": email, "password": password})
        return {"Authorization": f"Bearer {answer['accessToken']}"}

    async def admin(self) -> dict[str, str]:
        """Headers of the operator."""
        return await self.login("admin@exchange.local", self._addresses.admin_password)

    async def traders(self, count: int, deposit: str) -> list[Trader]:
        """New users with money."""
        admin = await self.admin()
        traders = []
        for number in range(count):
            email = f"trader{number}-{time.time_ns()}@bench.local"
            user = await self.call("POST", "/api/users", body={"email": email, "password": PASSWORD})
            transfer = {"userId": user["userId"], "asset": "USDT", "amount": deposit, "reference": email}
            await self.call("POST", "/api/ledger/deposits", admin, transfer)
            traders.append(Trader(int(user["userId"]), await self.login(email, PASSWORD)))
        return traders

    async def audit_is_clean(self) -> bool:
        """The ledger audit's verdict."""
        report = await self.call("GET", "/api/admin/ledger/audit", await self.admin())
        for check in report["checks"]:
            if not check["ok"]:
                print("AUDIT:", check["name"], check["detail"])
        return bool(report["ok"])


@asynccontextmanager
async def open_api(addresses: Addresses, connections: int) -> AsyncIterator[Api]:
    """An API client with up to `connections` connections kept alive."""
    connector = aiohttp.TCPConnector(limit=connections)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=120)) as session:
        yield Api(session, addresses)


async def wait_settled(database: str, order_ids_from: int) -> int:
    """Until every order from `order_ids_from` on has left the pipeline and settlement stands at the engine's head.

    Answers how many of them were filled in full.
    """
    conn = await asyncpg.connect(database)
    try:
        while True:
            busy = await conn.fetchval(
                "SELECT EXISTS (SELECT FROM orders.sagas WHERE NOT done) OR EXISTS ("
                " SELECT FROM matching.cursors m JOIN matching.sequencers s USING (instrument_id)"
                " LEFT JOIN matching.consumers c ON c.instrument_id = m.instrument_id AND c.consumer = 'settlement'"
                " WHERE m.command_seq < s.last_seq OR coalesce(c.acked_seq, 0) < m.event_seq)"
            )
            if not busy:
                return int(
                    await conn.fetchval(
                        "SELECT count(*) FROM orders.orders WHERE order_id >= $1 AND status = 'FILLED'", order_ids_from
                    )
                )
            await asyncio.sleep(0.02)
    finally:
        await conn.close()


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of `values` do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

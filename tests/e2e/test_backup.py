"""A backup of Postgres alone, taken while the exchange trades, is enough to go on elsewhere (docs/operations.md)."""

import shutil
import signal
import subprocess
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from stack.servers import POSTGRES_BIN_PATH
from tests.stack_runner import RunningStack, stack_in, wait_until

BTC = "BTC-USDT-PERP"
PASSWORD = "correct horse battery"
SECONDS = 60
SECRETS = ("admin-password", "api-key-secrets", "internal-token", "jwt-ed25519.pem")


@dataclass(frozen=True)
class Client:
    """A client of a stack; `token` is sent when there is one."""

    stack: RunningStack
    token: str = ""

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """The JSON of a call that must succeed."""
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        url = f"{self.stack.api_url}{path}"
        answer = httpx.request(method, url, json=body, headers=headers, trust_env=False, timeout=30)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def sign_in(self, email: str, password: str) -> "Client":
        """The same, as this user."""
        answer = self.call("POST", "/api/auth/login", {"email": email, "password": password})
        return Client(self.stack, answer["accessToken"])

    def place(self, side: str) -> dict[str, Any]:
        """An order that meets others of this test."""
        order = {"instrumentId": BTC, "side": side, "type": "LIMIT", "quantity": "0.001", "price": "60000"}
        view: dict[str, Any] = self.call("POST", "/api/orders?wait=placed", order)
        return view


def admin_of(stack: RunningStack, state: Path) -> Client:
    return Client(stack).sign_in("admin@exchange.local", (state / "admin-password").read_text().strip())


def trader(admin: Client, email: str) -> Client:
    """A new user with money."""
    user = Client(admin.stack).call("POST", "/api/users", {"email": email, "password": PASSWORD})
    transfer = {"userId": user["userId"], "asset": "USDT", "amount": "1000", "reference": email}
    admin.call("POST", "/api/ledger/deposits", transfer)
    return Client(admin.stack).sign_in(email, PASSWORD)


def position(client: Client) -> str:
    rows = client.call("GET", "/api/positions")
    return next((f"{row['side']} {row['quantity']}" for row in rows if row["quantity"] != "0"), "none")


def is_clean(admin: Client) -> bool:
    report = admin.call("GET", "/api/admin/ledger/audit")
    assert report["ok"], report
    return not any(check["detail"] for check in report["checks"])


def back_up(state: Path, target: Path) -> None:
    """Everything that a new stack needs: the database and the secrets."""
    target.mkdir(mode=0o700)
    # The socket may lie elsewhere, where the folder's path is too long for one.
    environment = dict(line.split("=", 1) for line in (state / "environment").read_text().splitlines())
    sockets = environment["EXCHANGE_DATABASE_URL"].strip("'").split("host=")[1]
    where = ["-h", sockets, "-U", "postgres", "-D", str(target / "postgres")]
    subprocess.run([POSTGRES_BIN_PATH / "pg_basebackup", *where, "-X", "stream", "-c", "fast"], check=True)
    subprocess.run([POSTGRES_BIN_PATH / "pg_verifybackup", "-q", target / "postgres"], check=True)
    for name in SECRETS:
        shutil.copy(state / name, target / name)


def test_a_restored_exchange_settles_what_was_open_and_its_books_are_clean(tmp_path: Path) -> None:
    emails = [f"{uuid.uuid4().hex}@example.com" for _ in range(2)]
    state, copy = tmp_path / "state", tmp_path / "copy"
    with stack_in(state, tmp_path / "first") as stack:
        stack.wait_until_ready()
        admin = admin_of(stack, state)
        wait_until(
            lambda: httpx.get(f"{stack.api_url}/api/market/mark-price/{BTC}", trust_env=False).is_success,
            SECONDS,
            "mark",
        )
        admin.call("POST", f"/api/admin/mark-price/{BTC}", {"price": "60000"})
        buyer, seller = (trader(admin, email) for email in emails)
        # Matched, but nobody settles it before the backup.
        stack.process("worker").send_signal(signal.SIGSTOP)
        buyer.place("BUY")
        seller.place("SELL")
        assert position(buyer) == "none"
        back_up(state, copy)
        stack.process("worker").send_signal(signal.SIGCONT)
    with stack_in(copy, tmp_path / "second") as stack:
        stack.wait_until_ready()
        admin = admin_of(stack, copy)
        # Tokens of before are good: key and sessions came along.
        buyer, seller = Client(stack, buyer.token), Client(stack, seller.token)
        wait_until(lambda: position(buyer) == "LONG 0.001", SECONDS, "the trade to be settled")
        assert position(seller) == "SHORT 0.001"
        admin.call("POST", f"/api/admin/mark-price/{BTC}", {"price": "60000"})
        assert seller.place("BUY")["status"] == "PLACED"
        assert buyer.place("SELL")["status"] == "FILLED"
        wait_until(lambda: position(buyer) == "none", SECONDS, "the new trade to be settled")
        wait_until(lambda: is_clean(admin), SECONDS, "nothing in motion")

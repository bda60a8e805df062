"""`python deploy/rehearse.py`: the production topology by hand, for machines without a container engine.

Builds what the Dockerfile would build (the files it copies, the packages of requirements-runtime.lock in an environment
of their own), starts Postgres, Valkey and Temporal apart, and then runs every service of docker-compose.yml by its own
command, environment and health check: set-up, engine, two workers, market, two apis. Trades, kills a worker and an
engine under way, has a request signed with an API key, and ends with a clean audit. Leaves nothing behind.
"""

import asyncio
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
from cryptography.fernet import Fernet
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from client import ApiKey  # noqa: E402 - found by the line above
from stack import servers  # noqa: E402
from stack.ports import free_port  # noqa: E402

BTC = "BTC-USDT-PERP"
HEALTHY_SECONDS = 90
STOP_SECONDS = 30
PASSWORD = "correct horse battery"
# In the order in which compose starts them, by what they depend on.
PROCESSES = (
    "engine-1",
    "worker-1",
    "worker-2",
    "market-1",
    "api-1",
    "api-2",
)
_BEGAN = time.monotonic()


def say(line: str) -> None:
    """Tell, with the seconds since the start."""
    print(f"{time.monotonic() - _BEGAN:6.1f} s  {line}", flush=True)


def build(image: Path) -> Path:
    """The image's files in `image` and its packages beside it; the folder of its programs."""
    instructions = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    for sources, target in re.findall(r"^COPY (?!--from)(.+) (\S+)$", instructions, re.MULTILINE):
        for source in sources.split():
            whole = ROOT / source
            if whole.is_dir():
                shutil.copytree(whole, image / target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(whole, image / source)
    packages = image.with_name("packages")
    subprocess.run([sys.executable, "-m", "venv", packages], check=True)
    lock = image / "requirements-runtime.lock"
    pip = str(packages / "bin/pip")
    install = [pip, "install", "-q", "--disable-pip-version-check", "--require-hashes", "-r", str(lock)]
    subprocess.run(install, check=True, stderr=subprocess.DEVNULL)
    return packages / "bin"


class Host:
    """The one host on which everything runs; `secrets` are the variables that compose wants."""

    def __init__(self, folder: Path, programs: Path, addresses: Mapping[str, str]) -> None:
        self._folder = folder
        self._programs = programs
        self._addresses = addresses
        self._services = YAML(typ="safe").load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))["services"]
        self._variables = {name: secrets.token_hex(16) for name in ("EXCHANGE_INTERNAL_TOKEN", "VALKEY_PASSWORD")}
        self._variables |= {name: secrets.token_hex(16) for name in ("POSTGRES_PASSWORD", "EXCHANGE_ADMIN_PASSWORD")}
        self.ports = {name: free_port() for name in PROCESSES}
        self._temporal_ports = {name: free_port() for name in PROCESSES}
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        key = Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        (folder / "jwt-key").write_bytes(key)
        (folder / "api-key-secrets").write_bytes(Fernet.generate_key())

    @property
    def admin_password(self) -> str:
        """What compose was given for the operator."""
        return self._variables["EXCHANGE_ADMIN_PASSWORD"]

    def environment(self, name: str) -> dict[str, str]:
        """The environment of a container, its addresses and ports being those of this host."""
        service = self._services[name.rsplit("-", 1)[0] if name in PROCESSES else name]
        values = {key: self._filled(str(value)) for key, value in service["environment"].items()}
        values |= {key: value for key, value in self._addresses.items() if key in values}
        values = {key: value.replace("/run/secrets", str(self._folder)) for key, value in values.items()}
        values["EXCHANGE_STATE_DIR"] = str(self._folder / name)
        if name in PROCESSES:
            own = "EXCHANGE_API_PORT" if name.startswith("api") else "EXCHANGE_METRICS_PORT"
            values[own] = str(self.ports[name])
            if "EXCHANGE_TEMPORAL_METRICS_PORT" in values:
                values["EXCHANGE_TEMPORAL_METRICS_PORT"] = str(self._temporal_ports[name])
        # What the image itself sets, and nothing of ours.
        return values | {
            "PATH": f"{self._programs}:/usr/bin:/bin",
            "PYTHONUNBUFFERED": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        }

    def _filled(self, value: str) -> str:
        """With compose's variables in their places. Raises KeyError for a secret that is not there."""

        def fill(match: re.Match[str]) -> str:
            name, rest = match.group(1), match.group(2)
            return self._variables[name] if rest.startswith(":?") else os.environ.get(name) or rest.removeprefix(":-")

        return re.sub(r"\$\{(\w+)([^}]*)\}", fill, value)

    def once(self, name: str) -> None:
        """Run a container to its end."""
        subprocess.run(self._command(name), cwd=self._folder / "image", env=self.environment(name), check=True)

    def start(self, name: str) -> None:
        """Start a container and wait until its health check passes."""
        with (self._folder / f"{name}.log").open("ab") as log:
            self._running[name] = subprocess.Popen(
                [*servers.launcher(), *self._command(name)],
                cwd=self._folder / "image",
                env=self.environment(name),
                stdout=log,
                stderr=log,
            )
        end = time.monotonic() + HEALTHY_SECONDS
        while not self.is_healthy(name):
            if self._running[name].poll() is not None or time.monotonic() > end:
                raise SystemExit(f"{name} is not healthy: {(self._folder / f'{name}.log').read_text()[-2000:]}")
            time.sleep(0.5)
        say(f"{name} is healthy on port {self.ports[name]}")

    def is_healthy(self, name: str) -> bool:
        """What the image's HEALTHCHECK says."""
        probe = [str(self._programs / "python"), "-m", "telemetry.probe"]
        where, environment = self._folder / "image", self.environment(name)
        return subprocess.run(probe, cwd=where, env=environment, capture_output=True, check=False).returncode == 0

    def _command(self, name: str) -> list[str]:
        words: list[str] = self._services[name.rsplit("-", 1)[0] if name in PROCESSES else name]["command"]
        return [str(self._programs / "python") if words[0] == "python" else "/bin/sh", *words[1:]]

    def kill(self, name: str) -> None:
        """kill -9."""
        child = self._running.pop(name)
        child.kill()
        child.wait()

    def stop(self) -> None:
        """SIGTERM to all, last started first; says who does not leave in time."""
        for name, child in reversed(self._running.items()):
            child.terminate()
            try:
                say(f"{name} stopped with status {child.wait(STOP_SECONDS)}")
            except subprocess.TimeoutExpired:
                say(f"{name} did not stop within {STOP_SECONDS} s")
                child.kill()
                child.wait()
        self._running.clear()


class Visitor:
    """A client of one of the apis."""

    def __init__(self, url: str) -> None:
        self.client = httpx.Client(base_url=url, trust_env=False, timeout=30)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The JSON of a POST that must succeed."""
        answer = self.client.post(path, json=body)
        if not answer.is_success:
            raise SystemExit(f"POST {path}: {answer.status_code} {answer.text}")
        return answer.json()

    def sign_in(self, email: str, password: str) -> None:
        """Send this user's token from now on."""
        token = self.post("/api/auth/login", {"email": email, "password": password})["accessToken"]
        self.client.headers["Authorization"] = f"Bearer {token}"


def trade(host: Host, what: str) -> None:
    """Two new users, one at each api, trade with each other."""
    admin = Visitor(f"http://127.0.0.1:{host.ports['api-1']}")
    admin.sign_in("admin@exchange.local", host.admin_password)
    admin.post(f"/api/admin/mark-price/{BTC}", {"price": "60000"})
    statuses = []
    for api, side in (("api-1", "BUY"), ("api-2", "SELL")):
        user = Visitor(f"http://127.0.0.1:{host.ports[api]}")
        email = f"{uuid.uuid4().hex}@example.com"
        user_id = user.post("/api/users", {"email": email, "password": PASSWORD})["userId"]
        transfer = {"userId": user_id, "asset": "USDT", "amount": "1000", "reference": email}
        admin.post("/api/ledger/deposits", transfer)
        user.sign_in(email, PASSWORD)
        order = {"instrumentId": BTC, "side": side, "type": "LIMIT", "quantity": "0.001", "price": "60000"}
        statuses.append(user.post("/api/orders?wait=placed", order)["status"])
    if statuses != ["PLACED", "FILLED"]:
        raise SystemExit(f"Expected PLACED and FILLED, was {statuses}")
    report: dict[str, Any] = {}
    for _ in range(60):
        report = admin.client.get("/api/admin/ledger/audit").json()
        if report["ok"] and not any(check["detail"] for check in report["checks"]):
            say(f"{what}: traded, audit of {len(report['checks'])} checks clean")
            return
        time.sleep(0.5)
    raise SystemExit(f"Expected a clean audit, was {report}")


def sign(host: Host) -> None:
    """A user makes an API key at one api, and a program signs with it at the other."""
    user = Visitor(f"http://127.0.0.1:{host.ports['api-1']}")
    email = f"{uuid.uuid4().hex}@example.com"
    user.post("/api/users", {"email": email, "password": PASSWORD})
    user.sign_in(email, PASSWORD)
    made = user.post("/api/auth/api-keys", {"label": "bot", "algorithm": "HMAC_SHA256", "permissions": ["READ"]})
    headers = ApiKey.with_secret(made["keyId"], made["secret"]).headers("GET", "/api/users/me", b"")
    program = Visitor(f"http://127.0.0.1:{host.ports['api-2']}")
    answer = program.client.get("/api/users/me", headers=headers)
    if answer.status_code != httpx.codes.OK or answer.json()["email"] != email:
        raise SystemExit(f"A request signed with an API key: {answer.status_code} {answer.text}")
    say("an API key with a secret, made at api-1, signed a request at api-2")


@contextmanager
def running_servers(folder: Path) -> Iterator[dict[str, str]]:
    """Postgres, Valkey and Temporal, started apart; the settings that lead to them."""
    parts = [servers.postgres(folder), servers.valkey(folder), servers.temporal(folder, free_port(), None)]
    children = []
    try:
        for part in parts:
            with (folder / f"{part.process.name}.log").open("wb") as log:
                children.append((part, subprocess.Popen(part.process.command, stdout=log, stderr=log)))
        for part in parts:
            asyncio.run(servers.wait_until_ready(part.endpoint, HEALTHY_SECONDS))
            say(f"{part.endpoint.name} answers")
        names = ("EXCHANGE_DATABASE_URL", "EXCHANGE_REDIS_URL", "EXCHANGE_TEMPORAL_ADDRESS")
        yield dict(zip(names, (part.endpoint.url for part in parts), strict=True))
    finally:
        for part, child in reversed(children):
            child.send_signal(part.process.stop_signal)
            child.wait(STOP_SECONDS)


def main() -> None:
    """The rehearsal."""
    with tempfile.TemporaryDirectory(prefix="rehearsal-") as name:
        folder = Path(name)
        (folder / "image").mkdir()
        programs = build(folder / "image")
        packages = subprocess.run(
            [programs / "pip", "list", "--format=freeze"], capture_output=True, text=True, check=True
        )
        say(f"image built: {len(packages.stdout.splitlines())} packages, {_megabytes(folder):.0f} MB")
        with running_servers(folder) as addresses:
            host = Host(folder, programs, addresses)
            host.once("set-up")
            host.once("set-up")
            say("set-up ran, and once more without harm")
            try:
                for process in PROCESSES:
                    host.start(process)
                trade(host, "all up")
                sign(host)
                host.kill("worker-1")
                trade(host, "one worker killed")
                host.kill("engine-1")
                host.start("engine-1")
                trade(host, "engine killed and started anew")
            finally:
                with suppress(KeyboardInterrupt):
                    host.stop()
    say("nothing is left")


def _megabytes(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink()) / 1e6


if __name__ == "__main__":
    main()

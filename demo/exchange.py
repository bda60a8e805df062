"""The exchange as any client sees it: REST and the user's WebSocket."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import httpx
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake

CONNECTIONS_MAX = 24
REQUEST_SECONDS = 15.0
# For so long a restart of the exchange is waited for.
PATIENCE_SECONDS = 30.0
PAUSE_SECONDS = 0.5
BUSY = (httpx.codes.TOO_MANY_REQUESTS, httpx.codes.SERVICE_UNAVAILABLE)


class DemoError(Exception):
    """The demo cannot go on; the message says why in one line."""


class Refused(DemoError):  # noqa: N818, it is an answer rather than a fault
    """The exchange said no: `code` of its problem document."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(f"{code}: {detail}")
        self.code = code


@dataclass(slots=True)
class Account:
    """Someone who can sign in."""

    email: str
    password: str
    user_id: str = ""
    token: str = ""


class Exchange:
    """Calls of the public API. `on_busy` hears of each answer that asks to try again, and of each lost connection."""

    def __init__(self, url: str, on_busy: Callable[[str], None]) -> None:
        self.url = url.rstrip("/")
        self._on_busy = on_busy
        self._http = httpx.AsyncClient(
            base_url=self.url,
            timeout=REQUEST_SECONDS,
            limits=httpx.Limits(max_connections=CONNECTIONS_MAX, max_keepalive_connections=CONNECTIONS_MAX),
            trust_env=False,
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def require_ready(self) -> None:
        """Raises DemoError unless the exchange runs and is ready."""
        hint = f"No exchange is ready at {self.url}: start it with `make run`, or name another with --url"
        try:
            answer = await self._http.get("/health/ready")
        except (httpx.TransportError, httpx.InvalidURL) as error:
            raise DemoError(f"{hint} ({type(error).__name__})") from None
        if answer.status_code != httpx.codes.OK:
            raise DemoError(f"{hint} (it answers {answer.status_code})")

    async def sign_in(self, account: Account) -> None:
        """Get a new access token. Raises Refused."""
        body = {"email": account.email, "password": account.password}
        account.token = (await self.call("POST", "/api/auth/login", json=body))["accessToken"]

    async def register(self, account: Account) -> None:
        """Create the account and sign in. An account that exists already has to have the same password."""
        body = {"email": account.email, "password": account.password}
        try:
            await self.call("POST", "/api/users", json=body)
        except Refused as refusal:
            # A registration whose answer was lost is sent again.
            if refusal.code != "EMAIL_ALREADY_EXISTS":
                raise
        await self.sign_in(account)
        account.user_id = (await self.call("GET", "/api/users/me", account))["userId"]

    async def call(
        self,
        method: str,
        path: str,
        account: Account | None = None,
        json: object = None,
        params: Mapping[str, str] | None = None,
    ) -> Any:
        """The answer's document (None when empty).

        What is sent has to be safe to repeat: it is, while the exchange is busy or away, for PATIENCE_SECONDS. An
        expired token is renewed. Raises Refused, or DemoError when the exchange stays away.
        """
        end = time.monotonic() + PATIENCE_SECONDS
        renewed = False
        while True:
            headers = {"Authorization": f"Bearer {account.token}"} if account else None
            try:
                answer = await self._http.request(method, path, json=json, params=params, headers=headers)
            except httpx.TransportError as error:
                self._on_busy("CONNECTION_LOST")
                if time.monotonic() > end:
                    raise DemoError(f"The exchange at {self.url} went away: {type(error).__name__}") from None
            else:
                if answer.is_success:
                    return answer.json() if answer.content else None
                problem = _problem(answer)
                if answer.status_code == httpx.codes.UNAUTHORIZED and account is not None and not renewed:
                    renewed = True
                    await self.sign_in(account)
                    continue
                if answer.status_code not in BUSY or time.monotonic() > end:
                    raise problem
                self._on_busy(problem.code)
            await asyncio.sleep(PAUSE_SECONDS)

    async def user_messages(self, account: Account) -> AsyncIterator[dict[str, Any]]:
        """The user's messages, each with `channel` and `data`; `auth` comes first, again after every reconnection."""
        address = "ws" + self.url.removeprefix("http") + "/ws/user"
        lost_at: float | None = None
        while True:
            try:
                async with connect(address, proxy=None) as socket:
                    await socket.send(json.dumps({"op": "auth", "token": account.token}))
                    async for text in socket:
                        lost_at = None
                        yield json.loads(text)
            except (OSError, InvalidHandshake, ConnectionClosed):
                self._on_busy("CONNECTION_LOST")
            lost_at = lost_at or time.monotonic()
            if time.monotonic() - lost_at > PATIENCE_SECONDS:
                raise DemoError(f"The exchange at {self.url} accepts no sockets any more")
            await asyncio.sleep(PAUSE_SECONDS)
            await self.sign_in(account)


def _problem(answer: httpx.Response) -> Refused:
    try:
        document = answer.json()
    except ValueError:
        document = {}
    return Refused(str(document.get("code", answer.status_code)), str(document.get("detail", answer.reason_phrase)))

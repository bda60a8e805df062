"""The api behind a real server on a port of its own, for the tests of sockets."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime

import uvicorn
from fastapi import FastAPI
from websockets.asyncio.client import connect

from activities.identity.sessions import new_session, open_session
from api.app import create_app
from api.edge.server import server_config
from api.state import AppState
from domain.identity import Identity
from settings import Settings
from tests.integration.identity_app import complete

SMALL_BUFFER_BYTES = 8192


@dataclass(frozen=True)
class Api:
    """A running api: where it listens and what is behind it."""

    host: str
    app: FastAPI

    @property
    def state(self) -> AppState:
        """What the api holds."""
        state: AppState = self.app.state.exchange
        return state

    @property
    def ws(self) -> str:
        """Base address of the sockets."""
        return f"ws://{self.host}"

    @property
    def http(self) -> str:
        """Base address of the REST calls."""
        return f"http://{self.host}"

    async def sign_in(self, user_id: int, *roles: str) -> tuple[str, str]:
        """Open a session for a user; its access token and its id."""
        now = datetime.now(UTC)
        session = new_session(user_id, ["user", *roles], None, None, now)
        async with self.state.pool.acquire() as conn, conn.transaction():
            await open_session(conn, self.state.redis, session, "0" * 64)
        identity = Identity(user_id, frozenset(session.roles), session.session_id)
        return self.state.tokens.issue(identity, now), session.session_id


@asynccontextmanager
async def running_api(settings: Settings) -> AsyncIterator[Api]:
    """The api on a free port of this machine."""
    app = create_app(complete(settings, settings.state_dir))
    server = uvicorn.Server(server_config(app, "127.0.0.1", 0))
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL_BUFFER_BYTES)
    task = asyncio.create_task(server.serve([listener]))
    while not server.started:
        if task.done():
            task.result()
        await asyncio.sleep(0.01)
    host, port = listener.getsockname()
    try:
        yield Api(f"{host}:{port}", app)
    finally:
        server.should_exit = True
        await task
        listener.close()


def connect_slow_reader(api: Api, path: str) -> connect:
    """A socket with so little room on the way that a reader who stands still is noticed at once."""
    buffered = socket.socket()
    buffered.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BUFFER_BYTES)
    host, port = api.host.split(":")
    buffered.connect((host, int(port)))
    return connect(api.ws + path, sock=buffered, compression=None, max_queue=1)

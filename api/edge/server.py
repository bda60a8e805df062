"""How the application is served."""

import asyncio
import gc
import logging
import socket

import uvicorn
from fastapi import FastAPI

from api.edge.http_protocol import BoundedHttpProtocol
from api.sockets.protocol import OutletProtocol

GRACE_SECONDS = 10
# A peer that does not answer a ping is gone 40 s after its last sign of life; see docs/websocket.md.
PING_SECONDS = 20.0
PONG_SECONDS = 20.0
# Longer than proxies and clients keep an idle connection (60 s at most by default): a request that is sent in the
# moment in which we close it is lost, and a client that does not know whether it was done cannot just send it again.
IDLE_SECONDS = 75
SOCKET_MESSAGE_BYTES_MAX = 16 * 1024
GARBAGE_OBJECTS = 10_000
CONNECTIONS_A_TURN = 100
PAUSE_SECONDS = 1.0

log = logging.getLogger(__name__)


def server_config(app: FastAPI, host: str, port: int) -> uvicorn.Config:
    """Serve `app` on `host`:`port`; requests in flight at the end get ten seconds to finish."""
    return uvicorn.Config(
        app,
        host=host,
        port=port,
        loop="uvloop",
        http=BoundedHttpProtocol,
        # The application does that itself, for proxies it is told to trust.
        proxy_headers=False,
        server_header=False,
        ws=OutletProtocol,
        # Compression would be done anew for every client; what clients send is short.
        ws_per_message_deflate=False,
        ws_max_size=SOCKET_MESSAGE_BYTES_MAX,
        ws_ping_interval=PING_SECONDS,
        ws_ping_timeout=PONG_SECONDS,
        access_log=False,
        log_config=None,
        backlog=2048,
        timeout_keep_alive=IDLE_SECONDS,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )


class Server(uvicorn.Server):
    """Takes in every connection that waits, in each turn of the loop.

    uvloop takes one a turn, and a turn is long when there is much to do: then new connections would grow old in the
    kernel's queue, where nobody refuses them.
    """

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listeners: list[socket.socket] = []
        self._accepting: set[asyncio.Task[None]] = set()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, once the application is ready. Raises SystemExit when it is not, or when the address is taken."""
        self.listeners = sockets or [self.config.bind_socket()]
        await super().startup([])
        # What is there by now stays for ever, and is a hundred times more than what a moment's requests are made of.
        # The collector need not go through it again and again, least of all when there are many requests.
        gc.collect()
        gc.freeze()
        gc.set_threshold(GARBAGE_OBJECTS, *gc.get_threshold()[1:])
        for listener in self.listeners:
            listener.settimeout(0)
            listener.listen(self.config.backlog)
            self._listen_to(listener)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """No more connections; those that are there end as `uvicorn` lets them."""
        for listener in self.listeners:
            asyncio.get_running_loop().remove_reader(listener)
            listener.close()
        await super().shutdown([])

    def _listen_to(self, listener: socket.socket) -> None:
        if listener.fileno() >= 0:
            asyncio.get_running_loop().add_reader(listener, self._accept_all, listener)

    def _accept_all(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        for _ in range(CONNECTIONS_A_TURN):
            try:
                connection, _ = listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                # No file or memory is left for it: it stays in the queue, and waking up for it at once is of no use.
                log.error("A connection cannot be accepted: %s", error)
                loop.remove_reader(listener)
                loop.call_later(PAUSE_SECONDS, self._listen_to, listener)
                return
            task = loop.create_task(self._serve_connection(connection))
            self._accepting.add(task)
            task.add_done_callback(self._accepting.discard)

    async def _serve_connection(self, connection: socket.socket) -> None:
        connection.settimeout(0)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await asyncio.get_running_loop().connect_accepted_socket(self._new_protocol, connection)

    def _new_protocol(self) -> asyncio.Protocol:
        return BoundedHttpProtocol(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)

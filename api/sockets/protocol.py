"""The server's WebSocket protocol: uvicorn's, with a way for one message to many sockets and an end for dead peers.

An ASGI server frames a message anew for every socket, behind a task that must be woken for it: more than half of the
CPU of a fan-out. Frames of a server are not masked, and ours are not compressed, so one frame serves all sockets.
"""

from asyncio import BaseTransport
from collections.abc import Callable
from functools import lru_cache
from typing import Protocol, cast

from starlette.websockets import WebSocket
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import Frame, Opcode
from websockets.http11 import Request
from websockets.protocol import State

_EXTENSION = "exchange.outlet"
# A peer that reads nothing takes no closing frame either, and keeps the connection and its buffer for as long as the
# kernel lets it. Later than uvicorn's own 10 s for the closing handshake.
ABORT_SECONDS = 15.0
# As much as the transport buffers before it says stop.
TURN_BYTES_MAX = 64 * 1024


class Outlet(Protocol):
    """Where a socket's messages leave, without waiting."""

    on_writable: Callable[[], None] | None
    """Called when messages can be written again."""

    @property
    def can_write(self) -> bool:
        """Whether the socket is open and what it has been given is (nearly) sent."""

    def write(self, payload: bytes) -> None:
        """Send a text message. Given the same object again, for another socket, it is framed only once."""


class OutletProtocol(WebSocketsSansIOProtocol):
    """uvicorn's protocol as an Outlet; a connection that does not end by itself is aborted.

    What is written in one turn of the event loop leaves in one system call, which costs more than all the rest.
    """

    on_writable: Callable[[], None] | None = None
    _bytes = 0

    def connection_made(self, transport: BaseTransport) -> None:
        """A new connection."""
        super().connection_made(transport)
        self._frames: list[bytes] = []

    @property
    def can_write(self) -> bool:
        """See Outlet."""
        return self._bytes < TURN_BYTES_MAX and self.writable.is_set() and self.conn.state is State.OPEN

    def write(self, payload: bytes) -> None:
        """See Outlet."""
        frame = _text_frame(payload)
        if not self._frames:
            self.loop.call_soon(self._send_frames)
        self._frames.append(frame)
        self._bytes += len(frame)

    def _send_frames(self) -> None:
        frames, was_full = self._frames, self._bytes >= TURN_BYTES_MAX
        self._frames, self._bytes = [], 0
        # Nothing may follow a closing frame.
        if self.conn.state is State.OPEN:
            self.transport.write(frames[0] if len(frames) == 1 else b"".join(frames))
        if was_full:
            self._tell_writable()

    def _tell_writable(self) -> None:
        if self.on_writable is not None and self.can_write:
            self.on_writable()

    def handle_connect(self, event: Request) -> None:
        """Offer this outlet to the application, which starts later."""
        super().handle_connect(event)
        if self.response.status_code == 101:
            cast(dict[str, object], self.scope["extensions"])[_EXTENSION] = self

    def resume_writing(self) -> None:
        """There is room again."""
        super().resume_writing()
        self._tell_writable()

    def keepalive_timeout(self) -> None:
        """No answer to a ping."""
        super().keepalive_timeout()
        self._abort_later()

    def on_task_complete(self, task: object) -> None:
        """The application is done with this socket."""
        super().on_task_complete(task)  # type: ignore[arg-type]  # it is only taken out of a set
        self._abort_later()

    def _abort_later(self) -> None:
        self.loop.call_later(ABORT_SECONDS, self.transport.abort)


def outlet_of(websocket: WebSocket) -> Outlet:
    """The outlet of an accepted socket. Raises KeyError when the server runs without OutletProtocol."""
    return cast(Outlet, websocket.scope["extensions"][_EXTENSION])


# As many as are on their way at once; a snapshot may be large.
@lru_cache(64)
def _text_frame(payload: bytes) -> bytes:
    return Frame(Opcode.TEXT, payload).serialize(mask=False)

"""The HTTP/1.1 protocol of the api's sockets: uvicorn's, with bounds on the head of a request, and quick refusals.

httptools keeps whatever a client sends as a head, for as long as it takes to send it; the ASGI application has no say
before the head is complete. Bodies are bounded by the gateway.

Under overload most requests are refused. Through parser, task, application and middleware each refusal would cost a
third of an order, and five times the orders would leave no time for any.
"""

import asyncio
import math
import re
from functools import partial
from typing import Any, NamedTuple, cast

from starlette.types import Scope
from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from api.edge.gateway import UNLIMITED, count_in, overload_answer
from api.edge.metering import count_refusal
from api.limits.load import Load

HEAD_SECONDS_MAX = 10.0
HEAD_BYTES_MAX = 64 * 1024
# Of Content-Length: below ten MB. What is longer the gateway refuses for its length.
LENGTH_DIGITS_MAX = 7
# A whole head in the strictest reading of RFC 9112: in any other, somebody on the way may see another end of the
# request than we do. Probes are never refused, and after an answer to a HEAD there would be no body.
_PLAIN_HEAD = re.compile(
    rb"(?:GET|POST|PUT|PATCH|DELETE) (?!%b)/[!-~]*+ HTTP/1\.1\r\n(?:[\w!#$%%&'*+.^`|~-]++:[\t -~]*+\r\n)*+\r\n"
    % re.escape(UNLIMITED.encode()),
    re.ASCII,
)
# Headers that say how long the request is, whether the connection goes on after it, and what it is called.
_TELLING = re.compile(
    rb"(?i)\n(content-length|transfer-encoding|connection|expect|upgrade|x-request-id):[ \t]*([^\r\n]*)"
)


class Plain(NamedTuple):
    """A plain request: its id, empty if it has none, and how many bytes of its body are still to come."""

    request_id: bytes
    missing: int


class BoundedHttpProtocol(HttpToolsProtocol):
    """Closes connections whose request line and headers take more than 10 seconds or 64 KiB; answers requests for which
    the load is too high by itself."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._deadline: asyncio.TimerHandle | None = None
        self._head_bytes = 0
        self._is_between_requests = True
        # An answer is on its way, to a request that the parser has not seen; and what has come after it.
        self._is_refusing = False
        self._early = b""
        # Bytes still to come of the body of a request that was refused.
        self._skipped = 0
        self._refused_at = -math.inf
        self._load: Load = self.config.app.state.load  # type: ignore[union-attr]  # a FastAPI (api/edge/server.py)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        """A connection must begin with a request."""
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """The peer or we have closed."""
        self._head_is_there()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse, and refuse: what there is no time for, and a head that grows without end."""
        if self._is_refusing:
            self._early += data
            if len(self._early) > HEAD_BYTES_MAX:
                self.flow.pause_reading()
            return
        if self._skipped:
            skipped = min(self._skipped, len(data))
            self._skipped -= skipped
            data = data[skipped:]
            if not data:
                return
        # Answers come in the order of the requests: one that has none yet goes first.
        is_free = self._is_between_requests and (self.cycle is None or self.cycle.response_complete)
        if is_free and self._load.is_too_high:
            plain = refusable(data)
            if plain is not None:
                self._refuse_unread(data, plain)
                return
        super().data_received(data)
        if self._deadline is not None:
            self._head_bytes += len(data)
            if self._head_bytes > HEAD_BYTES_MAX:
                self._refuse()

    def on_message_begin(self) -> None:
        """The first byte of a request."""
        self._is_between_requests = False
        self._expect_head()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """The head is complete."""
        self._head_is_there()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The last byte of a request."""
        self._is_between_requests = True
        super().on_message_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        count_in(cast(Scope, cycle.scope), self._load)
        self._load.beginnings.put(partial(super()._start_asgi_task, cycle, app))

    def _refuse_unread(self, data: bytes, plain: Plain) -> None:
        self._head_is_there()
        self._is_refusing, self._skipped = True, plain.missing
        self._load.refusals.put(partial(self._answer_unread, data, plain.request_id))

    def _answer_unread(self, data: bytes, request_id: bytes) -> None:
        self._is_refusing = False
        if self.transport.is_closing():
            return
        method, path, _ = data.split(b" ", 2)
        answer = overload_answer(path, self.scheme or "http", request_id, self.server_state.default_headers)
        self.transport.write(answer)
        count_refusal(method.decode())
        self._load.refused += 1
        # Setting the clock anew for each would take a quarter of the time.
        self._refused_at = self.loop.time()
        if self.timeout_keep_alive_task is None:
            self.timeout_keep_alive_handler()
        if self._early:
            early, self._early = self._early, b""
            self.flow.resume_reading()
            self.data_received(early)

    def timeout_keep_alive_handler(self) -> None:
        """Close, unless a request was refused meanwhile: then look again in time."""
        self.timeout_keep_alive_task = None
        rest = self._refused_at + self.timeout_keep_alive - self.loop.time()
        if rest > 0:
            self.timeout_keep_alive_task = self.loop.call_later(rest, self.timeout_keep_alive_handler)
        elif not self._is_refusing:
            super().timeout_keep_alive_handler()

    def _expect_head(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(HEAD_SECONDS_MAX, self._refuse)

    def _head_is_there(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = None
        self._head_bytes = 0

    def _refuse(self) -> None:
        self._head_is_there()
        if self.transport is not None and not self.transport.is_closing():
            self.send_400_response("The head of the request is too long or too late.")


def refusable(data: bytes) -> Plain | None:
    """What there is to know of one plain request with nothing behind it, the end of whose body may be missing; None for
    all else, which takes the long way and is refused there."""
    head = _PLAIN_HEAD.match(data)
    if head is None:
        return None
    length, request_id = None, b""
    for name, value in _TELLING.findall(data, 0, head.end()):
        match name.lower():
            case b"content-length" if length is None and value.isdigit() and len(value) <= LENGTH_DIGITS_MAX:
                length = int(value)
            case b"x-request-id":
                request_id = value
            case _:
                return None
    missing = head.end() + (length or 0) - len(data)
    return Plain(request_id, missing) if missing >= 0 else None

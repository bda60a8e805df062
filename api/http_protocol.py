"""The HTTP/1.1 protocol of the api's sockets: uvicorn's, with bounds on the head of a request, and quick refusals.

httptools keeps whatever a client sends as a head, for as long as it takes to send it; the ASGI application has no say
before the head is complete. Bodies are bounded by the gateway.

Under overload most requests are refused. Through a task, the application and its middleware each refusal would cost a
third of an order, and five times the orders would leave no time for any.
"""

import asyncio
from functools import partial
from typing import Any, cast

from starlette.types import Scope
from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from api.gateway import may_begin, overload_answer
from api.load import Load
from api.metering import count_refusal

HEAD_SECONDS_MAX = 10.0
HEAD_BYTES_MAX = 64 * 1024


class BoundedHttpProtocol(HttpToolsProtocol):
    """Closes connections whose request line and headers take more than 10 seconds or 64 KiB; answers requests for which
    the load is too high by itself."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._deadline: asyncio.TimerHandle | None = None
        self._head_bytes = 0
        self._load: Load = self.config.app.state.load  # type: ignore[union-attr]  # a FastAPI (api/server.py)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        """A connection must begin with a request."""
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """The peer or we have closed."""
        self._head_is_there()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse, and refuse a head that grows without end."""
        super().data_received(data)
        if self._deadline is not None:
            self._head_bytes += len(data)
            if self._head_bytes > HEAD_BYTES_MAX:
                self._refuse()

    def on_message_begin(self) -> None:
        """The first byte of a request."""
        self._expect_head()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """The head is complete."""
        self._head_is_there()
        super().on_headers_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        scope = cast(Scope, cycle.scope)
        if may_begin(scope, self._load) or not _can_go_on_after_refusal(cycle):
            self._load.beginnings.put(partial(super()._start_asgi_task, cycle, app))
        else:
            self._load.refusals.put(partial(self._refuse_for_load, cycle))

    def _refuse_for_load(self, cycle: RequestResponseCycle) -> None:
        if self.transport.is_closing():
            return
        scope = cast(Scope, cycle.scope)
        self.transport.write(overload_answer(scope, self.server_state.default_headers))
        count_refusal(scope["method"])
        # What comes of a body after this is not kept.
        cycle.response_started = cycle.response_complete = True
        if not cycle.keep_alive:
            self.transport.close()
        self.on_response_complete()

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


def _can_go_on_after_refusal(cycle: RequestResponseCycle) -> bool:
    """Whether the connection is of use after an answer that does not wait for a body; else the gateway refuses."""
    return cycle.keep_alive and not cycle.waiting_for_100_continue and cycle.scope["method"] != "HEAD"

"""The HTTP/1.1 protocol of the api's sockets: uvicorn's, with bounds on the head of a request.

httptools keeps whatever a client sends as a head, for as long as it takes to send it; the ASGI application has no say
before the head is complete. Bodies are bounded by the gateway.
"""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_SECONDS_MAX = 10.0
HEAD_BYTES_MAX = 64 * 1024


class BoundedHttpProtocol(HttpToolsProtocol):
    """Closes connections whose request line and headers take more than 10 seconds or 64 KiB."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._deadline: asyncio.TimerHandle | None = None
        self._head_bytes = 0

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

"""Public answers that a proxy or a browser may keep for a moment (RFC 9111) and ask for again (RFC 9110, ETag)."""

import hashlib
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

# As fresh as one second ago: a thousand readers cost what one costs. Who needs it sooner has the WebSocket.
MAX_AGE_SECONDS = 1


class CachedRoute(APIRoute):
    """Every good answer says for how long it is good, and has a tag; nothing is sent twice to who names the tag."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The route's handler, its answers completed."""
        handle = super().get_route_handler()

        async def handle_cached(request: Request) -> Response:
            return _cached(request, await handle(request))

        return handle_cached


def _cached(request: Request, response: Response) -> Response:
    if response.status_code != 200:
        return response
    tag = f'"{hashlib.blake2b(response.body, digest_size=12).hexdigest()}"'
    headers = {"Cache-Control": f"public, max-age={MAX_AGE_SECONDS}", "ETag": tag}
    if _names(request.headers.get("if-none-match", ""), tag):
        return Response(status_code=304, headers=headers)
    response.headers.update(headers)
    return response


def _names(if_none_match: str, tag: str) -> bool:
    """Whether this header lists `tag`; proxies that compress mark it as weak."""
    listed = {item.strip().removeprefix("W/") for item in if_none_match.split(",")}
    return tag in listed or "*" in listed

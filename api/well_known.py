"""What others need to verify our access tokens."""

from typing import Any

from fastapi import APIRouter, Response

from api.state import State

router = APIRouter(prefix="/.well-known", tags=["auth"])


@router.get("/jwks.json")
async def jwks(state: State, response: Response) -> dict[str, list[dict[str, Any]]]:
    """The public keys whose access tokens are good (RFC 7517); the first one signs."""
    response.headers["Cache-Control"] = "public, max-age=300"
    return {"keys": state.tokens.public_keys()}

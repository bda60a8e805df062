"""What others need to verify our access tokens."""

from typing import Any

from fastapi import APIRouter, Response

from api.schema.models import ApiModel
from api.state import State

router = APIRouter(prefix="/.well-known", tags=["auth"])


class KeySet(ApiModel):
    """A JSON Web Key Set (RFC 7517)."""

    keys: list[dict[str, Any]]


@router.get("/jwks.json")
async def jwks(state: State, response: Response) -> KeySet:
    """The public keys whose access tokens are good (RFC 7517); the first one signs."""
    response.headers["Cache-Control"] = "public, max-age=300"
    return KeySet(keys=state.tokens.public_keys())

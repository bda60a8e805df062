"""Users: registration and one's own account."""

from fastapi import APIRouter

router = APIRouter(prefix="/api/users", tags=["users"])

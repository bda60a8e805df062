"""Credentials, sign-in and sessions."""

from fastapi import APIRouter

router = APIRouter(prefix="/api/auth", tags=["auth"])

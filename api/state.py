"""What one api process holds: its connections and the services built on them."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Annotated

from cryptography.fernet import MultiFernet
from fastapi import Depends
from redis.asyncio import Redis
from starlette.requests import HTTPConnection
from temporalio.client import Client

from api.desk.order_desk import OrderDesk, open_desk
from api.identity.passwords import Passwords
from api.identity.proofs import Proofs
from api.identity.sessions import SessionGuard
from api.identity.signatures import ApiKeys
from api.identity.tokens import AccessTokens, RefreshTokens, load_keys, load_private_keys
from api.identity.vault import open_vault
from api.limits.login_throttle import LoginThrottle
from api.limits.rate_limits import Limit, RateLimiter
from api.sockets.feeds import Feeds, open_feeds
from clients import connect_temporal, open_redis
from settings import Settings
from storage.db import Pool, open_pool


@dataclass(frozen=True)
class Limits:
    """How often somebody may call, by what they are known by."""

    address: Limit
    user: Limit
    api_key: Limit
    sign_in: Limit


@dataclass(frozen=True)
class AppState:
    """One of each per process; `app.state.exchange` holds it."""

    settings: Settings
    pool: Pool
    redis: Redis
    temporal: Client
    tokens: AccessTokens
    refresh_tokens: RefreshTokens
    proofs: Proofs
    passwords: Passwords
    throttle: LoginThrottle
    sessions: SessionGuard
    rates: RateLimiter
    limits: Limits
    keys: ApiKeys
    vault: MultiFernet | None
    feeds: Feeds
    desk: OrderDesk


@asynccontextmanager
async def open_state(settings: Settings) -> AsyncIterator[AppState]:
    """Connect to the servers; close everything at the end. Raises when one of them cannot be reached."""
    if settings.jwt_private_key_file is None:
        raise RuntimeError("EXCHANGE_JWT_PRIVATE_KEY_FILE is not set: start the stack, or name a PEM file")
    async with AsyncExitStack() as stack:
        key, others = load_keys(settings.jwt_private_key_file)
        proofs = Proofs(key, others)
        refresh_tokens = RefreshTokens(load_private_keys(settings.jwt_private_key_file), others)
        vault = open_vault(settings.api_key_secrets_file)
        passwords = Passwords()
        stack.callback(passwords.close)
        pool = await open_pool(settings.require_database_url(), size_min=2, size_max=10, name="api")
        stack.push_async_callback(pool.close)
        redis = open_redis(settings)
        stack.push_async_callback(redis.aclose)
        temporal = await connect_temporal(settings)
        sessions = SessionGuard(pool, redis)
        keys = ApiKeys(pool, redis, vault)
        feeds = await stack.enter_async_context(open_feeds(pool, redis, sessions, keys))
        desk = await stack.enter_async_context(open_desk(pool, redis, temporal))
        yield AppState(
            settings=settings,
            pool=pool,
            redis=redis,
            temporal=temporal,
            tokens=AccessTokens(key, others),
            refresh_tokens=refresh_tokens,
            proofs=proofs,
            passwords=passwords,
            throttle=LoginThrottle(redis, proofs),
            sessions=sessions,
            rates=RateLimiter(redis),
            limits=_limits(settings),
            keys=keys,
            vault=vault,
            feeds=feeds,
            desk=desk,
        )


def _limits(settings: Settings) -> Limits:
    def limit(name: str, per_second: float, burst_seconds: int) -> Limit:
        return Limit(name, per_second, max(1, int(per_second * burst_seconds)))

    return Limits(
        address=limit("address", settings.rate_limit_address, 2),
        user=limit("user", settings.rate_limit_user, 2),
        api_key=limit("api-key", settings.rate_limit_api_key, 2),
        sign_in=limit("sign-in", settings.rate_limit_sign_in, 10),
    )


async def app_state(connection: HTTPConnection) -> AppState:
    """The state of the application that serves this request or socket (async: FastAPI gives others a thread)."""
    state = connection.app.state.exchange
    assert isinstance(state, AppState)
    return state


State = Annotated[AppState, Depends(app_state)]

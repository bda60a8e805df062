"""`python -m api.bootstrap`: makes the operators' account what EXCHANGE_ADMIN_EMAIL and …_PASSWORD say, and gives the
insurance fund what it starts with (EXCHANGE_INSURANCE_FUND_SEED, in SEED_ASSET)."""

import asyncio
import logging
from datetime import UTC, datetime

from redis.asyncio import Redis

from activities.identity.auth import find_password, set_password
from activities.identity.sessions import revoke
from activities.identity.users import upsert_admin
from activities.ledger.insurance import seed_fund
from api.identity.passwords import Passwords
from clients import open_redis
from domain.identity import ADMIN_ROLE, valid_email
from domain.passwords import good_password
from logs import set_up_logging
from settings import Settings, get_settings, revealed
from storage.db import Pool, open_pool

log = logging.getLogger(__name__)

SEED_ASSET = "USDT"


async def bootstrap(settings: Settings, pool: Pool, redis: Redis) -> int:
    """Create the admin, or give it the password of the settings and end the sessions of the old one; its user id.

    The insurance fund is seeded, once per database. Nothing happens when all is so already. Raises RuntimeError when
    email or password will not do.
    """
    email, password = _account(settings)
    async with pool.acquire() as conn, conn.transaction():
        await seed_fund(conn, SEED_ASSET, settings.insurance_fund_seed)
    passwords = Passwords()
    try:
        credential = await find_password(pool, email)
        matched = await passwords.matches(password, credential.secret_hash if credential else None)
        if credential is not None and matched and ADMIN_ROLE in credential.roles and credential.status == "ACTIVE":
            return credential.user_id
        secret_hash = await passwords.hash(password)
    finally:
        passwords.close()
    async with pool.acquire() as conn, conn.transaction():
        user_id = await upsert_admin(conn, email)
        await set_password(conn, user_id, secret_hash)
        await revoke(conn, redis, user_id, session_id=None, reason="PASSWORD_CHANGED", now=datetime.now(UTC))
    log.info("admin %s is user %d", email, user_id)
    return user_id


def _account(settings: Settings) -> tuple[str, str]:
    try:
        email = valid_email(settings.admin_email)
    except ValueError as error:
        raise RuntimeError(f"EXCHANGE_ADMIN_EMAIL {error}") from error
    try:
        return email, good_password(revealed(settings.admin_password) or "", email)
    except ValueError as error:
        raise RuntimeError(f"EXCHANGE_ADMIN_PASSWORD {error}") from error


async def main() -> None:
    """Run once against the database of the environment."""
    settings = get_settings()
    set_up_logging(settings)
    async with (
        await open_pool(settings.require_database_url(), name="bootstrap") as pool,
        open_redis(settings) as redis,
    ):
        await bootstrap(settings, pool, redis)


if __name__ == "__main__":
    asyncio.run(main())

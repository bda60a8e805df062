"""`python -m api.bootstrap`: gives an exchange without operators the one that EXCHANGE_ADMIN_EMAIL and …_PASSWORD name,
and the insurance fund what it starts with (EXCHANGE_INSURANCE_FUND_SEED, in SEED_ASSET).

It runs with every start, and changes no account that there is: whoever has changed a leaked password, or locked an
operator, must not have it undone by a restart. `python -m api.bootstrap --reset` is for whoever is locked out.
"""

import argparse
import asyncio
import logging
from datetime import UTC, datetime

from redis.asyncio import Redis

from activities.identity.api_keys import revoke_keys, tell_key_changed
from activities.identity.auth import find_password, set_password
from activities.identity.sessions import revoke
from activities.identity.users import add_operator, first_operator
from activities.ledger.insurance import seed_fund
from api.identity.passwords import Passwords
from clients import open_redis
from domain.identity import ADMIN_ROLE, valid_email
from domain.passwords import good_password
from domain.problems import Problem
from logs import set_up_logging
from settings import Settings, get_settings, revealed
from storage.db import Pool, open_pool

log = logging.getLogger(__name__)

SEED_ASSET = "USDT"
RESET = "python -m api.bootstrap --reset"


async def bootstrap(settings: Settings, pool: Pool) -> int:
    """Make the first operator, unless there is one; the id of the one there is.

    The insurance fund is seeded, once per database. Raises RuntimeError when email or password will not do, or the
    email is a user's who is no operator.
    """
    async with pool.acquire() as conn, conn.transaction():
        await seed_fund(conn, SEED_ASSET, settings.insurance_fund_seed)
        operator = await first_operator(conn)
    if operator is not None:
        return _unchanged(settings, *operator)
    email, secret_hash = await _account(settings)
    async with pool.acquire() as conn, conn.transaction():
        operator = await first_operator(conn)
        if operator is not None:
            return _unchanged(settings, *operator)
        try:
            user_id = await add_operator(conn, email)
        except Problem:
            raise RuntimeError("EXCHANGE_ADMIN_EMAIL is that of a user who is no operator: name another") from None
        await set_password(conn, user_id, secret_hash)
    log.info("operator %s is user %d", email, user_id)
    return user_id


async def reset(settings: Settings, pool: Pool, redis: Redis) -> int:
    """Give the operator that EXCHANGE_ADMIN_EMAIL names EXCHANGE_ADMIN_PASSWORD, unlock it, end its sessions
    and API keys; the id.

    Raises RuntimeError when email or password will not do, or there is no such operator.
    """
    email, secret_hash = await _account(settings)
    credential = await find_password(pool, email)
    if credential is None or ADMIN_ROLE not in credential.roles:
        raise RuntimeError("EXCHANGE_ADMIN_EMAIL is not that of an operator")
    user_id = credential.user_id
    async with pool.acquire() as conn, conn.transaction():
        await set_password(conn, user_id, secret_hash)
        await revoke(conn, redis, user_id, session_id=None, reason="PASSWORD_CHANGED", now=datetime.now(UTC))
        ended = await revoke_keys(conn, user_id, None, datetime.now(UTC))
    await tell_key_changed(redis, *ended)
    log.warning("operator %s (user %d) has a new password, no lock, no session and no API key", email, user_id)
    return user_id


def _unchanged(settings: Settings, user_id: int, email: str) -> int:
    if email != settings.admin_email.strip().lower():
        log.warning("the first operator is %s, not EXCHANGE_ADMIN_EMAIL; nothing is changed", email)
    log.info("the first operator is user %d; `%s` gives a forgotten one its password", user_id, RESET)
    return user_id


async def _account(settings: Settings) -> tuple[str, str]:
    """The address, and the hash of the password."""
    try:
        email = valid_email(settings.admin_email)
    except ValueError as error:
        raise RuntimeError(f"EXCHANGE_ADMIN_EMAIL {error}") from error
    try:
        password = good_password(revealed(settings.admin_password) or "", email)
    except ValueError as error:
        raise RuntimeError(f"EXCHANGE_ADMIN_PASSWORD {error}") from error
    passwords = Passwords()
    try:
        return email, await passwords.hash(password)
    finally:
        passwords.close()


async def main() -> None:
    """Run once against the database of the environment."""
    parser = argparse.ArgumentParser(prog="python -m api.bootstrap", description=__doc__)
    parser.add_argument("--reset", action="store_true", help="give the operator the password of the settings")
    is_reset = parser.parse_args().reset
    settings = get_settings()
    set_up_logging(settings)
    async with await open_pool(settings.require_database_url(), name="bootstrap") as pool:
        if not is_reset:
            await bootstrap(settings, pool)
            return
        async with open_redis(settings) as redis:
            await reset(settings, pool, redis)


if __name__ == "__main__":
    asyncio.run(main())

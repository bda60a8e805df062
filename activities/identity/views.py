"""What the users service shows of its accounts."""

from storage.db import Connection, Pool


async def is_user(conn: Connection | Pool, user_id: int) -> bool:
    """Whether there is such an account, whatever its status."""
    return bool(await conn.fetchval("SELECT EXISTS (SELECT FROM users.v_users WHERE user_id = $1)", user_id))

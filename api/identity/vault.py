"""Secrets that we must be able to read again, encrypted at rest with Fernet (AES-128-CBC and HMAC-SHA256).

`python -m api.vault` encrypts all of them with the first key, so that the others may go: docs/identity.md.
"""

import asyncio
import logging
from pathlib import Path

from cryptography.fernet import Fernet, MultiFernet

from activities.identity.api_keys import replace_secrets
from logs import set_up_logging
from settings import get_settings
from storage.db import open_pool

log = logging.getLogger(__name__)


def open_vault(path: Path | None) -> MultiFernet | None:
    """The keys of a file, one a line: the first encrypts, all decrypt. None without a file. Raises OSError, ValueError
    when a line is no Fernet key."""
    if path is None:
        return None
    keys = [Fernet(line) for line in path.read_text(encoding="ascii").split()]
    if not keys:
        raise ValueError(f"Expected a Fernet key in {path}, was none")
    return MultiFernet(keys)


async def main() -> None:
    """Run once against the database of the environment. Raises InvalidToken, and changes nothing, when a secret is
    encrypted with a key that is not in the file."""
    settings = get_settings()
    set_up_logging(settings)
    vault = open_vault(settings.api_key_secrets_file)
    if vault is None:
        raise RuntimeError("EXCHANGE_API_KEY_SECRETS_FILE is not set")
    async with (
        await open_pool(settings.require_database_url(), name="vault") as pool,
        pool.acquire() as conn,
        conn.transaction(),
    ):
        count = await replace_secrets(conn, vault.rotate)
    log.info("%d secrets are encrypted with the first key", count)


if __name__ == "__main__":
    asyncio.run(main())

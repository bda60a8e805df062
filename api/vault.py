"""Secrets that we must be able to read again, encrypted at rest with Fernet (AES-128-CBC and HMAC-SHA256)."""

from pathlib import Path

from cryptography.fernet import Fernet, MultiFernet


def open_vault(path: Path | None) -> MultiFernet | None:
    """The keys of a file, one a line: the first encrypts, all decrypt. None without a file. Raises OSError, ValueError
    when a line is no Fernet key."""
    if path is None:
        return None
    keys = [Fernet(line) for line in path.read_text(encoding="ascii").split()]
    if not keys:
        raise ValueError(f"Expected a Fernet key in {path}, was none")
    return MultiFernet(keys)

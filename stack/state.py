"""The state folder: who may use it, and the secrets it keeps."""

import fcntl
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cryptography.fernet import Fernet
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from stack.servers import StackError

LOCK = "lock"
ADMIN_PASSWORD = "admin-password"
INTERNAL_TOKEN = "internal-token"
API_KEY_SECRETS = "api-key-secrets"
JWT_KEY = "jwt-ed25519.pem"


@dataclass(frozen=True)
class StateFolder:
    """A state folder that is ours alone while `lock`, a file descriptor, stays open."""

    path: Path
    lock: int

    @property
    def logs(self) -> Path:
        return self.path / "logs"


def open_state_folder(path: Path) -> StateFolder:
    """Creates the folder if need be and locks it. Raises StackError when it is in use or cannot be used."""
    folder = path.expanduser().resolve()
    try:
        # Only a folder we make gets its mode from us: a path given by mistake may be /tmp.
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        (folder / "logs").mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise StackError(f"Cannot use state folder {folder}: {error.strerror}") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(lock, 32).decode("ascii", "replace").strip()
        os.close(lock)
        raise StackError(f"Another exchange runs on state folder {folder} (pid {holder or 'unknown'})") from None
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"{os.getpid()}\n".encode("ascii"), 0)
    return StateFolder(folder, lock)


def keep_admin_password(state: StateFolder) -> tuple[str, bool]:
    """The operators' password and whether it was made just now."""
    return _keep(state.path / ADMIN_PASSWORD, lambda: secrets.token_urlsafe(18))


def keep_internal_token(state: StateFolder) -> str:
    """The token by which our services know each other."""
    token, _ = _keep(state.path / INTERNAL_TOKEN, lambda: secrets.token_urlsafe(32))
    return token


def keep_jwt_key(state: StateFolder) -> Path:
    """The file of the Ed25519 key that signs access tokens."""
    _keep(state.path / JWT_KEY, _new_jwt_key)
    return state.path / JWT_KEY


def keep_api_key_secrets(state: StateFolder) -> Path:
    """The file of the Fernet key that encrypts the secrets of HMAC API keys."""
    _keep(state.path / API_KEY_SECRETS, lambda: Fernet.generate_key().decode("ascii"))
    return state.path / API_KEY_SECRETS


def write_private(path: Path, text: str) -> None:
    """Writes a file only we can read; it is there whole or not at all."""
    draft = path.with_name(f"{path.name}.new")
    draft.unlink(missing_ok=True)
    with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.rename(path)


def _keep(path: Path, make: Callable[[], str]) -> tuple[str, bool]:
    """The secret in the file, and whether it was made just now."""
    try:
        if not path.exists():
            write_private(path, f"{make().strip()}\n")
            return path.read_text(encoding="utf-8").strip(), True
        kept = path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise StackError(f"Cannot use {path}: {error.strerror}") from None
    if not kept:
        raise StackError(f"{path} is empty: remove it to have a new one made")
    return kept, False


def _new_jwt_key() -> str:
    key = Ed25519PrivateKey.generate()
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode("ascii")

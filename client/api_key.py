"""API keys: for programs that sign each request, and know no password."""

import hashlib
import hmac
import secrets
import time
from collections.abc import Callable, Mapping
from functools import partial

RECV_WINDOW_MS = 5_000


class ApiKey:
    """A caller with an API key: `Account(exchange, ApiKey(key_id, private_key.sign))` for Ed25519.

    `sign` makes the raw signature. Requests are good for five seconds, so this machine's clock has to be right.
    """

    def __init__(self, key_id: str, sign: Callable[[bytes], bytes]) -> None:
        self._key_id = key_id
        self._sign = sign

    @classmethod
    def with_secret(cls, key_id: str, secret: str) -> "ApiKey":
        """A key of HMAC-SHA256."""
        return cls(key_id, partial(hmac.digest, secret.encode(), digest="sha256"))

    def headers(self, method: str, target: str, body: bytes) -> Mapping[str, str]:
        """See Caller. Every one is another: the exchange takes each once."""
        timestamp, window, nonce = str(time.time_ns() // 1_000_000), str(RECV_WINDOW_MS), secrets.token_hex(8)
        text = "\n".join([method, target, timestamp, window, nonce, hashlib.sha256(body).hexdigest()])
        return {
            "X-Api-Key": self._key_id,
            "X-Api-Timestamp": timestamp,
            "X-Api-Recv-Window": window,
            "X-Api-Nonce": nonce,
            "X-Api-Signature": self._sign(text.encode()).hex(),
        }

    async def renew(self, refused_headers: Mapping[str, str]) -> bool:
        """See Caller. What is refused of a key stays refused."""
        return False

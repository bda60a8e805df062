"""Users of the exchange who sign in, and what only they may call."""

import asyncio
from collections.abc import Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from typing import Any

from client.account import Account
from client.errors import Refused
from client.exchange import Exchange
from client.models import Audit, KeyDetails, MarkPrice, NewKeyDetails, Permission, Tokens, User
from client.work import solved


class Login:
    """A signed-in session: its tokens are refreshed when the access token has expired."""

    def __init__(self, exchange: Exchange, email: str, password: str, tokens: Tokens) -> None:
        self._exchange = exchange
        self._email = email
        self._password = password
        self._tokens = tokens
        # A refresh token that is used again after a while ends the session.
        self._renewing = asyncio.Lock()

    @property
    def access_token(self) -> str:
        """Good for some minutes."""
        return self._tokens.access_token

    def headers(self, method: str, target: str, body: bytes) -> Mapping[str, str]:
        """See Caller."""
        return {"Authorization": f"Bearer {self.access_token}"}

    async def renew(self, refused_headers: Mapping[str, str]) -> bool:
        """See Caller. A session that is over is replaced by a new one."""
        async with self._renewing:
            if refused_headers == self.headers("", "", b""):
                try:
                    self._tokens = await _refresh(self._exchange, self._tokens.refresh_token)
                except Refused:
                    self._tokens = await _login(self._exchange, self._email, self._password)
        return True


async def sign_in(exchange: Exchange, email: str, password: str) -> "Session":
    """A new session. Raises Refused INVALID_CREDENTIALS."""
    login = Login(exchange, email, password, await _login(exchange, email, password))
    return Session(exchange, login)


async def register(exchange: Exchange, email: str, password: str) -> "Session":
    """Create an account and sign in; an account that is there already has to have the same password."""
    try:
        await exchange.call("POST", "/api/users", User, body={"email": email, "password": password})
    except Refused as refusal:
        # A registration whose answer was lost is sent again.
        if refusal.code != "EMAIL_ALREADY_EXISTS":
            raise
    return await sign_in(exchange, email, password)


async def _login(exchange: Exchange, email: str, password: str) -> Tokens:
    body: dict[str, Any] = {"email": email, "password": password}
    try:
        return await exchange.call("POST", "/api/auth/login", Tokens, body=body)
    except Refused as refusal:
        if refusal.work is None:
            raise
        body["work"] = await asyncio.to_thread(solved, **refusal.work)
    return await exchange.call("POST", "/api/auth/login", Tokens, body=body)


async def _refresh(exchange: Exchange, refresh_token: str) -> Tokens:
    # An answer that was lost is given again.
    body = {"refreshToken": refresh_token}
    return await exchange.call("POST", "/api/auth/token/refresh", Tokens, body=body)


class Session(Account):
    """What only a user in person may call besides."""

    def operator(self) -> "Operator":
        """The same session with the calls of operators; the exchange refuses them to others."""
        return Operator(self.exchange, self.caller)

    async def logout(self) -> None:
        """End the session."""
        await self._call("POST", "/api/auth/logout", type(None), repeatable=False)

    async def create_api_key(
        self,
        label: str,
        permissions: Sequence[Permission],
        *,
        public_key: bytes | None = None,
        allowed_addresses: Sequence[str] = (),
        instruments: Sequence[str] = (),
        expires_at: datetime | None = None,
        password: str | None = None,
    ) -> NewKeyDetails:
        """A key for a program: with the 32 bytes of an Ed25519 public key, or else with a secret, told only now. The
        password is needed later than five minutes after signing in."""
        body: dict[str, Any] = {
            "label": label,
            "permissions": permissions,
            "allowedAddresses": allowed_addresses,
            "instruments": instruments,
            "expiresAt": expires_at,
            "password": password,
        }
        if public_key is None:
            body |= {"algorithm": "HMAC_SHA256"}
        else:
            body |= {"algorithm": "ED25519", "publicKey": public_key.hex()}
        return await self._call("POST", "/api/auth/api-keys", NewKeyDetails, body=body, repeatable=False)

    async def api_keys(self) -> list[KeyDetails]:
        """One's API keys, newest first."""
        return await self._call("GET", "/api/auth/api-keys", list[KeyDetails])

    async def rename_api_key(self, key_id: str, label: str) -> KeyDetails:
        """Call an API key otherwise. Raises Refused NOT_FOUND."""
        return await self._call("PATCH", f"/api/auth/api-keys/{key_id}", KeyDetails, body={"label": label})

    async def revoke_api_keys(self) -> None:
        """End all API keys at once, and the sockets that they opened."""
        await self._call("DELETE", "/api/auth/api-keys", type(None))

    async def revoke_api_key(self, key_id: str) -> None:
        """End an API key, and the sockets that it opened. Raises Refused NOT_FOUND when it has ended already."""
        await self._call("DELETE", f"/api/auth/api-keys/{key_id}", type(None))


class Operator(Session):
    """What operators may call besides."""

    async def deposit(self, user_id: str, asset: str, amount: Decimal, reference: str) -> None:
        """Credit a user, once per reference."""
        await self._transfer("deposits", user_id, asset, amount, reference)

    async def withdraw(self, user_id: str, asset: str, amount: Decimal, reference: str) -> None:
        """Debit a user, once per reference."""
        await self._transfer("withdrawals", user_id, asset, amount, reference)

    async def hold_index(self, instrument_id: str, price: Decimal) -> MarkPrice:
        """Hold a simulated index, and the mark price, at a price."""
        return await self._call("POST", f"/api/admin/mark-price/{instrument_id}", MarkPrice, body={"price": price})

    async def release_index(self, instrument_id: str) -> None:
        """Let it move again."""
        await self._call("DELETE", f"/api/admin/mark-price/{instrument_id}", type(None))

    async def audit(self) -> Audit:
        """Audit the ledger now."""
        return await self._call("GET", "/api/admin/ledger/audit", Audit)

    async def _transfer(self, kind: str, user_id: str, asset: str, amount: Decimal, reference: str) -> None:
        body = {"userId": user_id, "asset": asset, "amount": amount, "reference": reference}
        await self._call("POST", f"/api/ledger/{kind}", dict[str, Any], body=body)

"""Two calm accounts that hold a long and a short against each other: somebody to deleverage against, on either side."""

from collections.abc import Mapping
from decimal import Decimal

from client import Account
from tests.adversary_run.actions import TICKS, Call, Log, send
from tests.exchange import BTC, SOL

# Base that each holds at least, and quote that each has for it.
HELD = {BTC: Decimal(40), SOL: Decimal(15_000)}
MONEY = 10_000_000


class Ballast:
    """Nobody of them can be ruined within the range of the marks: they hold at leverage 1."""

    def __init__(self, long: Account, short: Account, log: Log) -> None:
        self._sides = {"SELL": short, "BUY": long}
        self._log = log

    async def prepare(self) -> None:
        """Set the leverage."""
        for account in self._sides.values():
            for name in HELD:
                await self._send(account, "PUT", f"/api/positions/{name}/leverage", {"leverage": 1})

    async def fill_up(self, marks: Mapping[str, Decimal]) -> None:
        """Trade at the mark what deleveraging has taken of either."""
        for name, wanted in HELD.items():
            held = [Decimal(await self._held(account, name)) for account in self._sides.values()]
            if min(held) >= wanted:
                continue
            price = f"{(marks[name] / TICKS[name]).quantize(Decimal(1)) * TICKS[name]:f}"
            order = {"instrumentId": name, "type": "LIMIT", "price": price, "quantity": f"{wanted - min(held):f}"}
            for side, account in self._sides.items():
                await self._send(account, "POST", "/api/orders", order | {"side": side}, wait=True)
        for account in self._sides.values():
            await self._send(account, "DELETE", "/api/orders")

    async def _held(self, account: Account, name: str) -> str:
        found = await self._send(account, "GET", "/api/positions")
        return next((p["quantity"] for p in found or () if p["instrumentId"] == name), "0")

    async def _send(
        self, account: Account, method: str, path: str, body: Mapping[str, object] | None = None, *, wait: bool = False
    ) -> list[dict[str, str]]:
        answer = (
            await send(account, Call(method, path, None if body is None else dict(body), wait), self._log, "ballast")
        ).body
        return answer if isinstance(answer, list) else []

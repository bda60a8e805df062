"""What the operator does meanwhile: marks step and jump, and trading halts."""

import random
from decimal import Decimal

from client import Account
from tests.adversary_run.actions import TICKS, TRY_AGAIN, Call, Log, send

# In ten-thousandths of the mark: mostly steps, now and then a jump.
STEPS = (5, 10, 20, 40, 80)
JUMPS = (150, 300, 500, 800, 1_200)
# How far marks may get from where they began.
RANGE = Decimal("0.6"), Decimal("1.6")
HALTS = ("halt", "cancel-only")


class Chaos:
    """The operator; `marks` is what they held each index at last."""

    def __init__(self, account: Account, start: dict[str, Decimal], log: Log) -> None:
        self.marks = dict(start)
        self.chance = random.Random(0)
        self._account = account
        self._start = start
        self._log = log

    async def move(self, times: int, every: int) -> None:
        """Move a mark so many times, each after so many actions of the others; halts come on the way."""
        for _ in range(times):
            await self._log.until(self._log.done + every)
            name = self.chance.choice(list(self.marks))
            await self.hold(name, self._next(name))
            if self.chance.random() < 0.15:
                await self.halt(every)

    async def halt(self, every: int) -> None:
        """Stop trading in an instrument, for so many actions."""
        name = self.chance.choice(list(self.marks))
        await self._send(f"/api/admin/instruments/{name}/{self.chance.choice(HALTS)}")
        await self._log.until(self._log.done + every)
        await self._send(f"/api/admin/instruments/{name}/resume")

    async def hold(self, name: str, price: Decimal) -> None:
        """Hold an index, and so the mark, at a price."""
        self.marks[name] = price
        await self._send(f"/api/admin/mark-price/{name}", {"price": f"{price:f}"})

    async def _send(self, path: str, body: dict[str, object] | None = None) -> None:
        answer = await send(self._account, Call("POST", path, body), self._log, "operator")
        while answer.code in (*TRY_AGAIN, "REMOTE_SERVICE_ERROR"):
            answer = await send(self._account, Call("POST", path, body), self._log, "operator")

    def _next(self, name: str) -> Decimal:
        reach = self.chance.choice(STEPS if self.chance.random() < 0.6 else JUMPS)
        moved = self.marks[name] * (1 + Decimal(self.chance.choice((-1, 1)) * reach) / 10_000)
        low, high = (self._start[name] * bound for bound in RANGE)
        ticks = (max(low, min(high, moved)) / TICKS[name]).quantize(Decimal(1))
        return ticks * TICKS[name]

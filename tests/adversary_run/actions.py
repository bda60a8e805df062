"""What a colluding account does: any call of the public API, with figures that are near what is allowed."""

import asyncio
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from decimal import ROUND_HALF_EVEN, Decimal
from typing import Any

from client import Account, Refused, UnavailableError
from tests.exchange import BTC, SOL

Json = dict[str, Any]
TICKS = {BTC: Decimal("0.1"), SOL: Decimal("0.001")}
LOTS = {BTC: Decimal("0.001"), SOL: Decimal("0.1")}
CENT = Decimal("0.01")
KINDS = ("LIMIT",) * 8 + ("MARKET",) * 4 + ("STOP_MARKET", "STOP_LIMIT", "TAKE_PROFIT_MARKET", "TAKE_PROFIT_LIMIT")
LEVERAGES = (2, 10, 20, 50, 50, 100, 100)
# How often each is done, of all.
WEIGHTS = {
    "order": 34,
    "batch": 10,
    "meet": 18,
    "amend": 10,
    "cancel": 7,
    "cancel all": 2,
    "margin": 9,
    "leverage": 6,
    "mode": 3,
    "close": 7,
    "withdraw": 2,
    "deposit": 4,
}
ORDERS_KEPT = 30
# Answers that say nothing of the exchange's books: it had too much to do.
BUSY = (429, 503)
UNAVAILABLE = "UNAVAILABLE"
TRY_AGAIN = (UNAVAILABLE, "OVERLOADED", "RATE_LIMITED")


@dataclass(frozen=True)
class Call:
    """A request, ready to be sent."""

    method: str
    path: str
    body: Json | None = None
    wait: bool = False

    def __str__(self) -> str:
        return f"{self.method} {self.path} {self.body or ''}{' wait' if self.wait else ''}"


@dataclass(frozen=True)
class Answer:
    """`code` is "ok", or why not; the body only with the former."""

    code: str
    body: Any = None


@dataclass
class Log:
    """What everybody did and was answered, in order; `hear` wakes who waits for the program to get on."""

    lines: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    answers: dict[str, int] = field(default_factory=dict)
    done: int = 0
    is_over: bool = False
    got_on: asyncio.Event = field(default_factory=asyncio.Event)

    def write(self, who: str, what: str, answer: str) -> None:
        """Keep an action."""
        self.lines.append(f"{who}: {what} -> {answer}")
        self.answers[answer] = self.answers.get(answer, 0) + 1
        self.done += 1
        self.got_on.set()

    async def until(self, done: int) -> None:
        """Returns when so many actions have been done, or no more come."""
        while self.done < done and not self.is_over:
            self.got_on.clear()
            await self.got_on.wait()

    def finish(self) -> None:
        """No more actions come in this part of the run."""
        self.is_over = True
        self.got_on.set()


async def send(account: Account, call: Call, log: Log, who: str) -> Answer:
    """Send and keep. A server error is a fault."""
    query = {"wait": "placed"} if call.wait else None
    try:
        answer = await account.exchange.call(
            call.method, call.path, object, body=call.body, query=query, caller=account.caller, repeatable=False
        )
    except Refused as refusal:
        log.write(who, str(call), refusal.code)
        if refusal.status >= 500 and refusal.status not in BUSY:
            log.faults.append(f"{who}: {call} -> {refusal.status} {refusal}")
        return Answer(refusal.code)
    except UnavailableError:
        log.write(who, str(call), UNAVAILABLE)
        return Answer(UNAVAILABLE)
    log.write(who, str(call), "ok")
    return Answer("ok", answer)


class Colluder:
    """One account. All that it chooses comes from `chance`, what it sees, and the marks it knows of."""

    def __init__(
        self,
        name: str,
        account: Account,
        user_id: str,
        bank: "Bank",
        marks: Mapping[str, Decimal],
        log: Log,
        scale: int,
    ) -> None:
        self.name = name
        self.account = account
        self.user_id = user_id
        self.chance = random.Random(0)
        self._bank = bank
        self._marks = marks
        self._log = log
        self._scale = scale
        self._orders: list[int] = []
        self._actions: dict[str, Callable[[random.Random], Any]] = {
            "order": self._order,
            "batch": self._batch,
            "meet": self._meet,
            "amend": self._amend,
            "cancel": self._cancel,
            "cancel all": self._cancel_all,
            "margin": self._margin,
            "leverage": self._leverage,
            "mode": self._mode,
            "close": self._close,
            "withdraw": self._withdraw,
            "deposit": self._deposit,
        }

    async def act(self, count: int) -> None:
        """Do something so many times, now and then several things at once."""
        while count > 0:
            at_once = min(count, self.chance.choice((1, 1, 1, 1, 1, 2, 3)))
            chosen = self.chance.choices(list(WEIGHTS), list(WEIGHTS.values()), k=at_once)
            # Each has a source of its own: which of them is answered first must not decide what the others do.
            chances = [random.Random(self.chance.random()) for _ in chosen]
            await asyncio.gather(*(self._actions[kind](chance) for kind, chance in zip(chosen, chances, strict=True)))
            count -= at_once

    async def prepare(self) -> None:
        """Choose modes and leverages to begin with."""
        for name in self._marks:
            mode = {"marginMode": self.chance.choice(("ISOLATED", "CROSS"))}
            await self._call("PUT", f"/api/positions/{name}/margin-mode", mode)
            leverage = {"leverage": self.chance.choice((20, 50))}
            await self._call("PUT", f"/api/positions/{name}/leverage", leverage)

    async def _call(self, method: str, path: str, body: Json | None = None, *, wait: bool = False) -> Any:
        return (await send(self.account, Call(method, path, body, wait), self._log, self.name)).body

    def _instrument(self, chance: random.Random) -> str:
        return chance.choice((BTC, BTC, SOL))

    def _price(self, chance: random.Random, name: str, base: Decimal, reach: int) -> str:
        """A price off `base` by up to `reach` in ten-thousandths, more often by less."""
        off = Decimal(round(chance.triangular(-reach, reach, 0)))
        return _rounded(base * (1 + off / 10_000), TICKS[name])

    def _quantity(self, chance: random.Random, name: str) -> str:
        """More often little than much, up to what the account could lever."""
        notional = Decimal(self._scale) * Decimal(str(round(60 * chance.random() ** 3 + 0.01, 4)))
        return _rounded(max(notional / self._marks[name], LOTS[name]), LOTS[name])

    def _new(self, chance: random.Random) -> Json:
        name = self._instrument(chance)
        kind, mark = chance.choice(KINDS), self._marks[name]
        order: Json = {
            "instrumentId": name,
            "side": chance.choice(("BUY", "SELL")),
            "type": kind,
            "quantity": self._quantity(chance, name),
            "stpMode": chance.choice(("EXPIRE_TAKER", "EXPIRE_MAKER", "EXPIRE_BOTH")),
            "reduceOnly": chance.random() < 0.12,
        }
        if kind not in ("LIMIT", "MARKET"):
            order["stopPrice"] = self._price(chance, name, mark, 300)
            order["workingType"] = chance.choice(("MARK", "MARK", "LAST"))
        if kind.endswith("LIMIT"):
            order["price"] = self._price(
                chance, name, Decimal(order.get("stopPrice", mark)), chance.choice((20, 80, 480))
            )
            order["timeInForce"] = chance.choice(("GTC", "GTC", "GTC", "IOC", "FOK"))
            order["postOnly"] = order["timeInForce"] == "GTC" and kind == "LIMIT" and chance.random() < 0.1
        return order

    def remember(self, answer: Any) -> None:
        """Keep the id of an order, to amend or cancel it."""
        if isinstance(answer, dict) and "orderId" in answer:
            self._orders = [*self._orders, answer["orderId"]][-ORDERS_KEPT:]

    async def _order(self, chance: random.Random) -> None:
        wait = chance.random() < 0.5
        self.remember(await self._call("POST", "/api/orders", self._new(chance), wait=wait))

    async def _batch(self, chance: random.Random) -> None:
        orders = [self._new(chance) for _ in range(chance.randint(2, 6))]
        answer = await self._call("POST", "/api/orders/batch", {"orders": orders})
        for result in answer["results"] if answer else ():
            self.remember(result)

    async def _meet(self, chance: random.Random) -> None:
        """Rest at a price, and let an accomplice take it at once: how money is passed from one to the other."""
        order = self._new(chance) | {"type": "LIMIT", "timeInForce": "GTC", "postOnly": False}
        order.pop("stopPrice", None)
        order.pop("workingType", None)
        name, accomplice = order["instrumentId"], self._bank.accomplice(chance)
        order["price"] = self._price(chance, name, self._marks[name], chance.choice((10, 60, 490)))
        other = order | {"side": "SELL" if order["side"] == "BUY" else "BUY", "reduceOnly": chance.random() < 0.3}
        self.remember(await self._call("POST", "/api/orders", order, wait=chance.random() < 0.7))
        call = Call("POST", "/api/orders", other, wait=chance.random() < 0.5)
        accomplice.remember((await send(accomplice.account, call, self._log, accomplice.name)).body)

    async def _amend(self, chance: random.Random) -> None:
        if not self._orders:
            return await self._order(chance)
        name, order_id = self._instrument(chance), chance.choice(self._orders[-8:])
        change: Json = {}
        if chance.random() < 0.7:
            change["price"] = self._price(chance, name, self._marks[name], 100)
        if not change or chance.random() < 0.5:
            change["quantity"] = self._quantity(chance, name)
        await self._call("POST", f"/api/orders/{order_id}/amend", change, wait=chance.random() < 0.3)
        return None

    async def _cancel(self, chance: random.Random) -> None:
        if self._orders:
            await self._call("DELETE", f"/api/orders/{chance.choice(self._orders)}")

    async def _cancel_all(self, chance: random.Random) -> None:
        await self._call("DELETE", "/api/orders")

    async def _margin(self, chance: random.Random) -> None:
        amount = self._scale * chance.choice((0.01, 0.1, 0.5)) * chance.choice((1, -1)) * chance.random()
        body = {"amount": _rounded(Decimal(str(amount)) or CENT, CENT)}
        await self._call("POST", f"/api/positions/{self._instrument(chance)}/margin", body)

    async def _leverage(self, chance: random.Random) -> None:
        body = {"leverage": chance.choice(LEVERAGES)}
        await self._call("PUT", f"/api/positions/{self._instrument(chance)}/leverage", body)

    async def _mode(self, chance: random.Random) -> None:
        body = {"marginMode": chance.choice(("ISOLATED", "CROSS"))}
        await self._call("PUT", f"/api/positions/{self._instrument(chance)}/margin-mode", body)

    async def _close(self, chance: random.Random) -> None:
        """Close at market, or to an accomplice at a price of one's own choice."""
        held = [p for p in await self._call("GET", "/api/positions") or () if Decimal(p["quantity"])]
        held = [p for p in held if p["instrumentId"] in self._marks]
        if not held:
            return
        position = chance.choice(held)
        name, side = position["instrumentId"], "SELL" if position["side"] == "LONG" else "BUY"
        # Or turn it round.
        times = chance.choice((1, 1, 2))
        quantity = f"{times * Decimal(position['quantity']):f}"
        order = {"instrumentId": name, "side": side, "quantity": quantity, "reduceOnly": times == 1}
        if chance.random() < 0.5:
            await self._call("POST", "/api/orders", order | {"type": "MARKET"}, wait=True)
            return
        price = self._price(chance, name, self._marks[name], 490)
        bid = {
            **order,
            "type": "LIMIT",
            "price": price,
            "side": "SELL" if side == "BUY" else "BUY",
            "reduceOnly": False,
        }
        accomplice = self._bank.accomplice(chance)
        call = Call("POST", "/api/orders", bid)
        accomplice.remember((await send(accomplice.account, call, self._log, accomplice.name)).body)
        await self._call("POST", "/api/orders", order | {"type": "LIMIT", "price": price}, wait=True)

    async def _withdraw(self, chance: random.Random) -> None:
        """All that is available, or a part, or a little more than there is."""
        for balance in await self._call("GET", "/api/ledger/balances") or ():
            share = chance.choice((Decimal("0.3"), Decimal(1), Decimal("1.01")))
            amount = (Decimal(balance["available"]) * share).quantize(CENT)
            if amount:
                await self._bank.transfer("withdrawals", self, amount)

    async def _deposit(self, chance: random.Random) -> None:
        await self._bank.transfer("deposits", self, Decimal(chance.randint(1, self._scale)))


class Bank:
    """Deposits and withdrawals, which the operator books; `given` is what the answers say that came in, net."""

    def __init__(self, operator: Account, log: Log) -> None:
        self.given = Decimal(0)
        self.colluders: list[Colluder] = []
        self._operator = operator
        self._log = log
        self._count = 0

    def accomplice(self, chance: random.Random) -> Colluder:
        """Any of them; oneself, too."""
        return chance.choice(self.colluders)

    async def transfer(self, kind: str, colluder: Colluder, amount: Decimal) -> None:
        """Book once: repeated under the same reference until there is an answer."""
        self._count += 1
        body = {"userId": colluder.user_id, "asset": "USDT", "amount": f"{amount:f}", "reference": f"run-{self._count}"}
        call = Call("POST", f"/api/ledger/{kind}", body)
        while True:
            answer = await send(self._operator, call, self._log, colluder.name)
            if answer.code == "ok":
                self.given += amount if kind == "deposits" else -amount
            if answer.code not in TRY_AGAIN:
                return


def _rounded(value: Decimal, step: Decimal) -> str:
    return f"{(value / step).quantize(Decimal(1), ROUND_HALF_EVEN) * step:f}"

"""Random traders, and sagas and settlement interleaved at random: the invariants hold at every moment."""

import random
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from decimal import Decimal
from typing import Any

import pytest
from redis.asyncio import Redis

from activities.ledger import audit
from activities.ledger.transfers import transfer_external
from domain.contracts.settlement import EventRange
from domain.instruments import Instrument
from domain.order_entry import NewOrder
from domain.problems import Problem
from storage.db import Pool
from tests.integration.ledger_world import BTC, ETH, World, assert_conserved, finish, limit, market, outbox_events

USERS = range(1, 8)
INSTRUMENTS = (BTC, ETH)
DEPOSITS = (100, 1_000, 4_000, 20_000)
ACTIONS = 1_800


@contextmanager
def allowed(*codes: str) -> Iterator[None]:
    """The exchange may refuse for these reasons, and for no other."""
    try:
        yield
    except Problem as problem:
        if problem.code not in codes:
            raise


class Trading:
    """One run, fully determined by its seed."""

    def __init__(self, world: World, seed: int) -> None:
        self.world = world
        self.dice = random.Random(seed)
        self.ticks = {BTC.instrument_id: 600_000, ETH.instrument_id: 300_000}
        self.placements: list[AsyncIterator[str]] = []
        self.settlements: dict[str, AsyncIterator[str]] = {}
        self.order_ids: list[int] = []
        self.references = 0

    async def act(self) -> None:
        action = self.dice.choices(
            [
                self.take_in,
                self.go_on_placing,
                self.match,
                self.go_on_settling,
                self.cancel,
                self.amend,
                self.transfer,
                self.change_margin,
            ],
            [8, 14, 5, 14, 2, 4, 2, 2],
        )[0]
        await action()

    async def take_in(self) -> None:
        orders = [self.order() for _ in range(self.dice.randint(1, 4))]
        for instrument in INSTRUMENTS:
            await self.world.mark(instrument.ticks_to_price(self.ticks[instrument.instrument_id]), instrument)
        batch = await self.world.take_in(*orders)
        self.placements.append(self.world.placement(batch))
        self.order_ids += batch.order_ids

    async def amend(self) -> None:
        """Change one of the orders that rest: a little or a lot, dearer or cheaper, larger or smaller, or both."""
        row = await self.world.pool.fetchrow(
            "SELECT order_id, user_id, instrument_id, price, quantity FROM orders.orders WHERE price IS NOT NULL"
            " AND status IN ('ACCEPTED', 'PLACED', 'PARTIALLY_FILLED') ORDER BY md5(order_id::text || $1) LIMIT 1",
            str(self.dice.random()),
        )
        if row is None:
            return
        instrument = next(i for i in INSTRUMENTS if i.instrument_id == row["instrument_id"])
        ticks = instrument.price_to_ticks(row["price"]) * self.dice.choice([980, 999, 1001, 1020]) // 1000
        lots = max(1, instrument.quantity_to_lots(row["quantity"]) * self.dice.choice([1, 3, 5, 8]) // 4)
        price, quantity = self.dice.choice([(ticks, None), (None, lots), (ticks, lots)])
        with allowed("ORDER_NOT_AMENDABLE", "VALIDATION_FAILED", "MIN_NOTIONAL"):
            batch = await self.world.take_in_amendment(
                row["user_id"],
                row["order_id"],
                None if price is None else instrument.ticks_to_price(price),
                None if quantity is None else instrument.lots_to_quantity(quantity),
            )
            self.placements.append(self.world.placement(batch))

    def order(self) -> NewOrder:
        """A plain order, or one with terms."""
        order = self.plain_order()
        roll = self.dice.random()
        if roll < 0.15:
            return replace(order, request=replace(order.request, reduce_only=True))
        if roll < 0.25 and order.request.type == "LIMIT":
            return replace(order, request=replace(order.request, post_only=True, time_in_force="GTC"))
        if roll < 0.35:
            kind: Any = self.dice.choice(["STOP", "TAKE_PROFIT"]) + "_" + order.request.type
            terms: dict[str, Any] = {
                "stop_price": order.bound_price,
                "working_type": "LAST",
                "reduce_only": roll < 0.28,
            }
            return replace(order, request=replace(order.request, type=kind, **terms))
        return order

    def plain_order(self) -> NewOrder:
        instrument = self.dice.choice(INSTRUMENTS)
        name = instrument.instrument_id
        # The market wanders, and now and then it jumps further than anybody's margin reaches.
        moved = self.dice.choices([1000, 1002, 998, 1100, 900], [60, 10, 10, 2, 2])[0]
        self.ticks[name] = self.ticks[name] * moved // 1000
        price = instrument.ticks_to_price(self.ticks[name] + self.dice.randint(-60, 60))
        quantity = str(
            instrument.lots_to_quantity(self.dice.choice([1, 7, 50, 400]) * (1 if instrument is BTC else 20))
        )
        user, side = self.dice.choice(USERS), self.dice.choice(["BUY", "SELL"])
        if self.dice.random() < 0.25:
            reach = instrument.ticks_to_price(self.ticks[name] // 20)
            return market(user, side, quantity, price + (reach if side == "BUY" else -reach), instrument)
        return limit(
            user,
            side,
            quantity,
            price,
            instrument,
            time_in_force=self.dice.choice(["GTC", "GTC", "GTC", "IOC", "FOK"]),
            stp_mode=self.dice.choice(["EXPIRE_TAKER", "EXPIRE_MAKER", "EXPIRE_BOTH"]),
        )

    async def go_on_placing(self) -> None:
        if self.placements:
            await self.take_step(self.dice.choice(self.placements))

    async def take_step(self, placing: AsyncIterator[str]) -> None:
        if await anext(placing, None) is None:
            self.placements.remove(placing)

    async def match(self) -> None:
        await self.world.match(self.dice.choice(INSTRUMENTS), self.dice.randint(1, 6))

    async def go_on_settling(self) -> None:
        instrument = self.dice.choice(INSTRUMENTS)
        name = instrument.instrument_id
        if name not in self.settlements:
            events = self.next_range(instrument)
            if events is None:
                return
            self.settlements[name] = self.world.settlement(events)
        if await anext(self.settlements[name], None) is None:
            del self.settlements[name]

    def next_range(self, instrument: Instrument) -> EventRange | None:
        return self.world.unsettled(instrument, self.dice.choice([1, 2, 5, 50]))

    async def cancel(self) -> None:
        if self.order_ids:
            await self.world.cancel(*{self.dice.choice(self.order_ids) for _ in range(3)})

    async def transfer(self) -> None:
        self.references += 1
        amount = Decimal(self.dice.choice([10, 500, -10, -500]))
        kind = "DEPOSIT" if amount > 0 else "WITHDRAWAL"
        async with self.world.pool.acquire() as conn:
            with allowed("INSUFFICIENT_FUNDS"):
                async with conn.transaction():
                    user = self.dice.choice(USERS)
                    await transfer_external(conn, kind, f"r{self.references}", user, "USDT", amount)

    async def change_margin(self) -> None:
        """Begin to change a leverage, or what backs a position; the steps are taken later."""
        instrument = self.dice.choice(INSTRUMENTS)
        await self.world.mark(instrument.ticks_to_price(self.ticks[instrument.instrument_id]), instrument)
        kind: Any = self.dice.choice(["LEVERAGE", "LEVERAGE", "MARGIN"])
        value = self.dice.choice([3, 50, 100, 100] if kind == "LEVERAGE" else [5, 200, -5, -50])
        change = self.world.margin_change(self.dice.choice(USERS), kind, value, instrument)
        self.placements.append(self.world.change_margin(change))

    async def come_to_rest(self) -> None:
        """Bring everything that is under way to its end."""
        for settling in self.settlements.values():
            await finish(settling)
        self.settlements.clear()
        # In turn: one may be waiting for another.
        while self.placements:
            for placing in list(self.placements):
                await self.take_step(placing)
            for instrument in INSTRUMENTS:
                await self.world.settle(instrument)
        for instrument in INSTRUMENTS:
            await self.world.settle(instrument)


async def assert_audit_is_clean(pool: Pool, *, at_rest: bool) -> None:
    report = await audit.run_audit(pool)
    assert report.ok, [check for check in report.checks if not check.ok]
    if at_rest:
        assert [check for check in report.checks if check.detail] == []


@pytest.mark.timeout(60)
@pytest.mark.parametrize("seed", [0, 1, 2, 5, 6, 8])
async def test_the_books_balance_whatever_happens_in_whatever_order(
    pool: Pool, redis: Redis, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    # One look is all: in motion is no excuse for an alarm, and waiting would not move anything here.
    monkeypatch.setattr(audit, "LOOKS_MAX", 1)
    world = World(pool, redis, settles_by_itself=False)
    trading = Trading(world, seed)
    for user in USERS:
        await world.deposit(trading.dice.choice(DEPOSITS), user)
    for number in range(ACTIONS):
        await trading.act()
        if number % 10 == 0:
            await assert_audit_is_clean(pool, at_rest=False)
        if number % 300 == 299:
            await trading.come_to_rest()
            await assert_audit_is_clean(pool, at_rest=True)
    await trading.come_to_rest()
    await assert_audit_is_clean(pool, at_rest=True)
    await assert_conserved(world)
    assert await pool.fetchval("SELECT count(*) FROM orders.orders WHERE status IN ('PENDING', 'ACCEPTED')") == 0
    assert await pool.fetchval("SELECT count(*) FROM matching.trade_tickers") > 50
    ends = {row["status"] for row in await pool.fetch("SELECT DISTINCT status FROM orders.amendments")}
    assert {"AMENDED", "REJECTED"} <= ends <= {"AMENDED", "REJECTED", "FAILED"}
    assert all(Decimal(event["amount"]) >= 0 for event in await outbox_events(pool, "FundsUnfrozen"))
    for terms in ("reduce_only", "post_only", "stop_price IS NOT NULL"):
        assert await pool.fetchval(f"SELECT count(*) FROM orders.orders WHERE {terms} AND filled_quantity > 0") > 0

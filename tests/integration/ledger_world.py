"""The exchange without Temporal: the real activities, the real matcher and the real database, one step at a time.

Sagas are generators that hand control back after every step, so that a test may interleave them, repeat a step,
or look in between.
"""

import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from itertools import count
from typing import Any, cast

from redis.asyncio import Redis

from activities.ledger.audit import run_audit
from activities.ledger.steps import LedgerActivities
from activities.ledger.transfers import transfer_external
from activities.matching.engine_log import EngineLog
from activities.matching.steps import MatchingActivities
from activities.orders.intake import lock_for_amendment, take_in, take_in_amendment, take_in_cancels
from activities.orders.rows import IN_ENGINE_STATUSES
from activities.orders.steps import OrderActivities
from activities.positions.steps import PositionActivities
from activities.risk.exposures import set_margin_mode
from activities.risk.steps import RiskActivities
from domain.funding import FundingPage, FundingRun, FundingSnapshot, LogPosition
from domain.instruments import SHIPPED, Instrument
from domain.margin_changes import MarginChange, MarginMoved
from domain.matching import AnyEvent
from domain.order_entry import NewOrder, OrderRequest, Reference, amendment
from domain.problems import Problem
from domain.sagas import Acceptance, EventRange, OrderBatch, Refusal, StepRequest, Uncovered
from engine import lease as leases
from engine.log import Batch, read_commands, write_batch
from engine.matcher import Matcher
from storage.db import Pool
from storage.once import NotYetError
from storage.tables import metadata
from tests.marks import say_mark

BTC, ETH, SOL = SHIPPED
BTC_PRICE, ETH_PRICE = Decimal(60_000), Decimal(3_000)
ROUNDS_MAX = 2

# What differs between two runs of the same steps, or is consumed by one that was rolled back.
VOLATILE = [
    "created_at",
    "updated_at",
    "executed_at",
    "calculated_at",
    "lease_until",
    "entry_id",
    "event_id",
    "message_id",
    "position_id",
]
TIMES = re.compile(r'\\*"at\\*": ?\d+|\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z')


def limit(
    user_id: int, side: Any, quantity: str, price: object, instrument: Instrument = BTC, **terms: Any
) -> NewOrder:
    """A LIMIT order."""
    bound = Decimal(str(price))
    request = OrderRequest(instrument.instrument_id, side, "LIMIT", Decimal(quantity), bound, **terms)
    return NewOrder(user_id, request, bound)


def market(user_id: int, side: Any, quantity: str, bound: object, instrument: Instrument = BTC) -> NewOrder:
    """A MARKET order with its protection price."""
    request = OrderRequest(instrument.instrument_id, side, "MARKET", Decimal(quantity))
    return NewOrder(user_id, request, Decimal(str(bound)))


@dataclass
class World:
    """The services on `pool`; `faulty`, where given, is what the activities get instead of it."""

    pool: Pool
    redis: Redis
    faulty: Any = None
    tokens: Iterator[int] = field(default_factory=count)
    matchers: dict[str, Matcher] = field(default_factory=lambda: {i.instrument_id: Matcher(i) for i in SHIPPED})
    command_seqs: dict[str, int] = field(default_factory=lambda: dict.fromkeys((i.instrument_id for i in SHIPPED), 0))
    settled: dict[str, int] = field(default_factory=lambda: dict.fromkeys((i.instrument_id for i in SHIPPED), 0))
    # Instruments whose mark stands where a test has put it.
    held_marks: set[str] = field(default_factory=set)
    settles_by_itself: bool = True

    def __post_init__(self) -> None:
        pool, log = cast(Pool, self.faulty or self.pool), EngineLog()
        self.risk = RiskActivities(pool, log)
        self.ledger = LedgerActivities(pool)
        self.positions = PositionActivities(pool, log)
        self.orders = OrderActivities(pool, self.redis, log)
        self.matching = MatchingActivities(pool)

    async def deposit(self, amount: object, *user_ids: int, reference: str = "first") -> None:
        for user_id in user_ids:
            async with self.pool.acquire() as conn, conn.transaction():
                done = await transfer_external(
                    conn, "DEPOSIT", f"{reference}-{user_id}", user_id, "USDT", Decimal(str(amount))
                )
            assert done

    async def take_in(self, *orders: NewOrder) -> OrderBatch:
        """Write orders down, as the api does; the market is at their prices, unless a test has said where it is."""
        for order in orders:
            instrument = instrument_of(order)
            if instrument.instrument_id not in self.held_marks:
                await say_mark(self.pool, instrument, order.bound_price)
        async with self.pool.acquire() as conn, conn.transaction():
            intake = await take_in(conn, orders, datetime.now(UTC))
        assert intake.saga is not None
        return intake.saga.batch

    async def take_in_cancels(self, *order_ids: int) -> OrderBatch:
        async with self.pool.acquire() as conn, conn.transaction():
            return (await take_in_cancels(conn, list(order_ids), f"t{next(self.tokens)}")).batch

    async def take_in_amendment(
        self, user_id: int, order_id: int, price: object = None, quantity: object = None
    ) -> OrderBatch:
        """Write an amendment down, as the api does; the market is at the price asked for."""
        async with self.pool.acquire() as conn, conn.transaction():
            found = await lock_for_amendment(conn, user_id, order_id)
            if found is None or found[1] not in IN_ENGINE_STATUSES:
                raise Problem("ORDER_NOT_AMENDABLE", f"Order {order_id}: {found}")
            order = found[0]
            instrument = next(i for i in SHIPPED if i.instrument_id == order.request.instrument_id)
            changes = _decimal(price), _decimal(quantity)
            mark = changes[0] or order.bound_price
            checked = amendment(order, *changes, instrument, Reference(mark))
            if instrument.instrument_id not in self.held_marks:
                await say_mark(self.pool, instrument, mark)
            return (await take_in_amendment(conn, checked, datetime.now(UTC))).batch

    async def amend(self, user_id: int, order_id: int, price: object = None, quantity: object = None) -> int:
        """Amend an order in a saga of its own, up to the engine; the amendment's id."""
        batch = await self.take_in_amendment(user_id, order_id, price, quantity)
        await finish(self.placement(batch))
        return batch.order_ids[0]

    async def amendment(self, amendment_id: int) -> tuple[str, str | None]:
        """Status and failure reason."""
        row = await self.pool.fetchrow(
            "SELECT status, failure_reason FROM orders.amendments WHERE amendment_id = $1", amendment_id
        )
        assert row is not None
        return row["status"], row["failure_reason"]

    async def placement(self, batch: OrderBatch) -> AsyncIterator[str]:
        """The steps of a placement, as OrderPlacementWorkflow takes them."""
        pending, fundings, round_number = batch.order_ids, 0, 0
        passed: list[int] = []
        refused: list[Refusal] = []
        while pending:
            round_number += 1
            step = StepRequest(batch.saga_id, round_number, pending)
            checked = await self.risk.check_orders(step)
            yield "checked"
            refused += checked.refused
            pending = checked.busy
            if checked.passed:
                fundings += 1
                frozen = await self.ledger.freeze_funds(step)
                yield "frozen"
                passed += frozen.passed
                failed = [refusal.order_id for refusal in frozen.refused]
                if failed:
                    undo = StepRequest(batch.saga_id, round_number, failed)
                    await self.risk.release_orders(undo)
                    yield "released"
                    await self.ledger.unfreeze_funds(undo)
                    yield "unfrozen"
                    if fundings < ROUNDS_MAX:
                        pending = sorted(pending + failed)
                    else:
                        refused += frozen.refused
        await self.orders.accept(Acceptance(batch.saga_id, sorted(passed), refused))
        yield "accepted"

    async def place(self, *orders: NewOrder) -> list[int]:
        """Place orders in one saga, from beginning to end."""
        batch = await self.take_in(*orders)
        await finish(self.placement(batch))
        return batch.order_ids

    def margin_change(self, user_id: int, kind: Any, value: object, instrument: Instrument = BTC) -> MarginChange:
        name = f"margin-{next(self.tokens)}"
        return MarginChange(name, user_id, instrument.instrument_id, kind, str(value))

    async def change_margin(self, change: MarginChange) -> AsyncIterator[str]:
        """The steps of a margin change, as MarginChangeWorkflow takes them; the last is a refusal, if there is one."""
        while (plan := await self.risk.plan_margin_change(change)).is_busy:
            yield "busy"
        yield plan.refusal or "planned"
        if plan.refusal is None:
            while (moved := await self.try_to_move_margin(change)) is None:
                yield "waits"
            yield moved.refused[0] if moved.refused else "moved"
            if not moved.refused:
                await self.positions.adopt_margin(change)
                yield "adopted"
            if moved.is_uncovered:
                await self.orders.cancel_uncovered(Uncovered(change.instrument_id, [change.user_id]))
                yield "uncovered"

    async def try_to_move_margin(self, change: MarginChange) -> MarginMoved | None:
        """The ledger's step; None while the engine and settlement have to get further, which they do unless they are
        the test's business."""
        try:
            return await self.ledger.move_margin(change)
        except NotYetError:
            if self.settles_by_itself:
                await self.settle(next(i for i in SHIPPED if i.instrument_id == change.instrument_id))
            return None

    async def move_margin(self, change: MarginChange) -> MarginMoved:
        """The ledger's step, until it is done."""
        while (moved := await self.try_to_move_margin(change)) is None:
            pass
        return moved

    async def lever(self, user_id: int, leverage: int, instrument: Instrument = BTC) -> str | None:
        """Change a leverage; the refusal, if there is one."""
        return await self.change(self.margin_change(user_id, "LEVERAGE", leverage, instrument))

    async def change(self, change: MarginChange) -> str | None:
        """Carry out a margin change from beginning to end; the refusal, if there is one."""
        last = [step async for step in self.change_margin(change)][-1]
        return last if last.isupper() else None

    async def mark(self, price: object, instrument: Instrument = BTC) -> None:
        """The market process says what the mark price is, from here on."""
        self.held_marks.add(instrument.instrument_id)
        await say_mark(self.pool, instrument, Decimal(str(price)))

    async def cross(self, user_id: int, instrument: Instrument = BTC) -> None:
        """All of the user's money stands behind what they open from now on."""
        async with self.pool.acquire() as conn, conn.transaction():
            await set_margin_mode(conn, user_id, instrument, "CROSS")

    async def cancel(self, *order_ids: int) -> None:
        await self.orders.request_cancels(await self.take_in_cancels(*order_ids))

    async def match(self, instrument: Instrument = BTC, commands_max: int = 10_000) -> list[AnyEvent]:
        """Let the engine carry out commands of an instrument and write what they led to."""
        name, matcher = instrument.instrument_id, self.matchers[instrument.instrument_id]
        async with self.pool.acquire() as conn:
            commands = await read_commands(conn, name, self.command_seqs[name], commands_max)
            if not commands:
                return []
            lease = await leases.take(conn, name, "test")
            assert lease is not None
            first_seq, events, causes = matcher.event_seq + 1, list[AnyEvent](), list[int]()
            for seq, command in enumerate(commands, self.command_seqs[name] + 1):
                caused = matcher.apply(command)
                events += caused
                causes += [seq] * len(caused)
            self.command_seqs[name] += len(commands)
            await write_batch(conn, lease, instrument, Batch(self.command_seqs[name], first_seq, events, causes))
        return events

    def unsettled(self, instrument: Instrument = BTC, events_max: int = 10_000) -> EventRange | None:
        """The next range for settlement, None when everything is settled."""
        name = instrument.instrument_id
        to_seq = min(self.matchers[name].event_seq, self.settled[name] + events_max)
        return EventRange(name, self.settled[name], to_seq) if to_seq > self.settled[name] else None

    async def settlement(self, events: EventRange) -> AsyncIterator[str]:
        """The steps over one range, as SettlementWorkflow takes them."""
        await self.positions.apply_trades(events)
        yield "applied"
        await self.risk.apply_events(events)
        yield "exposed"
        uncovered = await self.ledger.settle(events)
        yield "booked"
        await self.positions.confirm(events)
        yield "confirmed"
        await self.orders.apply_events(events)
        yield "orders"
        if uncovered:
            await self.orders.cancel_uncovered(Uncovered(events.instrument_id, uncovered))
            yield "cancelled"
        progress = await self.matching.acknowledge(events)
        self.settled[events.instrument_id] = progress.settled_seq
        yield "acknowledged"

    async def publish_rate(self, funding_time: datetime, rate: str, mark: object, instrument: Instrument = BTC) -> None:
        await publish_rate(self.pool, instrument.instrument_id, funding_time, rate, mark)

    async def schedule_funding(self, interval_seconds: int, cap: str, instrument: Instrument = BTC) -> None:
        """What the market process says when it starts."""
        await self.pool.execute(
            "INSERT INTO market.funding_schedules (instrument_id, interval_seconds, rate_cap) VALUES ($1, $2, $3)",
            instrument.instrument_id,
            interval_seconds,
            Decimal(cap),
        )

    async def funding(self, run: FundingRun) -> AsyncIterator[str]:
        """The steps of a funding settlement, as FundingSettlementWorkflow takes them."""
        if await self.ledger.open_funding(run):
            yield "opened"
            command_seq = await self.matching.last_command(run.instrument_id)
            event_seq = await self.matching.events_of(LogPosition(run.instrument_id, command_seq))
            await self.positions.fix_funding_positions(FundingSnapshot(run, event_seq))
            yield "fixed"
            after_user_id: int | None = 0
            while after_user_id is not None:
                page = FundingPage(run, after_user_id)
                while True:
                    try:
                        after_user_id = await self.ledger.settle_funding(page)
                        break
                    except NotYetError:
                        if not self.settles_by_itself:
                            raise
                        yield "waits"
                        await self.settle_all()
                yield "paid"
                await self.positions.confirm_funding(page)
                yield "confirmed"
                for uncovered in await self.ledger.funding_uncovered(page):
                    await self.orders.cancel_uncovered(uncovered)
                    yield "uncovered"
        await self.ledger.close_funding(run)
        yield "closed"

    async def settle(self, instrument: Instrument = BTC) -> None:
        """Match and settle until there is nothing left to do."""
        while True:
            await self.match(instrument)
            events = self.unsettled(instrument)
            if events is None:
                return
            await finish(self.settlement(events))

    async def settle_all(self) -> None:
        """Match and settle all instruments."""
        for instrument in SHIPPED:
            await self.settle(instrument)

    async def trade(self, buyer: int, seller: int, quantity: str, price: object, instrument: Instrument = BTC) -> None:
        """A trade between two users, settled; the seller rests first."""
        await self.place(limit(seller, "SELL", quantity, price, instrument))
        await self.place(limit(buyer, "BUY", quantity, price, instrument))
        await self.settle(instrument)

    async def status(self, order_id: int) -> tuple[str, str | None]:
        row = await self.pool.fetchrow("SELECT status, failure_reason FROM orders.orders WHERE order_id = $1", order_id)
        assert row is not None
        return row["status"], row["failure_reason"]

    async def balance(self, user_id: int) -> tuple[Decimal, Decimal]:
        """Available and reserved USDT."""
        row = await self.pool.fetchrow(
            "SELECT available, reserved FROM ledger.ledger_balances WHERE user_id = $1 AND asset = 'USDT'", user_id
        )
        return (row["available"], row["reserved"]) if row else (Decimal(0), Decimal(0))

    async def system(self, account: str) -> Decimal:
        return Decimal(
            await self.pool.fetchval("SELECT balance FROM ledger.system_balances WHERE account = $1", account)
        )


def instrument_of(order: NewOrder) -> Instrument:
    return next(i for i in SHIPPED if i.instrument_id == order.request.instrument_id)


def _decimal(figure: object) -> Decimal | None:
    return None if figure is None else Decimal(str(figure))


async def publish_rate(pool: Pool, instrument_id: str, funding_time: datetime, rate: str, mark: object) -> None:
    """What the market process does at a funding time."""
    await pool.execute(
        "INSERT INTO market.funding_rates"
        " (instrument_id, effective_at, rate, premium_average, samples, mark_price, source)"
        " VALUES ($1, $2, $3, 0, 1, $4, 'simulated')",
        instrument_id,
        funding_time,
        Decimal(rate),
        Decimal(str(mark)),
    )


async def finish(steps: AsyncIterator[str]) -> None:
    async for _ in steps:
        pass


async def advance(steps: AsyncIterator[str], until: str) -> None:
    """Take steps until the one named is done."""
    async for step in steps:
        if step == until:
            return
    raise AssertionError(f"Expected a step {until!r}")


async def dump(pool: Pool, *, without: Sequence[str] = ()) -> dict[str, list[str]]:
    """Every row of every table but `without`, apart from times and ids that a rolled back attempt uses up."""
    tables = [f"{table.schema}.{table.name}" for table in metadata.sorted_tables]
    selects = [
        f"SELECT '{name}' AS name, (to_jsonb(t) - $1::text[])::text AS row FROM {name} t"
        for name in tables
        if name not in without
    ]
    rows: dict[str, list[str]] = {name: [] for name in tables}
    for row in await pool.fetch(" UNION ALL ".join(selects), VOLATILE):
        rows[row["name"]].append(TIMES.sub("TIME", row["row"]))
    return {name: sorted(found) for name, found in rows.items() if found}


async def settlement_steps(
    world: World, instrument: Instrument = BTC
) -> AsyncIterator[tuple[str, Callable[[], Awaitable[Any]]]]:
    """The steps of settling all that can be matched, by name, each to be run by the caller."""
    await world.match(instrument)
    events = world.unsettled(instrument)
    assert events is not None
    uncovered: list[int] = []

    async def settle() -> list[int]:
        nonlocal uncovered
        uncovered = await world.ledger.settle(events)
        return uncovered

    yield "apply_trades", lambda: world.positions.apply_trades(events)
    yield "risk.apply_events", lambda: world.risk.apply_events(events)
    yield "settle", settle
    yield "confirm", lambda: world.positions.confirm(events)
    yield "orders.apply_events", lambda: world.orders.apply_events(events)
    if uncovered:
        yield "cancel_uncovered", lambda: world.orders.cancel_uncovered(Uncovered(events.instrument_id, uncovered))
    yield "acknowledge", lambda: world.matching.acknowledge(events)
    world.settled[instrument.instrument_id] = events.to_seq


async def assert_audit_is_clean(world: World) -> None:
    """Every invariant holds, and nothing is between two steps."""
    report = await run_audit(world.pool)
    assert report.ok, [check for check in report.checks if not check.ok]
    assert [check.name for check in report.checks if check.detail] == []


async def assert_conserved(world: World) -> None:
    """All money together is what was deposited, and nobody is below zero."""
    users = await world.pool.fetchval("SELECT sum(available + reserved) FROM ledger.ledger_balances")
    system = await world.pool.fetchval("SELECT sum(balance) FROM ledger.system_balances")
    assert users + system == 0
    worst = await world.pool.fetchval("SELECT min(least(available, reserved)) FROM ledger.ledger_balances")
    assert worst >= 0


async def outbox_events(pool: Pool, name: str) -> list[dict[str, Any]]:
    """Business events of one kind that were written, in order."""
    rows = await pool.fetch("SELECT payload FROM outbox.messages WHERE name = $1 ORDER BY message_id", name)
    return [json.loads(line) for row in rows for line in row["payload"].splitlines()]

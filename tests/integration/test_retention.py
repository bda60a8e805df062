"""Events and trades go when nobody needs them any more, and the audit still accounts for each trade."""

import asyncio
import hashlib
from datetime import UTC, datetime
from decimal import Decimal

import pytest
from redis.asyncio import Redis

from activities.ledger import audit
from activities.ledger.audit import run_audit
from domain.clock import to_ms
from engine import retention
from engine.lease import Lease
from engine.retention import CHECKPOINTS_MIN, SNAPSHOTS_KEPT, prune
from market.kline_feed import KlineFeed
from storage.db import Pool
from tests.integration.ledger_world import BTC, ETH, World, limit

ID = BTC.instrument_id
LEASE = Lease(ID, 1, 0, 0)
PAYLOAD, CHECKSUM = b"book", hashlib.sha256(b"book").digest()
TAPE = "SELECT count(*), sum(quantity), sum(maker_fee + taker_fee) FROM matching.trade_tickers WHERE instrument_id = $1"


@pytest.fixture
async def world(pool: Pool, redis: Redis) -> World:
    """Trades on two instruments, settled; snapshots and checkpoints of BTC at its last event, its klines counted."""
    world = World(pool, redis)
    await world.deposit(50_000, 1, 2, 3)
    for price in (60_000, 60_100, 60_200, 60_300):
        await world.trade(1, 2, "0.1", price)
        await world.trade(2, 3, "0.2", price)
    await world.trade(3, 2, "1", 3_000, ETH)
    await world.place(limit(3, "BUY", "0.2", 59_000))
    await world.settle()
    head = await last_seq(pool)
    for number in range(SNAPSHOTS_KEPT):
        await pool.execute(
            "INSERT INTO matching.snapshots VALUES ($1, $2, $3, 1, $4, $5)", ID, number, head, CHECKSUM, PAYLOAD
        )
    for number in range(CHECKPOINTS_MIN):
        await pool.execute(
            "INSERT INTO market.checkpoints VALUES ($1, $2, 1, $3, $4)", ID, head + number, CHECKSUM, PAYLOAD
        )
    await KlineFeed(pool, redis, [ID]).update(to_ms(datetime.now(UTC)))
    return world


async def totals(pool: Pool) -> tuple[object, ...]:
    """Up to which event the log was deleted; number, quantity and fees of the trades that went with it."""
    row = await pool.fetchrow(
        "SELECT event_seq, trades, quantity, fees FROM matching.pruned WHERE instrument_id = $1", ID
    )
    assert row is not None
    return tuple(row)


async def last_seq(pool: Pool) -> int:
    seq: int = await pool.fetchval("SELECT event_seq FROM matching.cursors WHERE instrument_id = $1", ID)
    return seq


async def pruned(pool: Pool, events_kept: int = 0) -> int:
    """Prune; up to which event nothing is left, by the log itself."""
    async with pool.acquire() as conn:
        await prune(conn, LEASE, events_kept)
    rest = [r[0] for r in await pool.fetch("SELECT seq FROM matching.events WHERE instrument_id = $1 ORDER BY 1", ID)]
    head = await last_seq(pool)
    assert rest == list(range(head - len(rest) + 1, head + 1))
    return head - len(rest)


async def broken(pool: Pool) -> set[str]:
    return {check.name for check in (await run_audit(pool)).checks if not check.ok}


async def test_what_everybody_has_seen_is_deleted_and_its_totals_are_kept(world: World, pool: Pool) -> None:
    tape = await pool.fetchrow(TAPE, ID)
    others = await pool.fetchval("SELECT count(*) FROM matching.events WHERE instrument_id <> $1", ID)
    assert tape is not None
    assert tape[0] == 8
    head = await last_seq(pool)
    assert await pruned(pool) == head
    assert await pool.fetchval("SELECT count(*) FROM matching.trade_tickers WHERE instrument_id = $1", ID) == 0
    assert await pool.fetchval("SELECT count(*) FROM matching.events") == others > 0
    assert await totals(pool) == (head, *tape)


BEHIND = {
    "risk": "UPDATE risk.cursors SET applied_seq = 3",
    "ledger": "UPDATE ledger.cursors SET applied_seq = 3",
    "positions": "UPDATE positions.cursors SET applied_seq = 3",
    "confirmation": "UPDATE positions.cursors SET confirmed_seq = 3",
    "orders": "UPDATE orders.cursors SET applied_seq = 3",
    "settlement": "UPDATE matching.consumers SET acked_seq = 3",
    "another consumer": f"INSERT INTO matching.consumers VALUES ('{ID}', 'another', 3)",
    "the oldest checkpoint": f"INSERT INTO market.checkpoints SELECT '{ID}', 3, 1, checksum, payload"
    " FROM market.checkpoints LIMIT 1",
    "the oldest snapshot": "UPDATE matching.snapshots SET event_seq = 3 WHERE command_seq = 0",
}


@pytest.mark.parametrize("who", BEHIND)
async def test_nobody_loses_an_event_that_it_has_not_seen(world: World, pool: Pool, who: str) -> None:
    await pool.execute(BEHIND[who])
    assert await pruned(pool) == 3
    assert await pool.fetchval("SELECT min(seq) FROM matching.trade_tickers WHERE instrument_id = $1", ID) > 3


@pytest.mark.parametrize("counted", [0, 3])
async def test_a_trade_stays_until_the_klines_have_counted_it(world: World, pool: Pool, counted: int) -> None:
    await pool.execute("UPDATE market.kline_buckets SET last_seq = $1", counted)
    tape = [row[0] for row in await pool.fetch("SELECT seq FROM matching.trade_tickers WHERE instrument_id = $1", ID)]
    first = min(seq for seq in tape if seq > counted)
    assert await pruned(pool) == first - 1
    assert first in tape


UNKNOWN = [
    "DELETE FROM risk.cursors",
    "DELETE FROM ledger.cursors",
    "DELETE FROM positions.cursors",
    "DELETE FROM orders.cursors",
    "DELETE FROM matching.consumers",
    "DELETE FROM market.checkpoints",
    "DELETE FROM market.checkpoints WHERE seq = (SELECT min(seq) FROM market.checkpoints)",
    "UPDATE market.checkpoints SET payload = 'x' WHERE seq = (SELECT min(seq) FROM market.checkpoints)",
    "DELETE FROM matching.snapshots WHERE command_seq = 0",
    "UPDATE matching.snapshots SET payload = 'x' WHERE command_seq = 0",
]


@pytest.mark.parametrize("statement", UNKNOWN)
async def test_nothing_is_deleted_while_a_position_is_unknown_or_a_way_back_is_bad(
    world: World, pool: Pool, statement: str
) -> None:
    await pool.execute(statement)
    assert await pruned(pool) == 0


async def test_the_newest_events_are_kept_in_any_case(world: World, pool: Pool) -> None:
    head = await last_seq(pool)
    assert await pruned(pool, head - 5) == 5
    assert await pruned(pool, head + 5) == 5
    assert await pruned(pool, 1_000_000) == 5


async def test_totals_add_up_over_many_small_transactions(
    world: World, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "DELETED_MAX", 3)
    monkeypatch.setattr(retention, "EVENTS_MAX", 7)
    tape, head = await pool.fetchrow(TAPE, ID), await last_seq(pool)
    assert tape is not None
    steps = [await pruned(pool) for _ in range(head // 7 + 1)]
    assert steps == [min(7 * n, head) for n in range(1, head // 7 + 2)]
    assert await totals(pool) == (head, *tape)


async def test_two_that_prune_at_once_count_each_trade_once(
    world: World, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "DELETED_MAX", 1)
    tape, head = await pool.fetchrow(TAPE, ID), await last_seq(pool)
    assert tape is not None

    async def prune_once() -> None:
        async with pool.acquire() as conn:
            await prune(conn, LEASE, 0)

    await asyncio.gather(*(prune_once() for _ in range(3)))
    assert await totals(pool) == (head, *tape)


async def test_the_audit_passes_with_a_tape_that_begins_anywhere(world: World, pool: Pool) -> None:
    head = await last_seq(pool)
    for kept in range(head, -1, -1):
        await pruned(pool, kept)
        assert await broken(pool) == set(), kept
    await world.trade(1, 2, "0.1", 60_000)
    assert await broken(pool) == set()


FILL = f"event_id = (SELECT min(event_id) FROM positions.position_events WHERE instrument_id = '{ID}')"
CORRUPTIONS = [
    ("trades_have_two_sides", f"DELETE FROM positions.position_events WHERE {FILL}"),
    ("trades_have_two_sides", f"UPDATE positions.position_events SET quantity = quantity + 0.001 WHERE {FILL}"),
    (
        "trades_have_two_sides",
        f"UPDATE positions.position_events SET quantity = quantity + 1 WHERE seq = (SELECT seq"
        f" FROM positions.position_events WHERE {FILL}) AND instrument_id = '{ID}'",
    ),
    (
        "trades_have_two_sides",
        f"DELETE FROM positions.position_events WHERE seq = (SELECT seq"
        f" FROM positions.position_events WHERE {FILL}) AND instrument_id = '{ID}'",
    ),
    ("trades_have_two_sides", "UPDATE matching.pruned SET trades = trades + 1"),
    ("trades_have_two_sides", "UPDATE matching.pruned SET quantity = quantity - 0.001"),
    ("trades_are_booked_once", "UPDATE matching.pruned SET fees = fees + 0.00000001"),
    ("trades_are_booked_once", f"UPDATE positions.position_events SET fee = fee + 0.00000001 WHERE {FILL}"),
    (
        "trades_are_booked_once",
        "UPDATE ledger.ledger_entries SET reference_id = '1' WHERE account = 'exchange:fees' AND entry_id ="
        " (SELECT min(entry_id) FROM ledger.ledger_entries WHERE account = 'exchange:fees')",
    ),
]


async def test_the_audit_sees_what_is_wrong_with_deleted_trades(world: World, pool: Pool) -> None:
    assert await pruned(pool, 2) > 10
    for name, corruption in CORRUPTIONS:
        async with pool.acquire() as conn:
            transaction = conn.transaction()
            await transaction.start()
            await conn.execute(corruption)
            check = await audit._check(conn, name, audit.STRICT_CHECKS[name])
            await transaction.rollback()
        assert not check.ok, corruption
    assert await broken(pool) == set()


async def test_a_tape_without_trades_leaves_totals_of_zero(world: World, pool: Pool) -> None:
    await pool.execute("UPDATE risk.cursors SET applied_seq = 1")
    assert await pruned(pool) == 1
    assert await totals(pool) == (1, 0, Decimal(0), Decimal(0))

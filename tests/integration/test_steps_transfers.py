"""Deposits and withdrawals: once per reference, and only of what is available."""

import asyncio
from decimal import Decimal

import pytest
from redis.asyncio import Redis

from activities.ledger.audit import run_audit
from activities.ledger.transfers import transfer_external
from domain.problems import Problem
from storage.db import Pool
from tests.integration.ledger_world import World, assert_conserved, dump, limit, outbox_events


@pytest.fixture
def world(pool: Pool, redis: Redis) -> World:
    return World(pool, redis)


async def transfer(pool: Pool, kind: str, reference: str, amount: object, user_id: int = 1) -> bool:
    async with pool.acquire() as conn, conn.transaction():
        return await transfer_external(conn, kind, reference, user_id, "USDT", Decimal(str(amount)))


async def test_a_deposit_is_credited_and_booked_against_the_outside(world: World, pool: Pool) -> None:
    assert await transfer(pool, "DEPOSIT", "a", "100.5")
    assert await world.balance(1) == (Decimal("100.5"), Decimal(0))
    assert await world.system("external:deposits") == Decimal("-100.5")
    (event,) = await outbox_events(pool, "LedgerEntryCreated")
    assert (event["deltaAvailable"], event["balanceAfter"], event["referenceId"]) == ("100.5", "100.5", "a")


async def test_the_same_reference_again_changes_nothing(world: World, pool: Pool) -> None:
    assert await transfer(pool, "DEPOSIT", "a", 100)
    before = await dump(pool)
    assert not await transfer(pool, "DEPOSIT", "a", "100.00000000")
    assert await dump(pool) == before


async def test_repeats_at_the_same_time_count_once(world: World, pool: Pool) -> None:
    done = await asyncio.gather(*(transfer(pool, "DEPOSIT", "a", 100) for _ in range(8)))
    assert sorted(done) == [False] * 7 + [True]
    assert await world.balance(1) == (Decimal(100), Decimal(0))


async def test_different_references_at_the_same_time_all_count(world: World, pool: Pool) -> None:
    await asyncio.gather(*(transfer(pool, "DEPOSIT", f"r{n}", 10, user_id=n % 3) for n in range(30)))
    assert [await world.balance(user) for user in range(3)] == [(Decimal(100), Decimal(0))] * 3
    await assert_conserved(world)


@pytest.mark.parametrize(("amount", "user_id"), [(101, 1), (100, 2)])
async def test_a_reference_of_another_transfer_is_refused(pool: Pool, amount: int, user_id: int) -> None:
    await transfer(pool, "DEPOSIT", "a", 100)
    before = await dump(pool)
    with pytest.raises(Problem, match="VALIDATION_FAILED"):
        await transfer(pool, "DEPOSIT", "a", amount, user_id)
    assert await dump(pool) == before


async def test_deposits_and_withdrawals_have_references_of_their_own(world: World, pool: Pool) -> None:
    assert await transfer(pool, "DEPOSIT", "a", 100)
    assert await transfer(pool, "WITHDRAWAL", "a", -100)
    assert await world.balance(1) == (Decimal(0), Decimal(0))


async def test_more_than_is_available_cannot_leave(world: World, pool: Pool) -> None:
    await world.deposit(10_000, 1)
    await world.place(limit(1, "BUY", "1", 60_000))
    before = await dump(pool)
    with pytest.raises(Problem, match="INSUFFICIENT_FUNDS"):
        await transfer(pool, "WITHDRAWAL", "a", "-3970.00000001")
    assert await dump(pool) == before
    assert await transfer(pool, "WITHDRAWAL", "a", -3970)
    assert await world.balance(1) == (Decimal(0), Decimal(6_030))
    assert (await run_audit(pool)).ok


async def test_a_refused_withdrawal_may_be_tried_again_with_its_reference(world: World, pool: Pool) -> None:
    with pytest.raises(Problem, match="INSUFFICIENT_FUNDS"):
        await transfer(pool, "WITHDRAWAL", "a", -100)
    await world.deposit(100, 1)
    assert await transfer(pool, "WITHDRAWAL", "a", -100)


async def test_withdrawals_at_the_same_time_do_not_share_the_same_money(world: World, pool: Pool) -> None:
    await world.deposit(100, 1)
    done = await asyncio.gather(*(transfer(pool, "WITHDRAWAL", f"w{n}", -40) for n in range(5)), return_exceptions=True)
    assert sum(result is True for result in done) == 2
    assert all(result is True or isinstance(result, Problem) for result in done)
    assert await world.balance(1) == (Decimal(20), Decimal(0))
    await assert_conserved(world)


async def test_nothing_and_amounts_finer_than_the_ledger_are_refused(pool: Pool) -> None:
    before = await dump(pool)
    for kind, amount in (("DEPOSIT", "0.000000001"), ("WITHDRAWAL", "-0.000000001"), ("DEPOSIT", "0")):
        with pytest.raises(Problem, match="VALIDATION_FAILED"):
            await transfer(pool, kind, "a", amount)
    assert await dump(pool) == before

"""The pruner deletes what nobody can ask for any more, and nothing else."""

from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest
from redis.asyncio import Redis

from activities.ledger.transfers import transfer_external
from domain.contracts.funding import FundingRun
from monitors.pruner import KEPT, prune
from settings import Settings
from storage.db import Pool
from tests.integration.ledger_world import BTC, World, advance, assert_conserved, finish, limit

LONG = timedelta(days=8)
AUDITS_KEPT = timedelta(days=30)


@pytest.fixture
async def world(pool: Pool, redis: Redis) -> World:
    world = World(pool, redis)
    await world.deposit(100_000, 1, 2)
    return world


async def age(pool: Pool) -> None:
    """Everything there is happened long ago."""
    for table in ("risk.steps", "ledger.steps", "orders.sagas"):
        await pool.execute(f"UPDATE {table} SET created_at = created_at - $1::interval", LONG)


async def pruned(pool: Pool, limit: int = 1_000) -> int:
    async with pool.acquire() as conn:
        return await prune(conn, KEPT, AUDITS_KEPT, limit)


async def kinds(pool: Pool) -> list[str]:
    """Which kinds of steps are left, and SAGA for every saga."""
    rows = await pool.fetch(
        "SELECT split_part(step_id, ':', 1) FROM risk.steps"
        " UNION ALL SELECT split_part(step_id, ':', 1) FROM ledger.steps UNION ALL SELECT 'SAGA' FROM orders.sagas"
    )
    return sorted(row[0] for row in rows)


async def test_old_steps_and_sagas_go_but_deposits_and_what_is_still_asked_for_stay(world: World, pool: Pool) -> None:
    await world.trade(1, 2, "0.1", 50_000)
    await world.trade(1, 2, "0.1", 50_000)
    assert await kinds(pool) == [*["DEPOSIT"] * 2, *["SAGA"] * 4, *["check"] * 4, *["freeze"] * 4, *["settle"] * 2]
    await age(pool)
    assert await pruned(pool, limit=1) == 4 + 4 + 2 + 1
    # The freeze of each one's last check, and the margin moves of the last range.
    assert await kinds(pool) == [*["DEPOSIT"] * 2, *["freeze"] * 2, "settle"]
    assert await pruned(pool) == 0


async def test_users_whose_steps_were_deleted_go_on_trading(world: World, pool: Pool) -> None:
    await world.trade(1, 2, "0.1", 50_000)
    await age(pool)
    await pruned(pool)
    await world.trade(2, 1, "0.1", 51_000)
    assert await pool.fetchval("SELECT count(*) FROM orders.orders WHERE status = 'FILLED'") == 4
    await assert_conserved(world)


async def test_a_deposit_repeated_after_years_is_booked_once(world: World, pool: Pool) -> None:
    await age(pool)
    await pruned(pool)
    async with pool.acquire() as conn, conn.transaction():
        assert not await transfer_external(conn, "DEPOSIT", "first-1", 1, "USDT", Decimal(100_000))
    assert (await world.balance(1))[0] == 100_000


async def test_what_is_young_stays(world: World, pool: Pool) -> None:
    await world.trade(1, 2, "0.1", 50_000)
    assert await pruned(pool) == 0


async def test_a_saga_that_is_still_open_keeps_its_steps(world: World, pool: Pool) -> None:
    batch = await world.take_in(limit(1, "BUY", "0.1", 50_000))
    placement = world.placement(batch)
    await advance(placement, "frozen")
    before = await kinds(pool)
    await age(pool)
    assert await pruned(pool) == 0
    assert await kinds(pool) == before
    await advance(placement, "accepted")
    assert await pruned(pool) == 2


async def test_old_prices_go_but_the_last_of_an_instrument_stays(pool: Pool) -> None:
    for table, column in (
        ("mark_prices", "mark_price, fair_price, premium_index, funding_basis"),
        ("index_prices", ""),
    ):
        values = ", 1, 1, 0, 0" if column else ", '{}'"
        await pool.execute(
            f"INSERT INTO market.{table} (instrument_id, calculated_at, index_price, source, {column or 'sources'})"
            f" SELECT i, now() - n * interval '1 day', 1, 'simulated'{values}"
            " FROM unnest('{BTC-USDT-PERP,ETH-USDT-PERP}'::text[]) AS i, generate_series(5, 10) AS n"
            " WHERE i = 'BTC-USDT-PERP' OR n > 8",
        )
    # Of BTC the days 7 to 10 (seven days ago is a moment more than seven days by now), of ETH all but the ninth.
    assert await pruned(pool, limit=1) == 2 * (4 + 1)
    for table in ("mark_prices", "index_prices"):
        rows = await pool.fetch(f"SELECT instrument_id, count(*) FROM market.{table} GROUP BY 1 ORDER BY 1")
        assert [tuple(row) for row in rows] == [("BTC-USDT-PERP", 2), ("ETH-USDT-PERP", 1)]
    assert await pruned(pool) == 0


async def test_positions_of_old_funding_go_once_it_is_done_and_their_payments_stay(world: World, pool: Pool) -> None:
    await world.trade(1, 2, "0.1", 50_000)
    done, open_still = (datetime(2099, 1, day, tzinfo=UTC) for day in (1, 2))
    for moment in (done, open_still):
        await world.publish_rate(moment, "0.0001", 50_000)
    await finish(world.funding(FundingRun(BTC.instrument_id, done.isoformat())))
    await advance(world.funding(FundingRun(BTC.instrument_id, open_still.isoformat())), "fixed")
    await pool.execute("UPDATE ledger.funding_runs SET updated_at = updated_at - $1::interval", LONG)
    assert await pruned(pool, limit=1) == 2
    times = await pool.fetch("SELECT DISTINCT funding_time FROM positions.funding_positions")
    assert [row[0] for row in times] == [open_still]
    assert await pool.fetchval("SELECT count(*) FROM positions.position_events WHERE type = 'FUNDING'") == 2


async def test_attempts_to_sign_in_are_on_record_for_as_long_as_is_set(pool: Pool) -> None:
    await pool.execute(
        "INSERT INTO auth.login_audits (email, outcome, created_at)"
        " SELECT 'day' || n, 'SUCCESS', now() - n * interval '1 day' FROM generate_series(40, 25, -1) AS n"
    )
    # Days 30 to 40: thirty days ago is a moment more than thirty days by now.
    assert await pruned(pool, limit=2) == 11
    assert await pool.fetchval("SELECT string_agg(email, ' ' ORDER BY audit_id) FROM auth.login_audits") == (
        "day29 day28 day27 day26 day25"
    )
    assert await pruned(pool) == 0
    assert Settings().login_audit_retention_days == 90


async def test_sessions_that_ended_long_ago_go_and_good_ones_stay(pool: Pool) -> None:
    await pool.execute(
        """
        INSERT INTO auth.auth_sessions (session_id, user_id, roles, refresh_token_hash, expires_at, revoked_at)
        VALUES (gen_random_uuid(), 1, '{user}', 'expired', now() - $1::interval, NULL),
               (gen_random_uuid(), 1, '{user}', 'revoked', now() + interval '1 day', now() - $1::interval),
               (gen_random_uuid(), 1, '{user}', 'good', now() + interval '1 day', NULL),
               (gen_random_uuid(), 1, '{user}', 'just expired', now() - interval '1 day', NULL),
               (gen_random_uuid(), 1, '{user}', 'just revoked', now() + interval '1 day', now())
        """,
        LONG,
    )
    assert await pruned(pool, limit=1) == 2
    left = await pool.fetch("SELECT refresh_token_hash FROM auth.auth_sessions ORDER BY 1")
    assert [row[0] for row in left] == ["good", "just expired", "just revoked"]

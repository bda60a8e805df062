"""What is told of positions: only what settlement has confirmed, with its event row, and every closing."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta
from decimal import Decimal
from typing import Any

import pytest
from redis.asyncio import Redis

from activities.liquidation.triggering import Opened, trigger
from activities.liquidation.warnings import warn
from activities.matching.instruments import Rules, read_instruments, read_tiers
from activities.positions.telling import forget_told_marks, tell_moved
from storage.db import Pool
from tests.integration.ledger_world import (
    BTC,
    ETH,
    World,
    advance,
    assert_audit_is_clean,
    finish,
    limit,
    outbox_events,
)
from tests.waiting import until

D = Decimal
ID = BTC.instrument_id
MARKS = "SELECT user_id, type, status, side, price, quantity, realized_pnl, signed_quantity_after, cause" + (
    " FROM positions.position_events WHERE cause = 'MARK' ORDER BY event_id"
)


@pytest.fixture
async def world(pool: Pool, redis: Redis) -> World:
    world = World(pool, redis)
    await world.deposit(50_000, 1, 2)
    return world


async def tell(world: World, mark: object) -> None:
    """A mark tick."""
    async with world.pool.acquire() as conn:
        await tell_moved(conn, ID, D(str(mark)), (await read_tiers(conn))[ID], 0, 10)


async def begun(world: World, buyer: int, seller: int, quantity: str, price: object) -> AsyncIterator[str]:
    """The settlement of a trade that has been matched."""
    await world.place(limit(seller, "SELL", quantity, price))
    await world.place(limit(buyer, "BUY", quantity, price))
    await world.match()
    events = world.unsettled()
    assert events is not None
    return world.settlement(events)


async def told(world: World, name: str, user_id: int = 1) -> list[dict[str, Any]]:
    return [event for event in await outbox_events(world.pool, name) if event["userId"] == str(user_id)]


@pytest.mark.parametrize("step", ["applied", "exposed", "booked"])
@pytest.mark.parametrize("sides", [(1, 2), (2, 1)])
async def test_a_mark_tells_nothing_of_a_position_before_it_is_confirmed(
    world: World, sides: tuple[int, int], step: str
) -> None:
    settlement = await begun(world, *sides, "1", 60_000)
    await advance(settlement, step)
    await tell(world, 60_000)
    assert await outbox_events(world.pool, "PositionUpdated") == []
    await finish(settlement)
    for user_id in (1, 2):
        [event] = await told(world, "PositionUpdated", user_id)
        assert event["liquidationPrice"] is not None
        [risk] = await told(world, "RiskUpdate", user_id)
        assert D(risk["marginRatio"]) == D("0.1")
    assert await world.pool.fetch(MARKS) == []


@pytest.mark.parametrize("step", ["applied", "exposed", "booked"])
async def test_a_mark_tells_nothing_of_a_position_that_grows_until_that_is_confirmed(world: World, step: str) -> None:
    await world.trade(1, 2, "1", 60_000)
    settlement = await begun(world, 1, 2, "1", 60_000)
    await advance(settlement, step)
    await tell(world, 62_000)
    assert len(await told(world, "PositionUpdated")) == 1
    await finish(settlement)
    await tell(world, 62_000)
    assert [event["quantity"] for event in await told(world, "PositionUpdated")] == ["1", "2", "2"]


async def test_a_margin_change_tells_nothing_of_fills_that_are_not_confirmed(world: World) -> None:
    await world.trade(1, 2, "1", 60_000)
    change = world.change_margin(world.margin_change(1, "MARGIN", 500))
    await advance(change, "moved")
    settlement = await begun(world, 1, 2, "1", 60_000)
    await advance(settlement, "applied")
    await finish(change)
    assert len(await told(world, "PositionUpdated")) == 1
    await finish(settlement)
    assert [event["quantity"] for event in await told(world, "PositionUpdated")] == ["1", "2"]
    assert await world.pool.fetchval("SELECT margin FROM positions.positions WHERE user_id = 1") == 12_500
    await assert_audit_is_clean(world)


async def test_a_mark_that_moves_a_position_leaves_a_row_and_tells_its_risk(world: World) -> None:
    await world.trade(1, 2, "1", 60_000)
    before = {name: len(await told(world, name)) for name in ("PositionUpdated", "RiskUpdate")}
    await tell(world, 60_599)
    assert await world.pool.fetch(MARKS) == []
    await tell(world, 60_600)
    assert [tuple(row) for row in await world.pool.fetch(MARKS)] == [
        (1, "MARK", "TOLD", "LONG", 60_600, 1, 0, 1, "MARK"),
        (2, "MARK", "TOLD", "SHORT", 60_600, 1, 0, -1, "MARK"),
    ]
    for name, count in before.items():
        assert len(await told(world, name)) == count + 1
    [*_, risk] = await told(world, "RiskUpdate")
    assert D(risk["marginRatio"]) == ((6_000 + 600) / D(60_600)).quantize(D("1e-8"))
    assert risk["status"] == "OPEN"
    await assert_audit_is_clean(world)
    await world.trade(2, 1, "1", 60_600)
    await assert_audit_is_clean(world)


async def test_rows_of_marks_go_after_some_days_and_nothing_else(world: World) -> None:
    await world.trade(1, 2, "1", 60_000)
    await tell(world, 61_000)
    await world.pool.execute("UPDATE positions.position_events SET created_at = created_at - interval '8 days'")
    await tell(world, 62_000)
    async with world.pool.acquire() as conn:
        assert await forget_told_marks(conn, timedelta(days=7), 1) == 1
        assert await forget_told_marks(conn, timedelta(days=7), 10) == 1
        assert await forget_told_marks(conn, timedelta(days=7), 10) == 0
    assert [row["price"] for row in await world.pool.fetch(MARKS)] == [62_000, 62_000]
    assert await world.pool.fetchval("SELECT count(*) FROM positions.v_fills") == 2
    await assert_audit_is_clean(world)


async def test_a_flip_publishes_what_it_closed(world: World) -> None:
    await world.trade(1, 2, "1", 60_000)
    await world.trade(2, 1, "3", 61_000)
    assert [event["realizedPnl"] for event in await told(world, "PositionClosed", 1)] == ["1000"]
    assert [event["realizedPnl"] for event in await told(world, "PositionClosed", 2)] == ["-1000"]
    assert (await told(world, "PositionUpdated"))[-1]["side"] == "SHORT"
    names = await world.pool.fetch(
        "SELECT name FROM outbox.messages WHERE name IN ('PositionUpdated', 'PositionClosed') ORDER BY message_id"
    )
    assert names[-1]["name"] == "PositionUpdated"


async def test_every_closing_in_one_range_is_published_with_the_profit_up_to_it(world: World) -> None:
    await world.trade(1, 2, "1", 60_000)
    for seller, buyer, quantity, price in ((1, 2, "2", 61_000), (2, 1, "2", 60_500), (1, 2, "1", 60_600)):
        await world.place(limit(seller, "SELL", quantity, price))
        await world.place(limit(buyer, "BUY", quantity, price))
    await world.settle()
    # Long 1 from 60 000 to 61 000, short 1 from there to 60 500, long 1 from there to 60 600.
    assert [event["realizedPnl"] for event in await told(world, "PositionClosed", 1)] == ["1000", "1500", "1600"]
    assert [event["realizedPnl"] for event in await told(world, "PositionClosed", 2)] == ["-1000", "-1500", "-1600"]
    await assert_audit_is_clean(world)


async def test_a_change_of_the_leverage_of_what_is_flat_closes_nothing_again(world: World) -> None:
    await world.trade(1, 2, "1", 60_000)
    await world.trade(2, 1, "1", 60_000)
    assert await world.lever(1, 5) is None
    assert len(await told(world, "PositionClosed")) == 1


async def warned(world: World, mark: object, eth: object = 3_000) -> int:
    """A mark tick, for warnings."""
    rules = Rules(await read_instruments(world.pool), await read_tiers(world.pool))
    async with world.pool.acquire() as conn:
        return await warn(conn, {ID: D(str(mark)), ETH.instrument_id: D(str(eth))}, rules)


async def warning_price(world: World, user_id: int) -> Decimal:
    found = await world.pool.fetchval("SELECT warning_price FROM positions.positions WHERE user_id = $1", user_id)
    assert found is not None
    return Decimal(found)


@pytest.mark.parametrize("step", ["applied", "exposed", "booked"])
@pytest.mark.parametrize("sides", [(1, 2), (2, 1)])
async def test_nobody_is_warned_of_a_position_that_grows_until_that_is_confirmed(
    world: World, sides: tuple[int, int], step: str
) -> None:
    """The long or the short of user 1 grows: a warning by the margin of before would be of a loss there is not."""
    await world.trade(*sides, "1", 60_000)
    before = await warning_price(world, 1)
    settlement = await begun(world, *sides, "1", 60_000)
    await advance(settlement, step)
    assert await warned(world, before) == 0
    await finish(settlement)
    assert await warned(world, await warning_price(world, 1)) == 1
    [event] = [event for event in await told(world, "RiskUpdate") if event["status"] == "WARNING"]
    assert 0 < D(event["marginRatio"]) < D("0.02")
    assert event["liquidationPrice"] is not None
    snapshots = "SELECT margin FROM risk.risk_snapshots WHERE status = 'WARNING' AND user_id = 1"
    assert [row["margin"] for row in await world.pool.fetch(snapshots)] == [12_000]


async def test_nobody_is_warned_between_the_move_of_a_margin_and_its_adoption(world: World) -> None:
    await world.trade(1, 2, "1", 60_000)
    before = await warning_price(world, 1)
    change = world.change_margin(world.margin_change(1, "MARGIN", 500))
    await advance(change, "moved")
    assert await warned(world, before) == 0
    await finish(change)
    assert await warned(world, before) == 0
    assert await warned(world, await warning_price(world, 1)) == 1


@pytest.mark.parametrize("step", ["applied", "exposed", "booked"])
@pytest.mark.parametrize(("direction", "btc", "eth", "worse"), [(1, 70_000, 2_400, 2_262), (-1, 50_000, 3_600, 3_738)])
async def test_nobody_is_warned_of_a_cross_account_whose_profit_is_not_booked_yet(
    world: World, direction: int, btc: int, eth: int, worse: int, step: str
) -> None:
    """A closed profit of 10 000 has left the positions and is not in the balance yet; 24 000 of 20 000 are lost."""
    await world.deposit(20_000, 3)
    sides = (3, 2) if direction > 0 else (2, 3)
    for instrument, quantity, price in ((BTC, "1", 60_000), (ETH, "40", 3_000)):
        await world.cross(3, instrument)
        await world.trade(*sides, quantity, price, instrument)
    await world.mark(eth, ETH)
    settlement = await begun(world, *((1, 3) if direction > 0 else (3, 1)), "1", btc)
    await advance(settlement, step)
    # Who traded with them is warned, with good reason.
    await warned(world, btc, eth)
    await finish(settlement)
    await warned(world, btc, eth)
    assert {event["status"] for event in await told(world, "RiskUpdate", 3)} == {"OPEN", "CLOSED"}
    await warned(world, btc, worse)
    assert (await told(world, "RiskUpdate", 3))[-1]["status"] == "WARNING"


async def begin_to_take_over(
    world: World, step: Callable[[], Awaitable[object]], marks: dict[str, Decimal]
) -> list[Opened]:
    """A look that has found a position due, and takes it over only after a step of settlement."""
    rules = Rules(await read_instruments(world.pool), await read_tiers(world.pool))
    async with world.pool.acquire() as holder, world.pool.acquire() as conn:
        async with holder.transaction():
            await holder.execute("SELECT FROM risk.exposures WHERE user_id = 1 FOR UPDATE")
            look = asyncio.create_task(trigger(conn, marks, rules))

            async def waits() -> bool:
                return bool(await world.pool.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"))

            await until(waits, 10, "the look to wait for the exposure")
            await step()
        return await look


@pytest.mark.parametrize(("sides", "crossed"), [((1, 2), 54_000), ((2, 1), 66_000)])
async def test_what_is_filled_while_it_is_taken_over_is_neither_taken_over_nor_told_of(
    world: World, sides: tuple[int, int], crossed: int
) -> None:
    await world.trade(*sides, "1", 60_000)
    settlement = await begun(world, *sides, "1", 60_000)
    await world.mark(crossed)
    before = len(await told(world, "RiskUpdate"))
    assert await begin_to_take_over(world, lambda: advance(settlement, "applied"), {ID: D(crossed)}) == []
    assert len(await told(world, "RiskUpdate")) == before
    await finish(settlement)
    rules = Rules(await read_instruments(world.pool), await read_tiers(world.pool))
    async with world.pool.acquire() as conn:
        [opened] = await trigger(conn, {ID: D(crossed)}, rules)
    assert opened.user_id == 1
    assert (await told(world, "RiskUpdate"))[-1]["status"] == "LIQUIDATION_PENDING"
    assert await world.pool.fetchval("SELECT margin FROM risk.risk_snapshots WHERE user_id = 1") == 12_000

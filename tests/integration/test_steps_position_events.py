"""What is told of positions: only what settlement has confirmed, with its event row, and every closing."""

from collections.abc import AsyncIterator
from datetime import timedelta
from decimal import Decimal
from typing import Any

import pytest
from redis.asyncio import Redis

from activities.instruments import read_tiers
from activities.positions import forget_told_marks, tell_moved
from storage.db import Pool
from tests.integration.ledger_world import (
    BTC,
    World,
    advance,
    assert_audit_is_clean,
    finish,
    limit,
    outbox_events,
)

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

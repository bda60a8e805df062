"""Amending an order: what it needs more is reserved before the engine is asked, whose answer settles the rest."""

from decimal import Decimal
from typing import Any

import pytest
from redis.asyncio import Redis

from activities.risk.exposures import set_margin_mode
from domain.problems import Problem
from domain.sagas import Acceptance, Refusal, StepRequest
from storage.db import Pool
from tests.integration.ledger_world import BTC, World, advance, assert_audit_is_clean, finish, limit, outbox_events

D = Decimal


@pytest.fixture
def world(pool: Pool, redis: Redis) -> World:
    return World(pool, redis)


async def terms(world: World, order_id: int) -> tuple[object, ...]:
    """Price, quantity, what is filled, and status of an order."""
    row = await world.pool.fetchrow(
        "SELECT price, quantity, filled_quantity, status FROM orders.orders WHERE order_id = $1", order_id
    )
    assert row is not None
    return row["price"], row["quantity"], row["filled_quantity"], row["status"]


async def test_a_larger_and_dearer_order_reserves_the_difference_before_the_engine_is_asked(world: World) -> None:
    await world.deposit(10_000, 1)
    (order,) = await world.place(limit(1, "BUY", "0.5", 50_000))
    await world.settle()
    # 25000 / 10 + 12.5, and 36000 / 10 + 18.
    assert await world.balance(1) == (D("7487.5"), D("2512.5"))
    amendment = await world.amend(1, order, 60_000, "0.6")
    assert await world.balance(1) == (D(6_382), D(3_618))
    assert await world.amendment(amendment) == ("ACCEPTED", None)
    assert await terms(world, order) == (50_000, D("0.5"), 0, "PLACED")
    await assert_audit_is_clean(world)
    await world.settle()
    assert await world.amendment(amendment) == ("AMENDED", None)
    assert await terms(world, order) == (60_000, D("0.6"), 0, "PLACED")
    assert await world.balance(1) == (D(6_382), D(3_618))
    await world.cancel(order)
    await world.settle()
    assert await world.balance(1) == (D(10_000), D(0))
    await assert_audit_is_clean(world)


async def test_a_smaller_order_gives_back_what_it_no_longer_needs_once_the_engine_agreed(world: World) -> None:
    await world.deposit(6_030, 1)
    (order,) = await world.place(limit(1, "BUY", "1", 60_000))
    await world.settle()
    assert await world.balance(1) == (D(0), D(6_030))
    amendment = await world.amend(1, order, 50_000, "0.4")
    assert await world.balance(1) == (D(0), D(6_030))
    await world.settle()
    assert await world.balance(1) == (D(4_020), D(2_010))
    assert await terms(world, order) == (50_000, D("0.4"), 0, "PLACED")
    assert await world.amendment(amendment) == ("AMENDED", None)
    freed = (await outbox_events(world.pool, "FundsUnfrozen"))[-1]
    assert (freed["orderId"], freed["amount"]) == (amendment, "4020")
    await assert_audit_is_clean(world)


async def test_an_amendment_without_the_money_for_it_fails_and_the_order_stays(world: World, pool: Pool) -> None:
    await world.deposit(6_030, 1)
    (order,) = await world.place(limit(1, "BUY", "1", 60_000))
    await world.settle()
    amendment = await world.amend(1, order, quantity="1.001")
    assert await world.amendment(amendment) == ("FAILED", "INSUFFICIENT_MARGIN")
    await world.settle()
    assert await terms(world, order) == (60_000, 1, 0, "PLACED")
    assert await world.balance(1) == (D(0), D(6_030))
    kinds = await pool.fetchval("SELECT array_agg(payload ->> 'kind' ORDER BY seq) FROM matching.commands")
    assert "AMEND" not in kinds
    await assert_audit_is_clean(world)


async def test_an_amendment_that_would_lose_at_once_needs_money_for_that_too(world: World) -> None:
    await world.deposit(6_100, 1)
    (order,) = await world.place(limit(1, "BUY", "0.1", 60_000))
    await world.settle()
    batch = await world.take_in_amendment(1, order, quantity="0.2")
    await world.pool.execute("UPDATE orders.amendments SET claimed_loss = 6000")
    await finish(world.placement(batch))
    assert await world.amendment(batch.order_ids[0]) == ("FAILED", "OPEN_LOSS_NOT_COVERED")


async def test_a_rejected_amendment_gives_its_reservation_back(world: World) -> None:
    await world.deposit(20_000, 1, 2)
    (order,) = await world.place(limit(1, "BUY", "0.1", 59_000, post_only=True))
    await world.place(limit(2, "SELL", "0.1", 60_000))
    await world.settle()
    before = await world.balance(1)
    amendment = await world.amend(1, order, 60_000, "0.2")
    assert await world.balance(1) != before
    await world.settle()
    assert await world.amendment(amendment) == ("REJECTED", "POST_ONLY_WOULD_CROSS")
    assert await world.balance(1) == before
    assert await terms(world, order) == (59_000, D("0.1"), 0, "PLACED")
    event = (await outbox_events(world.pool, "OrderAmendRejected"))[0]
    assert (event["amendmentId"], event["reason"]) == (amendment, "POST_ONLY_WOULD_CROSS")
    await assert_audit_is_clean(world)


async def test_the_user_is_told_how_every_amendment_ended(world: World) -> None:
    await world.deposit(1_000, 1)
    (order,) = await world.place(limit(1, "BUY", "0.1", 60_000))
    await world.settle()
    await world.amend(1, order, quantity="0.2")
    await world.amend(1, order, quantity="0.05")
    await world.settle()
    late = await world.take_in_amendment(1, order, quantity="0.06")
    await world.cancel(order)
    await finish(world.placement(late))
    await world.settle()
    told: Any = await outbox_events(world.pool, "UserPush")
    ends = [push["data"] for pushes in told for push in pushes if push["channel"] == "amendment"]
    assert [(end["orderId"], end["quantity"], end["status"], end["failureReason"]) for end in ends] == [
        (order, "0.2", "FAILED", "INSUFFICIENT_MARGIN"),
        (order, "0.05", "AMENDED", None),
        (order, "0.06", "REJECTED", "ORDER_NOT_FOUND"),
    ]
    requested = await outbox_events(world.pool, "OrderAmendRequested")
    assert [(event["orderId"], event["price"], event["quantity"]) for event in requested] == [
        (order, None, "0.05"),
        (order, None, "0.06"),
    ]


@pytest.mark.parametrize("filled", ["0.3", "1"])
async def test_a_fill_on_the_way_never_makes_the_order_larger_than_asked(world: World, filled: str) -> None:
    await world.deposit(100_000, 1, 2)
    (order,) = await world.place(limit(1, "SELL", "1", 60_000))
    await world.settle()
    batch = await world.take_in_amendment(1, order, quantity="1.2")
    amending = world.placement(batch)
    await advance(amending, "frozen")
    await world.place(limit(2, "BUY", filled, 60_000))
    await finish(amending)
    await world.settle()
    if filled == "1":
        assert await world.amendment(batch.order_ids[0]) == ("REJECTED", "ORDER_NOT_FOUND")
        assert await terms(world, order) == (60_000, 1, 1, "FILLED")
    else:
        assert await world.amendment(batch.order_ids[0]) == ("AMENDED", None)
        assert await terms(world, order) == (60_000, D("1.2"), D("0.3"), "PARTIALLY_FILLED")
    await assert_audit_is_clean(world)
    await world.place(limit(2, "BUY", "5", 60_000))
    await world.settle()
    assert (await terms(world, order))[2] == (D("1.2") if filled != "1" else 1)
    await assert_audit_is_clean(world)


async def test_an_amended_order_that_crosses_is_filled(world: World) -> None:
    await world.deposit(20_000, 1, 2)
    (order,) = await world.place(limit(1, "BUY", "0.1", 59_000))
    await world.place(limit(2, "SELL", "0.2", 60_000))
    await world.settle()
    amendment = await world.amend(1, order, 60_000, "0.2")
    await world.settle()
    assert await world.amendment(amendment) == ("AMENDED", None)
    assert await terms(world, order) == (60_000, D("0.2"), D("0.2"), "FILLED")
    # 12000 / 10 in margin; fee 12000 * 0.0005.
    assert await world.balance(1) == (D(18_794), D(1_200))
    await assert_audit_is_clean(world)


@pytest.mark.parametrize("cancelled_first", [True, False])
async def test_amendment_and_cancellation_at_once_leave_nothing_behind(world: World, *, cancelled_first: bool) -> None:
    await world.deposit(10_000, 1)
    (order,) = await world.place(limit(1, "BUY", "0.1", 60_000))
    await world.settle()
    batch = await world.take_in_amendment(1, order, quantity="0.5")
    if cancelled_first:
        await world.cancel(order)
    await finish(world.placement(batch))
    if not cancelled_first:
        await world.cancel(order)
    await world.settle()
    end = ("REJECTED", "ORDER_NOT_FOUND") if cancelled_first else ("AMENDED", None)
    assert await world.amendment(batch.order_ids[0]) == end
    assert await world.status(order) == ("CANCELLED", "USER_REQUEST")
    assert await world.balance(1) == (D(10_000), D(0))
    await assert_audit_is_clean(world)


async def test_an_amendment_is_no_order_more(world: World, pool: Pool) -> None:
    await pool.execute("UPDATE risk.risk_limits SET max_open_orders = 1")
    await world.deposit(10_000, 1)
    (order,) = await world.place(limit(1, "BUY", "0.1", 60_000))
    await world.settle()
    amendment = await world.amend(1, order, quantity="0.2")
    await world.settle()
    assert await world.amendment(amendment) == ("AMENDED", None)
    assert await pool.fetchval("SELECT open_orders FROM risk.exposures WHERE user_id = 1") == 1
    await assert_audit_is_clean(world)


async def test_an_order_has_one_amendment_at_a_time_and_another_after_it(world: World) -> None:
    await world.deposit(10_000, 1)
    (order,) = await world.place(limit(1, "BUY", "0.1", 60_000))
    await world.settle()
    await world.amend(1, order, quantity="0.2")
    with pytest.raises(Problem, match="ORDER_NOT_AMENDABLE"):
        await world.take_in_amendment(1, order, quantity="0.3")
    await world.settle()
    await world.amend(1, order, quantity="0.3")
    await world.settle()
    assert (await terms(world, order))[1] == D("0.3")
    await assert_audit_is_clean(world)


async def test_a_closing_order_can_be_amended_without_any_money(world: World) -> None:
    await world.deposit(10_000, 1)
    await world.deposit(6_030, 2)
    await world.trade(2, 1, "1", 60_000)
    assert await world.balance(2) == (D(0), D(6_000))
    (order,) = await world.place(limit(2, "SELL", "0.5", 61_000))
    await world.settle()
    amendment = await world.amend(2, order, 70_000, "1")
    await world.settle()
    assert await world.amendment(amendment) == ("AMENDED", None)
    assert await terms(world, order) == (70_000, 1, 0, "PLACED")
    await assert_audit_is_clean(world)


async def test_a_reduce_only_order_reserves_nothing_when_it_is_amended(world: World) -> None:
    await world.deposit(100_000, 1, 2)
    await world.trade(2, 1, "1", 60_000)
    before = await world.balance(2)
    (order,) = await world.place(limit(2, "SELL", "0.5", 61_000, reduce_only=True))
    await world.settle()
    amendment = await world.amend(2, order, 62_000, "3")
    await world.settle()
    # The position is 1: the engine amends to no more.
    assert await world.amendment(amendment) == ("AMENDED", None)
    assert await terms(world, order) == (62_000, 1, 0, "PLACED")
    assert await world.balance(2) == before
    await assert_audit_is_clean(world)


async def test_an_amendment_waits_for_another_saga_of_its_user(world: World) -> None:
    await world.deposit(10_000, 1)
    (order,) = await world.place(limit(1, "BUY", "0.1", 60_000))
    await world.settle()
    placing = world.placement(await world.take_in(limit(1, "BUY", "0.1", 50_000)))
    await advance(placing, "checked")
    batch = await world.take_in_amendment(1, order, quantity="0.2")
    outcome = await world.risk.check_orders(StepRequest(batch.saga_id, 1, batch.order_ids))
    assert outcome.busy == batch.order_ids
    await finish(placing)
    outcome = await world.risk.check_orders(StepRequest(batch.saga_id, 2, batch.order_ids))
    assert outcome.passed == batch.order_ids


async def test_an_amendment_that_is_released_leaves_its_order_as_it_was(world: World) -> None:
    await world.deposit(10_000, 1)
    (order,) = await world.place(limit(1, "BUY", "0.1", 60_000))
    await world.settle()
    before = await world.balance(1)
    batch = await world.take_in_amendment(1, order, 61_000, "0.5")
    step = StepRequest(batch.saga_id, 1, batch.order_ids)
    await world.risk.check_orders(step)
    await world.ledger.freeze_funds(step)
    assert await world.balance(1) != before
    await world.risk.release_orders(step)
    await world.ledger.unfreeze_funds(step)
    refusals = [Refusal(batch.order_ids[0], "CANCELLED_BY_OPERATOR")]
    await world.orders.accept(Acceptance(batch.saga_id, [], refusals))
    assert await world.amendment(batch.order_ids[0]) == ("FAILED", "CANCELLED_BY_OPERATOR")
    assert await world.balance(1) == before
    await assert_audit_is_clean(world)


async def test_the_margin_mode_stays_while_an_amendment_of_a_filled_order_holds_money(world: World, pool: Pool) -> None:
    await world.deposit(100_000, 1, 2)
    (order,) = await world.place(limit(1, "SELL", "1", 60_000))
    await world.settle()
    amending = world.placement(await world.take_in_amendment(1, order, quantity="2"))
    await advance(amending, "frozen")
    # Filled, and the position closed again by somebody who trades against it.
    await world.place(limit(2, "BUY", "1", 60_000))
    await world.settle()
    await world.place(limit(2, "SELL", "1", 60_000))
    await world.place(limit(1, "BUY", "1", 60_000))
    await world.settle()
    async with pool.acquire() as conn, conn.transaction():
        with pytest.raises(Problem, match="MARGIN_MODE_NOT_CHANGEABLE"):
            await set_margin_mode(conn, 1, BTC, "CROSS")
    await finish(amending)
    await world.settle()
    async with pool.acquire() as conn, conn.transaction():
        await set_margin_mode(conn, 1, BTC, "CROSS")
    await assert_audit_is_clean(world)

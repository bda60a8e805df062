"""check -> freeze -> accept, and what is given back when it does not go on."""

import asyncio
import re
import time
from dataclasses import replace
from decimal import Decimal

import pytest
from redis.asyncio import Redis

from activities.matching.instruments import read_instruments
from activities.risk.check import pre_check
from domain.sagas import Acceptance, StepRequest
from storage.db import Pool
from tests.integration.ledger_world import (
    BTC,
    ETH,
    SOL,
    World,
    advance,
    assert_audit_is_clean,
    assert_conserved,
    dump,
    finish,
    limit,
    market,
    outbox_events,
)

# Results of steps, events and journals tell the story; all else must look as if it had never happened.
STORY = ("risk.steps", "ledger.steps", "ledger.journals", "ledger.ledger_entries", "outbox.messages")


@pytest.fixture
def world(pool: Pool, redis: Redis) -> World:
    return World(pool, redis)


async def test_an_order_holds_its_margin_and_fee_until_it_ends(world: World) -> None:
    await world.deposit(10_000, 1)
    (order,) = await world.place(limit(1, "BUY", "1", 60_000))
    assert await world.balance(1) == (Decimal(3_970), Decimal(6_030))
    assert await world.status(order) == ("ACCEPTED", None)
    await world.settle()
    assert await world.status(order) == ("PLACED", None)
    await world.cancel(order)
    assert await world.status(order) == ("CANCEL_REQUESTED", None)
    await world.settle()
    assert await world.status(order) == ("CANCELLED", "USER_REQUEST")
    assert await world.balance(1) == (Decimal(10_000), Decimal(0))
    await assert_audit_is_clean(world)


async def test_only_the_orders_that_money_and_limits_allow_pass(world: World) -> None:
    await world.deposit(7_000, 1)
    orders = await world.place(
        limit(1, "BUY", "1", 60_000),
        limit(1, "BUY", "1", 60_000),
        limit(1, "BUY", "0.1", 60_000),
        limit(1, "BUY", "1001", 10),
        limit(2, "BUY", "0.001", 60_000),
    )
    assert [await world.status(order) for order in orders] == [
        ("ACCEPTED", None),
        ("FAILED", "INSUFFICIENT_MARGIN"),
        ("ACCEPTED", None),
        ("FAILED", "RISK_LIMIT_EXCEEDED"),
        ("FAILED", "INSUFFICIENT_MARGIN"),
    ]
    assert await world.balance(1) == (Decimal(367), Decimal(6_633))
    await assert_audit_is_clean(world)


async def test_an_order_that_would_lose_at_once_needs_money_for_that_too(world: World) -> None:
    await world.deposit(10_000, 1, 2)
    dear = replace(limit(1, "BUY", "0.5", 80_000), open_loss=Decimal(20_000))
    fair = limit(2, "BUY", "0.5", 80_000)
    orders = await world.place(dear, fair)
    assert [await world.status(order) for order in orders] == [
        ("FAILED", "OPEN_LOSS_NOT_COVERED"),
        ("ACCEPTED", None),
    ]


async def test_leverage_above_that_of_the_tier_is_refused(world: World) -> None:
    await world.deposit(1_000_000, 1)
    assert await world.lever(1, 100) is None
    orders = await world.place(limit(1, "BUY", "4", 60_000), limit(1, "BUY", "1", 60_000))
    assert [await world.status(order) for order in orders] == [("ACCEPTED", None), ("FAILED", "RISK_LIMIT_EXCEEDED")]


async def test_no_more_orders_than_allowed_are_open_at_once(world: World, pool: Pool) -> None:
    await pool.execute("UPDATE risk.risk_limits SET max_open_orders = 2")
    await world.deposit(1_000_000, 1)
    orders = await world.place(*(limit(1, "BUY", "0.1", 60_000) for _ in range(3)))
    assert [await world.status(order) for order in orders][2] == ("FAILED", "RISK_LIMIT_EXCEEDED")


async def test_a_limit_of_the_user_goes_before_that_of_all(world: World, pool: Pool) -> None:
    await pool.execute(
        "INSERT INTO risk.risk_limits (user_id, instrument_id, max_order_quantity, max_position_notional, max_leverage,"
        " max_open_orders, price_band) VALUES (1, $1, 1, 1000000, 10, 10, 0.5)",
        BTC.instrument_id,
    )
    await world.deposit(1_000_000, 1, 2)
    orders = await world.place(limit(1, "BUY", "2", 60_000), limit(2, "BUY", "2", 60_000))
    assert [await world.status(order) for order in orders] == [("FAILED", "RISK_LIMIT_EXCEEDED"), ("ACCEPTED", None)]
    assert await world.lever(1, 11) == "RISK_LIMIT_EXCEEDED"


async def test_the_pre_check_says_what_placement_does(world: World, pool: Pool) -> None:
    await world.deposit(6_100, 1)
    await world.place(limit(1, "SELL", "0.5", 60_000))
    for order in (limit(1, "BUY", "1", 60_000), limit(1, "BUY", "1.1", 60_000), limit(3, "BUY", "1", 60_000)):
        async with pool.acquire() as conn:
            margin, reason = await pre_check(conn, order)
        _, held = await world.balance(order.user_id)
        (order_id,) = await world.place(order)
        status, failure = await world.status(order_id)
        assert failure == reason
        if status == "ACCEPTED":
            assert (await world.balance(order.user_id))[1] - held == margin


async def test_a_user_without_money_can_close_a_position_that_has_tripled(world: World) -> None:
    await world.deposit(6_030, 1)
    await world.deposit(100_000, 2, 3)
    await world.trade(1, 2, "1", 60_000)
    assert (await world.balance(1))[0] == 0
    await world.place(limit(3, "BUY", "1", 180_000))
    orders = await world.place(limit(1, "SELL", "0.5", 180_000), market(1, "SELL", "0.5", 170_000))
    await world.settle()
    assert [await world.status(order) for order in orders] == [("FILLED", None), ("FILLED", None)]
    assert await world.balance(1) == (Decimal(6_030 - 30 + 120_000 - 90), Decimal(0))
    await assert_audit_is_clean(world)


async def test_what_the_ledger_refuses_is_given_back_exactly(world: World, pool: Pool) -> None:
    await world.deposit(10_000, 1, 2)
    first = await world.take_in(limit(1, "BUY", "1", 60_000))
    second = await world.take_in(limit(1, "BUY", "20", 3_000, ETH), limit(2, "BUY", "20", 3_000, ETH))
    placing = world.placement(first)
    await advance(placing, "checked")
    step = StepRequest(second.saga_id, 1, second.order_ids)
    assert (await world.risk.check_orders(step)).passed == second.order_ids
    await finish(placing)
    frozen = await world.ledger.freeze_funds(step)
    assert [(refusal.order_id, refusal.reason) for refusal in frozen.refused] == [
        (second.order_ids[0], "INSUFFICIENT_FUNDS")
    ]
    assert frozen.passed == second.order_ids[1:]
    assert await world.balance(1) == (Decimal(3_970), Decimal(6_030))
    assert await world.balance(2) == (Decimal(3_970), Decimal(6_030))

    undo = StepRequest(second.saga_id, 1, second.order_ids[:1])
    await world.risk.release_orders(undo)
    await world.ledger.unfreeze_funds(undo)
    await world.orders.accept(Acceptance(second.saga_id, frozen.passed, frozen.refused))
    assert await world.balance(1) == (Decimal(3_970), Decimal(6_030))
    assert await world.status(second.order_ids[0]) == ("FAILED", "INSUFFICIENT_FUNDS")
    assert await world.status(second.order_ids[1]) == ("ACCEPTED", None)
    failed = await outbox_events(pool, "FundsFrozenFailed")
    assert [event["orderId"] for event in failed] == second.order_ids[:1]
    await assert_audit_is_clean(world)


async def test_a_placement_undone_leaves_everything_as_it_was(world: World, pool: Pool) -> None:
    await world.deposit(50_000, 1, 2)
    await world.trade(1, 2, "0.1", 60_000)
    await world.place(limit(1, "SELL", "0.3", 60_500), limit(2, "BUY", "0.2", 59_000))
    await world.settle()
    batch = await world.take_in(
        limit(1, "BUY", "0.4", 59_900), limit(1, "SELL", "0.05", 61_000), limit(2, "BUY", "0.1", 58_000)
    )
    before = await dump(pool, without=STORY)
    step = StepRequest(batch.saga_id, 1, batch.order_ids)
    assert (await world.risk.check_orders(step)).passed == batch.order_ids
    assert (await world.ledger.freeze_funds(step)).passed == batch.order_ids
    # In two parts, as when some were refused and the rest is given back later.
    for part in (batch.order_ids[:1], batch.order_ids[1:]):
        undo = StepRequest(batch.saga_id, 1, part)
        await world.risk.release_orders(undo)
        await world.ledger.unfreeze_funds(undo)
    after = await dump(pool, without=STORY)
    assert _without_pending(after) == _without_pending(before)
    await assert_conserved(world)


def _without_pending(tables: dict[str, list[str]]) -> dict[str, list[str]]:
    """Which check was the last one is bookkeeping of its own."""
    rows = [re.sub(r'"pending_step": ("[^"]*"|null)', "", row) for row in tables["risk.exposures"]]
    return {**tables, "risk.exposures": rows}


async def test_freezing_is_all_or_nothing_per_user_and_instrument(world: World, pool: Pool) -> None:
    await world.deposit(10_000, 1)
    batch = await world.take_in(
        limit(1, "BUY", "0.5", 60_000), limit(1, "BUY", "0.5", 60_000), limit(1, "BUY", "5", 3_000, ETH)
    )
    step = StepRequest(batch.saga_id, 1, batch.order_ids)
    assert (await world.risk.check_orders(step)).passed == batch.order_ids
    async with pool.acquire() as conn:
        await conn.execute("UPDATE ledger.ledger_balances SET available = 5000")
    frozen = await world.ledger.freeze_funds(step)
    assert frozen.passed == batch.order_ids[2:]
    assert await world.balance(1) == (Decimal("3492.5"), Decimal("1507.5"))


async def test_an_order_waits_while_another_of_its_user_is_between_check_and_freeze(world: World) -> None:
    await world.deposit(100_000, 1, 2)
    first = await world.take_in(limit(1, "BUY", "1", 60_000))
    second = await world.take_in(limit(1, "SELL", "1", 61_000), limit(2, "SELL", "1", 61_000))
    placing = world.placement(first)
    await advance(placing, "checked")
    checked = await world.risk.check_orders(StepRequest(second.saga_id, 1, second.order_ids))
    assert (checked.busy, checked.passed) == (second.order_ids[:1], second.order_ids[1:])
    await advance(placing, "frozen")
    checked = await world.risk.check_orders(StepRequest(second.saga_id, 2, checked.busy))
    assert (checked.busy, checked.passed) == ([], second.order_ids[:1])


async def test_a_neighbour_in_the_batch_is_free_again_once_the_refusal_is_released(world: World) -> None:
    await world.deposit(10_000, 1, 2)
    first = await world.take_in(limit(1, "BUY", "20", 3_000, ETH))
    second = await world.take_in(limit(1, "BUY", "1", 60_000), limit(2, "BUY", "0.1", 60_000))
    third = await world.take_in(limit(2, "BUY", "0.1", 60_000))
    step = StepRequest(second.saga_id, 1, second.order_ids)
    await world.risk.check_orders(step)
    await finish(world.placement(first))
    refused = [refusal.order_id for refusal in (await world.ledger.freeze_funds(step)).refused]
    assert refused == second.order_ids[:1]
    waiting = await world.risk.check_orders(StepRequest(third.saga_id, 1, third.order_ids))
    assert waiting.busy == third.order_ids
    undo = StepRequest(second.saga_id, 1, refused)
    await world.risk.release_orders(undo)
    await world.ledger.unfreeze_funds(undo)
    checked = await world.risk.check_orders(StepRequest(third.saga_id, 2, third.order_ids))
    assert checked.passed == third.order_ids


async def test_two_batches_of_one_user_never_hold_more_than_there_is(world: World) -> None:
    await world.deposit(10_000, 1)
    batches = [await world.take_in(limit(1, "BUY", "1", 60_000)) for _ in range(3)]
    await asyncio.gather(*(finish(world.placement(batch)) for batch in batches))
    statuses = sorted([await world.status(batch.order_ids[0]) for batch in batches], key=str)
    assert statuses == [
        ("ACCEPTED", None),
        ("FAILED", "INSUFFICIENT_MARGIN"),
        ("FAILED", "INSUFFICIENT_MARGIN"),
    ]
    await assert_audit_is_clean(world)


async def test_batches_over_many_users_in_any_order_do_not_block_each_other(world: World) -> None:
    users = range(1, 9)
    await world.deposit(1_000_000, *users)
    batches = [
        await world.take_in(
            *(
                limit(user, "BUY", "0.1", 100 if n % 2 else 99, (BTC, ETH, SOL)[user % 3] if n < 4 else BTC)
                for user in (users if n % 2 else reversed(users))
            )
        )
        for n in range(6)
    ]
    await asyncio.wait_for(asyncio.gather(*(finish(world.placement(batch)) for batch in batches)), 20)
    await assert_audit_is_clean(world)


async def test_a_release_takes_locks_in_the_order_everybody_does(world: World, pool: Pool) -> None:
    """Else it and a check could wait for each other."""
    await world.deposit(10_000, 1, 2)
    batch = await world.take_in(limit(1, "BUY", "0.1", 60_000), limit(2, "BUY", "0.1", 60_000))
    step = StepRequest(batch.saga_id, 1, batch.order_ids)
    await world.risk.check_orders(step)
    await world.ledger.freeze_funds(step)
    async with pool.acquire() as conn, conn.transaction():
        await conn.execute("SELECT 1 FROM risk.exposures WHERE user_id = 1 FOR UPDATE")
        release = asyncio.create_task(world.risk.release_orders(StepRequest(batch.saga_id, 1, batch.order_ids[1:])))
        await until_somebody_waits(pool)
        await conn.execute("SELECT 1 FROM risk.exposures WHERE user_id = 2 FOR UPDATE NOWAIT")
    await asyncio.wait_for(release, 10)


async def until_somebody_waits(pool: Pool) -> None:
    deadline = time.monotonic() + 10
    while not await pool.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"):
        assert time.monotonic() < deadline, "Expected somebody to wait for a lock"
        await asyncio.sleep(0.02)


async def test_margin_freed_before_it_was_frozen_does_not_stop_settlement(world: World) -> None:
    """Bids and asks share margin: a fill may need less than the ledger holds while a hold is still on its way."""
    await world.deposit(100_000, 1, 2)
    await world.place(limit(1, "BUY", "1", 59_000), limit(1, "SELL", "1", 60_000))
    await world.settle()
    late = await world.take_in(limit(1, "BUY", "1", 59_000))
    placing = world.placement(late)
    await advance(placing, "checked")
    await world.place(limit(2, "BUY", "1", 60_000))
    await world.settle()
    await finish(placing)
    await world.settle()
    assert await world.status(late.order_ids[0]) == ("PLACED", None)
    await assert_audit_is_clean(world)
    await world.cancel(late.order_ids[0])
    await world.settle()
    await assert_audit_is_clean(world)


async def test_a_cancellation_waits_for_an_order_on_its_way_to_the_engine(world: World) -> None:
    await world.deposit(10_000, 1)
    batch = await world.take_in(limit(1, "BUY", "0.1", 60_000))
    cancels = await world.take_in_cancels(*batch.order_ids)
    outcome = await world.orders.request_cancels(cancels)
    assert (outcome.passed, outcome.busy) == ([], batch.order_ids)
    await finish(world.placement(batch))
    outcome = await world.orders.request_cancels(cancels)
    assert (outcome.passed, outcome.busy) == (batch.order_ids, [])
    await world.settle()
    assert await world.status(batch.order_ids[0]) == ("CANCELLED", "USER_REQUEST")


async def test_a_cancellation_does_not_wait_for_the_transaction_that_ends_a_check(world: World, pool: Pool) -> None:
    # That one locks what it accepts and then what it refuses: a lower id after a higher one.
    await world.deposit(10_000, 1)
    (placed,) = await world.place(limit(1, "BUY", "0.1", 60_000))
    batch = await world.take_in(limit(1, "BUY", "0.1", 60_000), limit(1, "BUY", "0.1", 60_000))
    refused, accepted = batch.order_ids
    cancels = await world.take_in_cancels(placed, refused, accepted)
    status = "UPDATE orders.orders SET status = $2 WHERE order_id = $1"
    async with pool.acquire() as conn, conn.transaction():
        await conn.execute(status, accepted, "ACCEPTED")
        outcome = await asyncio.wait_for(world.orders.request_cancels(cancels), 10)
        assert (outcome.passed, sorted(outcome.busy)) == ([placed], [refused, accepted])
        await conn.execute(status, refused, "FAILED")
    outcome = await world.orders.request_cancels(cancels)
    assert (outcome.passed, outcome.busy) == ([accepted], [])


async def test_a_client_order_id_is_taken_in_once_also_within_a_batch(world: World, pool: Pool) -> None:
    await world.deposit(10_000, 1, 2)
    mine = limit(1, "BUY", "0.1", 60_000, client_order_id="a")
    batch = await world.take_in(mine, mine, limit(2, "BUY", "0.1", 60_000, client_order_id="a"))
    assert len(batch.order_ids) == 2
    assert await pool.fetchval("SELECT count(*) FROM orders.orders") == 2


async def test_steps_over_orders_that_do_not_exist_do_nothing(world: World, pool: Pool) -> None:
    step = StepRequest("orders-404-1", 1, [404])
    assert await world.risk.check_orders(step) == await world.ledger.freeze_funds(step)
    verdict = await world.orders.accept(Acceptance("orders-404-1", [404], []))
    assert verdict.refused == []
    assert await pool.fetchval("SELECT count(*) FROM matching.commands") == 0
    assert (await world.orders.request_cancels(await world.take_in_cancels(404))).passed == []


async def test_steps_out_of_order_are_refused_and_leave_no_trace(world: World, pool: Pool) -> None:
    await world.deposit(10_000, 1)
    batch = await world.take_in(limit(1, "BUY", "0.1", 60_000))
    step = StepRequest(batch.saga_id, 1, batch.order_ids)
    before = await dump(pool)
    for too_early in (world.ledger.freeze_funds, world.risk.release_orders):
        with pytest.raises(AssertionError, match="Expected the check"):
            await too_early(step)
    assert await dump(pool) == before
    await world.risk.check_orders(step)
    await world.ledger.freeze_funds(step)
    before = await dump(pool)
    with pytest.raises(AssertionError):
        await world.ledger.unfreeze_funds(step)
    assert await dump(pool) == before
    await finish(world.placement(batch))
    assert await world.status(batch.order_ids[0]) == ("ACCEPTED", None)


async def test_the_price_band_is_that_of_the_limits_of_the_instrument(world: World, pool: Pool) -> None:
    await pool.execute("UPDATE risk.risk_limits SET price_band = 0.1 WHERE instrument_id = $1", BTC.instrument_id)
    instruments = await read_instruments(pool)
    assert {name: instrument.price_band for name, instrument in instruments.items()} == {
        BTC.instrument_id: Decimal("0.1"),
        ETH.instrument_id: Decimal("0.075"),
        SOL.instrument_id: Decimal("0.1"),
    }

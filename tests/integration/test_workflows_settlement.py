"""The settlement and audit workflows: signals in any order, interruptions anywhere, what they leave in the tables."""

import asyncio
import logging
from decimal import Decimal

import pytest
from redis.asyncio import Redis
from temporalio.api.common.v1 import WorkflowExecution
from temporalio.api.workflowservice.v1 import ResetWorkflowExecutionRequest
from temporalio.client import Client, WorkflowExecutionStatus, WorkflowHandle

from activities.ledger.audit import SETTLED_CHECKS, STRICT_CHECKS
from clients import OPERATIONS_QUEUE
from domain.sagas import (
    ACKNOWLEDGE,
    APPLY_ORDER_EVENTS,
    APPLY_RISK_EVENTS,
    APPLY_TRADES,
    CONFIRM_POSITIONS,
    LEDGER_AUDIT,
    SETTLE,
    AuditReport,
    EventRange,
    Progress,
)
from storage.db import Pool
from tests.replay import save_history
from tests.sagas import (
    BTC,
    Desk,
    Gate,
    StepwiseEngine,
    fails,
    order,
    regular_attempts,
    settlement_steps,
    start_settlement,
    until_said,
    until_settled,
    workers,
)

D = Decimal
ALICE, BOB = 1, 2
STEPS = [APPLY_TRADES, APPLY_RISK_EVENTS, SETTLE, CONFIRM_POSITIONS, APPLY_ORDER_EVENTS, ACKNOWLEDGE]


@pytest.fixture
async def desk(pool: Pool, temporal: Client) -> Desk:
    desk = Desk(pool, temporal)
    for user_id in (ALICE, BOB):
        await desk.deposit(user_id, "1000")
    return desk


@pytest.fixture
def engine(pool: Pool) -> StepwiseEngine:
    return StepwiseEngine(pool)


async def trade(desk: Desk, engine: StepwiseEngine, count: int = 1) -> int:
    """Alice sells to Bob 0.001 at 60000 `count` times, four events each time; the seq of the last."""
    for _ in range(count):
        await desk.place(order(ALICE, "SELL", "0.001", "60000"))
        await desk.place(order(BOB, "BUY", "0.001", "60000"))
    return await engine.match()


async def assert_traded(desk: Desk, count: int) -> None:
    """The trades are booked once: margin 6 each, maker fee 0.012 and taker fee 0.03 each."""
    for user_id, fee in ((ALICE, D("0.012")), (BOB, D("0.03"))):
        assert await desk.balance(user_id) == (1000 - count * (6 + fee), D(count * 6))
    statuses = await desk.pool.fetch("SELECT status, count(*) FROM orders.orders GROUP BY status")
    assert [tuple(row) for row in statuses] == [("FILLED", 2 * count)]
    await desk.assert_clean()


async def test_signals_in_any_order_and_number_settle_every_event_once(
    desk: Desk, engine: StepwiseEngine, pool: Pool, redis: Redis
) -> None:
    async with workers(desk.temporal, pool, redis):
        last = await trade(desk, engine, 2)
        handle = await start_settlement(desk.temporal)
        for seq in (3, 1, 3, last, 2, last):
            await handle.signal("advance", seq)
        await until_settled(handle, last)
        last = await trade(desk, engine)
        await handle.signal("advance", last)
        await handle.signal("advance", last)
        await until_settled(handle, last)
        assert await handle.query("progress", result_type=Progress) == Progress(last, last, last)
    await assert_traded(desk, 3)
    await save_history(handle, "settlement")


async def test_a_lost_signal_is_healed_by_the_next_one(
    desk: Desk, engine: StepwiseEngine, pool: Pool, redis: Redis
) -> None:
    async with workers(desk.temporal, pool, redis):
        handle = await start_settlement(desk.temporal)
        await until_settled(handle, 0)
        await trade(desk, engine)
        await asyncio.sleep(0.3)
        assert (await handle.query("progress", result_type=Progress)).settled_seq == 0
        last = await trade(desk, engine)
        # Only the first event is announced: settlement sees for itself that there are more.
        await handle.signal("advance", 1)
        await until_settled(handle, last)
    await assert_traded(desk, 2)


@pytest.mark.parametrize("step", STEPS)
async def test_a_step_that_fails_is_retried_until_it_succeeds(
    desk: Desk, engine: StepwiseEngine, pool: Pool, redis: Redis, step: str
) -> None:
    # The first acknowledgement is the look at where things stand.
    times = 5 if step == SETTLE else 2
    async with workers(desk.temporal, pool, redis, {step: fails(times)}):
        last = await trade(desk, engine)
        handle = await start_settlement(desk.temporal)
        if step == SETTLE:
            await until_said(handle, f"^Settled up to event 0 of [0-9]+: {SETTLE} is tried again after ")
        await until_settled(handle, last)
        await until_said(handle, f"^Settled up to event {last} of {last}$")
    history = await handle.fetch_history()
    assert regular_attempts(history) == ([(SETTLE, 2)] if step == SETTLE else [])
    await assert_traded(desk, 1)
    if step == SETTLE:
        await save_history(handle, "settlement_retried")


@pytest.mark.parametrize("step", STEPS)
async def test_a_settlement_terminated_in_mid_range_is_finished_by_the_next(
    desk: Desk, engine: StepwiseEngine, pool: Pool, redis: Redis, step: str
) -> None:
    gate = Gate(open_for=lambda events: events.to_seq == 0)
    async with workers(desk.temporal, pool, redis, {step: gate}):
        await trade(desk, engine)
        handle = await start_settlement(desk.temporal)
        await gate.knocked.wait()
        await handle.terminate("by an operator")
        # The engine has gone on: the range that was begun has to be finished as it was.
        last = await trade(desk, engine)
        gate.is_open = True
        again = await start_settlement(desk.temporal)
        await until_settled(again, last)
    await assert_traded(desk, 2)
    if step == SETTLE:
        await save_history(again, "settlement_resumed")


async def test_a_settlement_reset_to_an_earlier_point_books_nothing_twice(
    desk: Desk, engine: StepwiseEngine, pool: Pool, redis: Redis
) -> None:
    async with workers(desk.temporal, pool, redis):
        handle = await start_settlement(desk.temporal)
        for _ in range(3):
            last = await trade(desk, engine)
            await handle.signal("advance", last)
            await until_settled(handle, last)
        points = [
            event.event_id
            for event in (await handle.fetch_history()).events
            if event.HasField("workflow_task_completed_event_attributes")
        ]
        first_run = (await handle.describe()).run_id
        for number, point in enumerate(points[:3]):
            await desk.temporal.workflow_service.reset_workflow_execution(
                ResetWorkflowExecutionRequest(
                    namespace=desk.temporal.namespace,
                    workflow_execution=WorkflowExecution(workflow_id=handle.id, run_id=first_run),
                    reason="an operator's wish",
                    workflow_task_finish_event_id=point,
                    request_id=f"reset-{number}",
                )
            )
            handle = desk.temporal.get_workflow_handle(handle.id)
            await until_settled(handle, last)
        await assert_traded(desk, 3)
        last = await trade(desk, engine)
        await handle.signal("advance", last)
        await until_settled(handle, last)
    await assert_traded(desk, 4)


async def test_a_settlement_overtaken_by_another_looks_up_where_things_stand(
    desk: Desk, engine: StepwiseEngine, pool: Pool, redis: Redis
) -> None:
    async with workers(desk.temporal, pool, redis):
        handle = await start_settlement(desk.temporal)
        settled = await trade(desk, engine)
        await handle.signal("advance", settled)
        await until_settled(handle, settled)
        # Somebody else settles the next range, as two executions would after a split of the cluster.
        overtaken = await trade(desk, engine)
        await settlement_steps(pool, redis, EventRange(BTC, settled, overtaken))
        last = await trade(desk, engine)
        await handle.signal("advance", last)
        await until_settled(handle, last)
        assert (await handle.describe()).status == WorkflowExecutionStatus.RUNNING
    await assert_traded(desk, 3)
    await save_history(handle, "settlement_overtaken")


async def test_orders_that_a_loss_left_without_money_are_cancelled(
    desk: Desk, engine: StepwiseEngine, pool: Pool, redis: Redis
) -> None:
    await desk.deposit(BOB, "-900")
    async with workers(desk.temporal, pool, redis):
        handle = await start_settlement(desk.temporal)

        async def settle() -> None:
            last = await engine.match()
            await handle.signal("advance", last)
            await until_settled(handle, last)

        await desk.cross(BOB)
        await desk.place(order(ALICE, "SELL", "0.01", "60000"))
        await desk.place(order(BOB, "BUY", "0.01", "60000"))
        await settle()
        # Bob has 100 - 0.3, of which 60 back the position, and the rest as well. His bid needs 371 / 10 + 0.1855.
        [bid] = await desk.place(order(BOB, "BUY", "0.007", "53000"), mark="60000")
        await desk.place(order(ALICE, "BUY", "0.01", "53500"))
        assert await desk.balance(BOB) == (D("2.4145"), D("97.2855"))
        # He sells at 53500: -65 and a fee of 0.2675 leave 34.4325, less than his bid needs.
        await desk.place(order(BOB, "SELL", "0.01", "53500"))
        await settle()
        assert await desk.balance(BOB) == (D("0"), D("34.4325"))
        await settle()
    assert await desk.states([bid]) == [("CANCELLED", "INSUFFICIENT_MARGIN")]
    assert await desk.balance(BOB) == (D("34.4325"), D("0"))
    await desk.assert_clean()
    await save_history(handle, "settlement_uncovered")


async def test_a_long_settlement_continues_as_new_without_missing_an_event(
    short_history: Client, pool: Pool, redis: Redis
) -> None:
    desk, engine = Desk(pool, short_history), StepwiseEngine(pool)
    for user_id in (ALICE, BOB):
        await desk.deposit(user_id, "1000")
    async with workers(short_history, pool, redis):
        handle = await start_settlement(short_history)
        runs = set()
        for _ in range(12):
            last = await trade(desk, engine)
            await handle.signal("advance", last)
            await until_settled(handle, last)
            runs.add((await handle.describe()).run_id)
    assert len(runs) >= 2
    await assert_traded(desk, 12)
    await save_history(
        short_history.get_workflow_handle(handle.id, run_id=handle.first_execution_run_id), "settlement_continued"
    )


async def audit(temporal: Client, name: str) -> tuple[AuditReport, WorkflowHandle[object, object]]:
    handle = await temporal.start_workflow(LEDGER_AUDIT, id=name, task_queue=OPERATIONS_QUEUE, result_type=AuditReport)
    return await handle.result(), handle


async def test_the_audit_reports_clean_books_and_alerts_when_they_are_not(
    desk: Desk, engine: StepwiseEngine, pool: Pool, redis: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    async with workers(desk.temporal, pool, redis):
        last = await trade(desk, engine)
        await until_settled(await start_settlement(desk.temporal), last)
        report, handle = await audit(desk.temporal, "clean")
        assert report.ok
        assert all(check.ok for check in report.checks)
        await save_history(handle, "ledger_audit")
        await pool.execute(
            "UPDATE ledger.ledger_balances SET available = available + 0.00000001 WHERE user_id = $1", BOB
        )
        with caplog.at_level(logging.ERROR):
            report, _ = await audit(desk.temporal, "broken")
    assert not report.ok
    assert [check.name for check in report.checks if not check.ok] == ["balances_equal_entries"]
    assert f"ledger audit failed: balances_equal_entries: 1 offenders: user:{BOB} USDT: 0.00000001" in caplog.text


BREAKAGES = {
    "journals_sum_to_zero": "UPDATE ledger.ledger_entries SET delta_available = delta_available + 1 WHERE entry_id = 1",
    "journals_have_two_postings": (
        "DELETE FROM ledger.ledger_entries WHERE account = 'external:deposits' AND entry_id = 2"
    ),
    "entries_belong_to_journals": "DELETE FROM ledger.journals WHERE reference_type = 'TRADE'",
    "balances_equal_entries": "UPDATE ledger.system_balances SET balance = balance + 1 WHERE account = 'exchange:fees'",
    "reserved_equals_margins": "UPDATE ledger.margin_holds SET position_margin = position_margin + 1 WHERE user_id = 1",
    "positions_sum_to_zero": "UPDATE positions.positions SET signed_quantity = 2 WHERE user_id = 2",
    "clearing_plus_unrealized_is_zero": "UPDATE positions.positions SET entry_notional = 61 WHERE user_id = 2",
    "trades_have_two_sides": "DELETE FROM positions.position_events WHERE user_id = 2",
    "trades_are_booked_once": "UPDATE ledger.ledger_entries SET reference_id = '7' WHERE reference_type = 'TRADE'",
    "claims_are_of_open_liquidations": (
        "INSERT INTO ledger.insurance_claims (liquidation_id, round, asset, amount) VALUES (1, 1, 'USDT', 5)"
    ),
    "liquidations_are_between_user_and_fund": (
        "UPDATE ledger.ledger_entries SET entry_type = 'LIQUIDATION_FEE' WHERE account = 'exchange:fees'"
    ),
    "insurance_fund_is_not_negative": (
        "INSERT INTO ledger.system_balances (account, asset, balance) VALUES ('exchange:insurance_fund', 'BTC', -1)"
    ),
    "nothing_is_in_shortfall": (
        "INSERT INTO ledger.system_balances (account, asset, balance) VALUES ('exchange:shortfall', 'USDT', -1)"
    ),
    "draws_are_justified": (
        "INSERT INTO ledger.insurance_draws (reference_type, reference_id, user_id, instrument_id, asset, amount)"
        " VALUES ('SETTLEMENT', 'BTC-USDT-PERP:1', 1, 'BTC-USDT-PERP', 'USDT', 1)"
    ),
    "ledger_holds_what_positions_need": "UPDATE positions.positions SET margin = margin + 1 WHERE user_id = 1",
    "ledger_holds_what_orders_need": "UPDATE risk.exposures SET order_margin = order_margin + 1 WHERE user_id = 1",
    "accepted_orders_are_backed": "UPDATE orders.orders SET status = 'PLACED' WHERE user_id = 1",
    "positions_equal_exposures": "UPDATE risk.exposures SET signed_quantity = 2 WHERE user_id = 1",
}


async def test_every_check_of_the_audit_finds_what_it_is_for(
    desk: Desk, engine: StepwiseEngine, pool: Pool, redis: Redis
) -> None:
    async with workers(desk.temporal, pool, redis):
        last = await trade(desk, engine)
        await until_settled(await start_settlement(desk.temporal), last)
    await desk.assert_clean()
    checks = STRICT_CHECKS | SETTLED_CHECKS
    # Negative balances are refused by the table itself; funding has tests of its own.
    assert checks.keys() == BREAKAGES.keys() | {"nobody_is_negative", "funding_sums_to_zero", "funding_is_confirmed"}
    for name, breakage in BREAKAGES.items():
        async with pool.acquire() as conn:
            transaction = conn.transaction()
            await transaction.start()
            assert await conn.execute(breakage) not in ("UPDATE 0", "DELETE 0"), name
            # The second column says TRUE or a figure for an offender, FALSE for what is in motion.
            found = await conn.fetch(checks[name])
            assert [row for row in found if row[1] is not False], name
            await transaction.rollback()
    await desk.assert_clean()

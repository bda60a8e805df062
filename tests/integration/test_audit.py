"""The audit sees every single corruption, and nothing else."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime

import pytest
from redis.asyncio import Redis

from activities.ledger import audit
from activities.ledger.audit import AuditActivities, run_audit
from domain.funding import FundingRun
from domain.sagas import AuditCheck, StepRequest
from storage.db import Connection, Pool
from tests.integration.ledger_world import BTC, ETH, World, advance, finish, limit

NOON = datetime(2099, 1, 1, 12, tzinfo=UTC)
CHECKS = audit.STRICT_CHECKS.keys() | audit.SETTLED_CHECKS.keys()

DRAW = (
    "INSERT INTO ledger.insurance_draws (user_id, instrument_id, asset, reference_type, reference_id, amount,"
    " liquidation_id, round, mark_price, bankruptcy_price) VALUES (1, 'BTC-USDT-PERP', 'USDT', {});"
)
LIQUIDATION = (
    "INSERT INTO risk.liquidation_queue (liquidation_id, position_id, user_id, instrument_id, reason, status)"
    " OVERRIDING SYSTEM VALUE VALUES (1, 999, {}, {}, 'MARGIN_RATIO', 'PROCESSED');"
    "INSERT INTO ledger.insurance_claims (liquidation_id, round, asset, amount, quantity, mark_price, bankruptcy_price,"
    " is_open) VALUES (1, 1, 'USDT', 4, {}, 54000, {}, FALSE);"
)
JUSTIFIED = DRAW.format("'SETTLEMENT', 'BTC-USDT-PERP:1', 5, 1, 1, {}")
OF_USER_1 = (1, "'BTC-USDT-PERP'")
BOOKED = (
    "INSERT INTO ledger.ledger_entries (reference_type, reference_id, entry_type, account, user_id, asset,"
    " delta_available) VALUES ('INSURANCE_FUND', 'BTC-USDT-PERP:1', 'INSURANCE_FUND', 'user:1', 1, 'USDT', 5)"
)

# One thing wrong each, and the check that has to see it (others may, too).
CORRUPTIONS = [
    (
        "journals_sum_to_zero",
        "UPDATE ledger.ledger_entries SET delta_available = delta_available + 0.00000001 WHERE entry_id ="
        " (SELECT min(entry_id) FROM ledger.ledger_entries WHERE user_id = 1)",
    ),
    (
        "journals_sum_to_zero",
        "UPDATE ledger.ledger_entries SET asset = 'BTC' WHERE entry_id ="
        " (SELECT min(entry_id) FROM ledger.ledger_entries WHERE account = 'exchange:fees')",
    ),
    ("journals_have_two_postings", "DELETE FROM ledger.ledger_entries WHERE account = 'external:deposits'"),
    (
        "entries_belong_to_journals",
        "DELETE FROM ledger.journals WHERE reference_type = 'TRADE' AND reference_id ="
        " (SELECT min(reference_id) FROM ledger.journals WHERE reference_type = 'TRADE')",
    ),
    (
        "balances_equal_entries",
        "UPDATE ledger.ledger_balances SET available = available + 0.00000001 WHERE user_id = 1",
    ),
    (
        "balances_equal_entries",
        "UPDATE ledger.ledger_balances SET available = available + 1, reserved = reserved - 1 WHERE user_id = 1",
    ),
    ("balances_equal_entries", "DELETE FROM ledger.ledger_balances WHERE user_id = 3"),
    ("balances_equal_entries", "UPDATE ledger.system_balances SET balance = 1 WHERE account = 'exchange:rounding'"),
    ("balances_equal_entries", "INSERT INTO ledger.ledger_balances VALUES (99, 'USDT', 1, 0)"),
    ("reserved_equals_margins", "UPDATE ledger.margin_holds SET order_margin = order_margin + 1 WHERE user_id = 1"),
    ("reserved_equals_margins", "DELETE FROM ledger.margin_holds WHERE user_id = 1"),
    ("reserved_equals_margins", "INSERT INTO ledger.margin_holds VALUES (99, 'ETH-USDT-PERP', 'USDT', 1, 0, 0)"),
    (
        "positions_sum_to_zero",
        "UPDATE positions.positions SET signed_quantity = signed_quantity + 0.001 WHERE user_id = 1",
    ),
    (
        "clearing_plus_unrealized_is_zero",
        "UPDATE positions.positions SET entry_notional = entry_notional + 0.00000001 WHERE user_id = 1",
    ),
    (
        "clearing_plus_unrealized_is_zero",
        "UPDATE ledger.system_balances SET balance = balance + 0.00000001 WHERE account = 'exchange:clearing'",
    ),
    (
        "trades_have_two_sides",
        "DELETE FROM positions.position_events WHERE event_id = (SELECT min(event_id) FROM positions.position_events)",
    ),
    (
        "trades_have_two_sides",
        "DELETE FROM matching.trade_tickers WHERE seq = (SELECT min(seq) FROM matching.trade_tickers)",
    ),
    (
        "trades_are_booked_once",
        "UPDATE matching.trade_tickers SET maker_fee = maker_fee + 0.00000001"
        " WHERE seq = (SELECT min(seq) FROM matching.trade_tickers)",
    ),
    (
        "trades_are_booked_once",
        "UPDATE ledger.ledger_entries SET reference_id = '1' WHERE account = 'exchange:fees' AND entry_id ="
        " (SELECT min(entry_id) FROM ledger.ledger_entries WHERE account = 'exchange:fees')",
    ),
    (
        "funding_sums_to_zero",
        "INSERT INTO ledger.ledger_entries (reference_type, reference_id, entry_type, account, user_id, asset,"
        " delta_available) VALUES ('FUNDING_FEE', 'BTC:1:0', 'FUNDING', 'user:1', 1, 'USDT', 1)",
    ),
    (
        "funding_sums_to_zero",
        "UPDATE ledger.ledger_entries SET delta_available = delta_available - 1 WHERE entry_type = 'ROUNDING'",
    ),
    (
        "funding_sums_to_zero",
        "UPDATE ledger.ledger_entries SET delta_available = delta_available - 1"
        " WHERE entry_type = 'FUNDING' AND user_id = 1",
    ),
    ("funding_sums_to_zero", "UPDATE ledger.funding_runs SET paid = paid + 1, received = received + 1.00000001"),
    ("funding_sums_to_zero", "UPDATE ledger.funding_runs SET status = 'OPEN'"),
    ("funding_sums_to_zero", "DELETE FROM ledger.funding_runs"),
    ("funding_is_confirmed", "DELETE FROM positions.position_events WHERE type = 'FUNDING' AND user_id = 1"),
    (
        "funding_is_confirmed",
        "UPDATE positions.position_events SET realized_pnl = realized_pnl + 1 WHERE type = 'FUNDING' AND user_id = 1",
    ),
    (
        "claims_are_of_open_liquidations",
        "INSERT INTO ledger.insurance_claims (liquidation_id, round, asset, amount) VALUES (1, 1, 'USDT', 5)",
    ),
    (
        "liquidations_are_between_user_and_fund",
        "UPDATE ledger.ledger_entries SET entry_type = 'LIQUIDATION_FEE' WHERE account = 'exchange:fees'",
    ),
    (
        "insurance_fund_is_not_negative",
        "INSERT INTO ledger.system_balances (account, asset, balance) VALUES ('exchange:insurance_fund', 'USDT', -1)"
        " ON CONFLICT (account, asset) DO UPDATE SET balance = -1",
    ),
    (
        "nothing_is_in_shortfall",
        "INSERT INTO ledger.system_balances (account, asset, balance) VALUES ('exchange:shortfall', 'USDT', -1)",
    ),
    ("draws_are_justified", DRAW.format("'SETTLEMENT', 'BTC-USDT-PERP:1', 5, NULL, NULL, NULL, NULL")),
    # Nobody claimed it.
    ("draws_are_justified", DRAW.format("'SETTLEMENT', 'BTC-USDT-PERP:1', 5, 1, 1, 53000, 54000") + BOOKED),
    # More than the position, long or short, was worth below zero; somebody else's; in another instrument; at a mark and
    # a bankruptcy price that were not claimed with. Then not booked, and booked only.
    *(
        ("draws_are_justified", LIQUIDATION.format(*OF_USER_1, quantity, bankruptcy) + draw + BOOKED)
        for quantity, bankruptcy, draw in (
            (1, 54_004, JUSTIFIED.format("54000, 54004")),
            (-1, 53_996, JUSTIFIED.format("54000, 53996")),
            (-1, 54_005, JUSTIFIED.format("54000, 54005")),
            (1, 54_005, JUSTIFIED.format("53999, 54005")),
            (1, 54_005, JUSTIFIED.format("54000, 54006")),
        )
    ),
    *(
        ("draws_are_justified", LIQUIDATION.format(*other, 1, 54_005) + JUSTIFIED.format("54000, 54005") + BOOKED)
        for other in ((2, "'BTC-USDT-PERP'"), (1, "'ETH-USDT-PERP'"))
    ),
    ("draws_are_justified", DRAW.format("'FUNDING_FEE', 'BTC-USDT-PERP:1', 5, NULL, NULL, NULL, NULL")),
    ("draws_are_justified", BOOKED),
    (
        "nobody_is_negative",
        "ALTER TABLE ledger.ledger_balances DROP CONSTRAINT ck_ledger_balances_available;"
        " UPDATE ledger.ledger_balances SET available = -1 WHERE user_id = 3",
    ),
    ("ledger_holds_what_positions_need", "UPDATE positions.positions SET margin = margin + 1 WHERE user_id = 1"),
    ("ledger_holds_what_positions_need", "DELETE FROM positions.positions WHERE user_id = 1"),
    (
        "ledger_holds_what_orders_need",
        "UPDATE risk.exposures SET order_margin = order_margin + 0.00000001 WHERE user_id = 3",
    ),
    ("ledger_holds_what_orders_need", "UPDATE ledger.margin_holds SET order_short = order_short + 1 WHERE user_id = 3"),
    ("ledger_holds_what_orders_need", "DELETE FROM ledger.margin_holds WHERE user_id = 3"),
    ("accepted_orders_are_backed", "UPDATE risk.exposures SET open_orders = open_orders + 1 WHERE user_id = 3"),
    ("accepted_orders_are_backed", "UPDATE risk.exposures SET bid_notional = bid_notional + 1 WHERE user_id = 3"),
    ("accepted_orders_are_backed", "UPDATE orders.orders SET quantity = quantity + 0.001 WHERE status = 'PLACED'"),
    ("accepted_orders_are_backed", "UPDATE orders.orders SET status = 'PLACED' WHERE status = 'FAILED'"),
    ("accepted_orders_are_backed", "UPDATE orders.orders SET status = 'CANCELLED' WHERE status = 'PLACED'"),
    ("accepted_orders_are_backed", "DELETE FROM risk.exposures WHERE user_id = 3"),
    (
        "positions_equal_exposures",
        "UPDATE risk.exposures SET signed_quantity = signed_quantity + 0.001 WHERE user_id = 1",
    ),
    ("positions_equal_exposures", "UPDATE risk.exposures SET entry_notional = entry_notional + 1 WHERE user_id = 1"),
    ("positions_equal_exposures", "DELETE FROM risk.exposures WHERE user_id = 1"),
]


@pytest.fixture
async def world(pool: Pool, redis: Redis) -> World:
    """Trades booked, positions and orders open, some money won, one order that failed, one funding settlement."""
    world = World(pool, redis)
    await world.deposit(50_000, 1, 2, 3)
    await world.trade(1, 2, "1", 60_000)
    await world.trade(2, 1, "0.4", 60_500)
    await world.trade(3, 2, "1", 3_000, ETH)
    await world.place(limit(3, "BUY", "0.2", 59_000), limit(3, "SELL", "0.1", 61_000))
    await world.place(limit(4, "BUY", "0.2", 59_000))
    await world.settle()
    await world.publish_rate(NOON, "0.0001", "60000.00001")
    await finish(world.funding(FundingRun(BTC.instrument_id, NOON.isoformat())))
    return world


async def failed_checks(pool: Pool) -> set[str]:
    return {check.name for check in (await run_audit(pool)).checks if not check.ok}


async def test_an_untouched_exchange_passes_every_check(world: World) -> None:
    report = await run_audit(world.pool)
    assert report.ok
    assert {check.name: check.detail for check in report.checks} == dict.fromkeys(CHECKS, "")


async def test_an_exchange_that_never_traded_passes_every_check(pool: Pool) -> None:
    report = await run_audit(pool)
    assert report.ok
    assert {check.name for check in report.checks} == CHECKS


def test_every_check_has_a_corruption_of_its_own() -> None:
    assert {name for name, _ in CORRUPTIONS} == CHECKS


async def test_each_corruption_fails_the_check_that_is_there_for_it(world: World, pool: Pool) -> None:
    for name, corruption in CORRUPTIONS:
        async with pool.acquire() as conn:
            # Rolled back in the end, so that each one is alone: the audit looks through the same connection.
            transaction = conn.transaction()
            await transaction.start()
            await conn.execute(corruption)
            failed = [c.name for c in await _look_inside(conn) if not c.ok]
            await transaction.rollback()
        assert name in failed, corruption
    assert await failed_checks(pool) == set()


@pytest.mark.parametrize(("quantity", "bankruptcy"), [(1, 54_005), (-1, 53_995)])
async def test_a_draw_of_all_that_was_missing_at_the_mark_is_no_offence(
    world: World, pool: Pool, quantity: int, bankruptcy: int
) -> None:
    draw = LIQUIDATION.format(*OF_USER_1, quantity, bankruptcy) + JUSTIFIED.format(f"54000, {bankruptcy}") + BOOKED
    async with pool.acquire() as conn:
        await conn.execute(draw)
        assert "draws_are_justified" not in [check.name for check in await _look_inside(conn) if not check.ok]


async def _look_inside(conn: Connection) -> list[AuditCheck]:
    queries = audit.STRICT_CHECKS | audit.SETTLED_CHECKS
    return [await audit._check(conn, name, query) for name, query in queries.items()]


async def test_a_broken_invariant_alerts_the_operator(
    world: World, pool: Pool, caplog: pytest.LogCaptureFixture
) -> None:
    await pool.execute("UPDATE ledger.ledger_balances SET available = available + 1 WHERE user_id = 2")
    report = await AuditActivities(pool).audit()
    assert not report.ok
    (check,) = [check for check in report.checks if not check.ok]
    assert (check.name, check.detail) == ("balances_equal_entries", "1 offenders: user:2 USDT: 1")
    assert "ALERT" in caplog.text


async def test_between_any_two_steps_nothing_is_reported_as_broken(
    world: World, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit, "LOOKS_MAX", 1)
    batch = await world.take_in(
        limit(1, "SELL", "0.8", 59_000), limit(2, "BUY", "0.3", 60_000), limit(3, "BUY", "0.1", 3_000, ETH)
    )
    seen_in_motion = 0
    for steps in (world.placement(batch), _settled(world)):
        async for step in steps:
            report = await run_audit(pool)
            assert report.ok, (step, [check for check in report.checks if not check.ok])
            seen_in_motion += sum(bool(check.detail) for check in report.checks)
    assert seen_in_motion > 3, "else there was nothing to be misjudged"
    assert [check.detail for check in (await run_audit(pool)).checks if check.detail] == []


async def _settled(world: World) -> AsyncIterator[str]:
    for instrument in (BTC, ETH):
        await world.match(instrument)
        while (events := world.unsettled(instrument, 2)) is not None:
            async for step in world.settlement(events):
                yield step


async def test_what_is_in_motion_is_looked_at_again_until_it_rests(world: World, pool: Pool) -> None:
    placing = world.placement(await world.take_in(limit(1, "BUY", "0.1", 59_000)))
    await advance(placing, "checked")
    looking = asyncio.create_task(run_audit(pool))
    await asyncio.sleep(audit.PAUSE_SECONDS / 2)
    await finish(placing)
    report = await looking
    assert [check.detail for check in report.checks if check.detail] == []


async def test_somebody_in_motion_hides_nobody_else(world: World, pool: Pool) -> None:
    batch = await world.take_in(limit(1, "BUY", "0.1", 59_000))
    await world.risk.check_orders(StepRequest(batch.saga_id, 1, batch.order_ids))
    await pool.execute("UPDATE risk.exposures SET order_margin = order_margin + 1 WHERE user_id = 3")
    assert await failed_checks(pool) == {"ledger_holds_what_orders_need"}

"""The ledger's invariants, checked over one snapshot of all services.

What is between two steps at that moment (a fill applied to positions and not yet booked, a check not yet frozen)
is either reckoned with exactly or left to the next look; nothing is allowed a tolerance.
"""

import asyncio
from datetime import UTC, datetime
from decimal import Decimal

from temporalio import activity

from domain.clock import iso
from domain.money import plain
from domain.sagas import AUDIT, AuditCheck, AuditReport
from storage.db import Connection, Pool
from telemetry.alerts import AUDIT_FAILED, alert
from telemetry.metrics import AUDITS

LOOKS_MAX = 10
PAUSE_SECONDS = 0.3
STATEMENT_TIMEOUT_SECONDS = 300

# Each query lists offenders: no row means the invariant holds.
STRICT_CHECKS = {
    "journals_sum_to_zero": """
        SELECT reference_type || ' ' || reference_id || ' ' || asset, sum(delta_available + delta_reserved)
        FROM ledger.ledger_entries GROUP BY reference_type, reference_id, asset
        HAVING sum(delta_available + delta_reserved) <> 0""",
    "journals_have_two_postings": """
        SELECT reference_type || ' ' || reference_id,
               count(*) FILTER (WHERE delta_available <> 0) + count(*) FILTER (WHERE delta_reserved <> 0)
        FROM ledger.ledger_entries GROUP BY reference_type, reference_id
        HAVING count(*) FILTER (WHERE delta_available <> 0) + count(*) FILTER (WHERE delta_reserved <> 0) < 2""",
    "entries_belong_to_journals": """
        SELECT e.reference_type || ' ' || e.reference_id, count(*) FROM ledger.ledger_entries e
        LEFT JOIN ledger.journals j USING (reference_type, reference_id)
        WHERE j.reference_id IS NULL GROUP BY 1""",
    "balances_equal_entries": """
        SELECT 'user:' || b.user_id || ' ' || b.asset,
               b.available - coalesce(e.available, 0) + b.reserved - coalesce(e.reserved, 0)
        FROM ledger.ledger_balances b
        FULL JOIN (SELECT user_id, asset, sum(delta_available) AS available, sum(delta_reserved) AS reserved
                   FROM ledger.ledger_entries WHERE user_id IS NOT NULL GROUP BY user_id, asset) e
        USING (user_id, asset)
        WHERE (coalesce(b.available, 0), coalesce(b.reserved, 0))
              <> (coalesce(e.available, 0), coalesce(e.reserved, 0))
        UNION ALL
        SELECT account || ' ' || asset, coalesce(s.balance, 0) - coalesce(e.balance, 0)
        FROM ledger.system_balances s
        FULL JOIN (SELECT account, asset, sum(delta_available) AS balance FROM ledger.ledger_entries
                   WHERE user_id IS NULL GROUP BY account, asset) e USING (account, asset)
        WHERE coalesce(s.balance, 0) <> coalesce(e.balance, 0)""",
    "reserved_equals_margins": """
        SELECT 'user:' || user_id || ' ' || asset, b.reserved - coalesce(h.held, 0)
        FROM ledger.ledger_balances b
        FULL JOIN (SELECT user_id, asset, sum(order_margin + position_margin) AS held
                   FROM ledger.margin_holds GROUP BY user_id, asset) h USING (user_id, asset)
        WHERE coalesce(b.reserved, 0) <> coalesce(h.held, 0)""",
    "positions_sum_to_zero": """
        SELECT instrument_id, sum(signed_quantity) FROM positions.v_positions
        GROUP BY instrument_id HAVING sum(signed_quantity) <> 0""",
    # Sum of unrealised profit at any mark = - sum of signed entry notional, as the quantities sum to zero. What the
    # ledger has not booked yet is known from the fills past its cursor.
    "clearing_plus_unrealized_is_zero": """
        SELECT i.quote_asset, coalesce(max(s.balance), 0) + sum(x.amount)
        FROM (SELECT instrument_id, CASE WHEN signed_quantity < 0 THEN -entry_notional ELSE entry_notional END AS amount
              FROM positions.v_positions
              UNION ALL
              SELECT f.instrument_id, -f.realized_pnl FROM positions.v_fills f
              JOIN ledger.v_cursors c USING (instrument_id) WHERE f.seq > c.applied_seq) x
        JOIN matching.v_instruments i USING (instrument_id)
        LEFT JOIN ledger.system_balances s ON s.account = 'exchange:clearing' AND s.asset = i.quote_asset
        GROUP BY i.quote_asset HAVING coalesce(max(s.balance), 0) + sum(x.amount) <> 0""",
    # Of what the engine has deleted the fills are left, which have to pair up, and the totals of the tape.
    # Who is deleveraged trades, too, beside the tape.
    "trades_have_two_sides": """
        WITH t AS (SELECT instrument_id, seq, trade_id, quantity FROM matching.v_trades
                   UNION ALL SELECT instrument_id, seq, trade_id, quantity FROM matching.v_deleveragings)
        SELECT t.instrument_id || ' trade ' || t.trade_id, count(f.trade_id)
        FROM t JOIN positions.v_cursors c ON c.instrument_id = t.instrument_id
        LEFT JOIN positions.v_fills f ON f.instrument_id = t.instrument_id AND f.seq = t.seq
        WHERE t.seq <= c.applied_seq GROUP BY t.instrument_id, t.trade_id HAVING count(f.trade_id) <> 2
        UNION ALL
        SELECT f.instrument_id || ' fill without trade ' || f.trade_id, count(*)
        FROM positions.v_fills f LEFT JOIN t ON t.trade_id = f.trade_id
        LEFT JOIN matching.v_pruned p ON p.instrument_id = f.instrument_id
        WHERE t.trade_id IS NULL AND f.seq > coalesce(p.event_seq, 0) GROUP BY f.instrument_id, f.trade_id
        UNION ALL
        SELECT f.instrument_id || ' deleted trade ' || f.trade_id, count(*)
        FROM positions.v_fills f JOIN matching.v_pruned p USING (instrument_id)
        WHERE f.seq <= p.event_seq GROUP BY f.instrument_id, f.trade_id
        HAVING count(*) <> 2 OR sum(CASE WHEN f.side = 'BUY' THEN f.quantity ELSE -f.quantity END) <> 0
        UNION ALL
        SELECT p.instrument_id || ' deleted trades', p.quantity - coalesce(sum(f.quantity), 0)
        FROM matching.v_pruned p LEFT JOIN positions.v_fills f
            ON f.instrument_id = p.instrument_id AND f.seq <= p.event_seq AND f.role = 'TAKER'
            AND f.order_id IS NOT NULL
        GROUP BY p.instrument_id, p.trades, p.quantity
        HAVING (p.trades, p.quantity) <> (count(f.trade_id), coalesce(sum(f.quantity), 0))""",
    "trades_are_booked_once": """
        SELECT 'trade ' || coalesce(t.trade_id, e.trade_id), coalesce(t.fee, 0) - coalesce(e.fee, 0)
        FROM (SELECT t.trade_id::text AS trade_id, t.maker_fee + t.taker_fee AS fee FROM matching.v_trades t
              JOIN ledger.v_cursors c USING (instrument_id) WHERE t.seq <= c.applied_seq
              UNION ALL
              SELECT f.trade_id::text, sum(f.fee) FROM positions.v_fills f
              JOIN matching.v_pruned p USING (instrument_id) WHERE f.seq <= p.event_seq GROUP BY f.trade_id) t
        FULL JOIN (SELECT reference_id AS trade_id, sum(delta_available) AS fee FROM ledger.ledger_entries
                   WHERE account = 'exchange:fees' AND reference_type IN ('TRADE', 'LIQUIDATION')
                   GROUP BY reference_id) e
        USING (trade_id) WHERE coalesce(t.fee, 0) <> coalesce(e.fee, 0)
        UNION ALL
        SELECT p.instrument_id || ' fees of deleted trades', p.fees - coalesce(sum(f.fee), 0)
        FROM matching.v_pruned p LEFT JOIN positions.v_fills f
            ON f.instrument_id = p.instrument_id AND f.seq <= p.event_seq
        GROUP BY p.instrument_id, p.fees HAVING p.fees <> coalesce(sum(f.fee), 0)""",
    # What users paid and got is what their settlement says, and once it is done nothing is left between them.
    "funding_sums_to_zero": """
        SELECT coalesce(e.run, r.run), coalesce(e.users, 0) - coalesce(r.received - r.paid, 0) FROM (
            SELECT split_part(reference_id, ':', 1) || ':' || split_part(reference_id, ':', 2) AS run, asset,
                   coalesce(sum(delta_available + delta_reserved)
                            FILTER (WHERE user_id IS NOT NULL AND entry_type = 'FUNDING'), 0) AS users,
                   coalesce(sum(delta_available) FILTER (WHERE account = 'exchange:funding'), 0) AS between
            FROM ledger.ledger_entries WHERE reference_type = 'FUNDING_FEE' GROUP BY 1, 2) e
        FULL JOIN (
            SELECT instrument_id || ':' || to_char(funding_time AT TIME ZONE 'UTC', 'YYYYMMDD"T"HH24MISS.US"Z"') AS run,
                   asset, status, paid, received FROM ledger.funding_runs) r USING (run, asset)
        WHERE coalesce(e.users, 0) IS DISTINCT FROM r.received - r.paid
           OR coalesce(e.between, 0) <> CASE r.status WHEN 'DONE' THEN 0 ELSE r.paid - r.received END""",
    "funding_is_confirmed": """
        SELECT r.instrument_id || ' ' || r.funding_time, r.received - r.paid - coalesce(p.payments, 0)
        FROM ledger.funding_runs r
        LEFT JOIN (SELECT instrument_id, funding_time, sum(payment) AS payments, count(*) AS positions
                   FROM positions.v_funding_payments GROUP BY instrument_id, funding_time) p
        USING (instrument_id, funding_time)
        WHERE r.status = 'DONE'
          AND (r.positions, r.received - r.paid) <> (coalesce(p.positions, 0), coalesce(p.payments, 0))""",
    # What the insurance fund has promised is claimed by liquidations that are under way, each once.
    "claims_are_of_open_liquidations": """
        SELECT 'liquidation ' || k.liquidation_id, sum(k.amount) FROM ledger.insurance_claims k
        LEFT JOIN risk.v_liquidations q ON q.liquidation_id = k.liquidation_id AND q.status = 'PROCESSING'
        WHERE k.is_open GROUP BY k.liquidation_id HAVING count(*) > 1 OR count(q.liquidation_id) = 0""",
    # What users get from the insurance fund and pay to it.
    "liquidations_are_between_user_and_fund": """
        SELECT reference_type || ' ' || reference_id || ' ' || entry_type, sum(delta_available)
        FROM ledger.ledger_entries
        WHERE entry_type IN ('INSURANCE_FUND', 'LIQUIDATION_FEE', 'LIQUIDATION_SURPLUS', 'SHORTFALL')
        GROUP BY reference_type, reference_id, entry_type
        HAVING sum(delta_available) <> 0 OR bool_or(user_id IS NULL AND account <>
            CASE entry_type WHEN 'SHORTFALL' THEN 'exchange:shortfall' ELSE 'exchange:insurance_fund' END)""",
    "insurance_fund_is_not_negative": """
        SELECT account || ' ' || asset, balance FROM ledger.system_balances
        WHERE account = 'exchange:insurance_fund' AND balance < 0""",
    "nothing_is_in_shortfall": """
        SELECT account || ' ' || asset, balance FROM ledger.system_balances
        WHERE account = 'exchange:shortfall' AND balance <> 0""",
    # What the fund paid is written down with the liquidation it was for (of that user and instrument, with the mark and
    # the bankruptcy price that were claimed with), and is no more than what was closed was worth below zero at that
    # mark. A funding payment needs no liquidation.
    "draws_are_justified": """
        SELECT reference_type || ' ' || reference_id || ' user:' || user_id, amount FROM ledger.insurance_draws
        WHERE liquidation_id IS NULL AND reference_type <> 'FUNDING_FEE'
        UNION ALL
        SELECT 'liquidation ' || liquidation_id || ' round ' || coalesce(round, 0), sum(d.amount)
        FROM ledger.insurance_draws d LEFT JOIN ledger.insurance_claims k USING (liquidation_id, round)
        LEFT JOIN risk.v_liquidations q USING (liquidation_id)
        WHERE liquidation_id IS NOT NULL GROUP BY liquidation_id, round
        HAVING sum(d.amount) > coalesce(max(abs(k.quantity)
                * greatest(0, sign(k.quantity) * (k.bankruptcy_price - k.mark_price))), 0)
            OR bool_or((d.user_id, d.instrument_id, d.mark_price, d.bankruptcy_price)
                IS DISTINCT FROM (q.user_id, q.instrument_id, k.mark_price, k.bankruptcy_price))
        UNION ALL
        SELECT 'INSURANCE_FUND ' || reference_id || ' user:' || user_id, coalesce(e.amount, 0) - coalesce(d.amount, 0)
        FROM (SELECT reference_id, user_id, sum(delta_available) AS amount FROM ledger.ledger_entries
              WHERE reference_type = 'INSURANCE_FUND' AND entry_type IN ('INSURANCE_FUND', 'SHORTFALL')
                AND user_id IS NOT NULL GROUP BY reference_id, user_id) e
        FULL JOIN (SELECT reference_id, user_id, sum(amount) AS amount FROM ledger.insurance_draws
                   GROUP BY reference_id, user_id) d USING (reference_id, user_id)
        WHERE coalesce(e.amount, 0) <> coalesce(d.amount, 0)""",
    "nobody_is_negative": """
        SELECT 'user:' || user_id || ' ' || asset, least(available, reserved) FROM ledger.ledger_balances
        WHERE available < 0 OR reserved < 0""",
}

# These compare services that are written one after the other, so they hold for users who are between no two steps.
# The second column says whether the row offends (TRUE) or cannot be judged in this snapshot (FALSE).
SETTLED_CHECKS = {
    # The margin in positions is a copy, which says of which change of the ledger's it is.
    "ledger_holds_what_positions_need": """
        SELECT 'user:' || user_id || ' ' || instrument_id,
               p.user_id IS NULL OR h.user_id IS NULL OR p.margin_version = h.margin_version
        FROM positions.v_positions p FULL JOIN ledger.v_margin_holds h USING (user_id, instrument_id)
        WHERE coalesce(p.margin, 0) <> coalesce(h.position_margin, 0)""",
    "ledger_holds_what_orders_need": """
        SELECT 'user:' || user_id || ' ' || instrument_id,
               (r.applied_seq = l.applied_seq AND NOT EXISTS (
                   SELECT 1 FROM orders.v_open_sagas s JOIN orders.v_claims o ON o.order_id = ANY (s.order_ids)
                   WHERE s.kind = 'PLACE' AND o.user_id = coalesce(e.user_id, h.user_id))
                AND (e.pending_step IS NULL OR NOT starts_with(e.pending_step, 'margin-') OR EXISTS (
                   SELECT 1 FROM ledger.v_steps f WHERE f.step_id = 'freeze:' || e.pending_step)))
        FROM risk.v_exposures e FULL JOIN ledger.v_margin_holds h USING (user_id, instrument_id)
        JOIN risk.v_cursors r USING (instrument_id) JOIN ledger.v_cursors l USING (instrument_id)
        WHERE coalesce(e.order_margin, 0) <> coalesce(h.order_margin + h.order_short, 0)""",
    "accepted_orders_are_backed": """
        SELECT 'user:' || user_id || ' ' || instrument_id,
               (r.applied_seq = c.applied_seq AND NOT EXISTS (
                   SELECT 1 FROM orders.v_open_sagas s JOIN orders.v_claims x ON x.order_id = ANY (s.order_ids)
                   WHERE s.kind = 'PLACE' AND x.user_id = coalesce(e.user_id, o.user_id)))
        FROM (SELECT user_id, instrument_id, sum(orders) AS open_orders,
                     coalesce(sum(notional) FILTER (WHERE side = 'BUY'), 0) AS bids,
                     coalesce(sum(notional) FILTER (WHERE side = 'SELL'), 0) AS asks,
                     coalesce(sum(loss) FILTER (WHERE side = 'BUY'), 0) AS bid_loss,
                     coalesce(sum(loss) FILTER (WHERE side = 'SELL'), 0) AS ask_loss
              FROM orders.v_claims WHERE status IN ('ACCEPTED', 'PLACED', 'PARTIALLY_FILLED', 'CANCEL_REQUESTED')
              GROUP BY user_id, instrument_id) o
        FULL JOIN risk.v_exposures e USING (user_id, instrument_id)
        JOIN orders.v_cursors c USING (instrument_id) JOIN risk.v_cursors r USING (instrument_id)
        WHERE (coalesce(o.bids, 0), coalesce(o.asks, 0), coalesce(o.open_orders, 0), coalesce(o.bid_loss, 0),
               coalesce(o.ask_loss, 0))
              <> (coalesce(e.bid_notional, 0), coalesce(e.ask_notional, 0), coalesce(e.open_orders, 0),
                  coalesce(e.bid_loss, 0), coalesce(e.ask_loss, 0))""",
    "positions_equal_exposures": """
        SELECT 'user:' || user_id || ' ' || instrument_id, c.applied_seq = r.applied_seq
        FROM positions.v_positions p FULL JOIN risk.v_exposures e USING (user_id, instrument_id)
        JOIN positions.v_cursors c USING (instrument_id) JOIN risk.v_cursors r USING (instrument_id)
        WHERE (coalesce(p.signed_quantity, 0), coalesce(p.entry_notional, 0))
              <> (coalesce(e.signed_quantity, 0), coalesce(e.entry_notional, 0))""",
}


class AuditActivities:
    """The audit as an activity."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    @activity.defn(name=AUDIT)
    async def audit(self) -> AuditReport:
        """Check every invariant; what is broken is logged as an error for the operator."""
        report = await run_audit(self._pool)
        AUDITS.labels("ok" if report.ok else "failed").inc()
        for check in report.checks:
            if not check.ok:
                alert(AUDIT_FAILED, "ledger audit failed: %s: %s", check.name, check.detail)
        return report


async def run_audit(pool: Pool) -> AuditReport:
    """The invariants of the ledger now. Rows in motion are looked at again, up to LOOKS_MAX times."""
    checks = await _look(pool, STRICT_CHECKS)
    open_checks = dict(SETTLED_CHECKS)
    for look in range(LOOKS_MAX):
        looked = await _look(pool, open_checks)
        for check in looked:
            in_motion = check.ok and bool(check.detail)
            if not in_motion or look == LOOKS_MAX - 1:
                checks.append(check)
                del open_checks[check.name]
        if not open_checks:
            break
        await asyncio.sleep(PAUSE_SECONDS)
    return AuditReport(all(check.ok for check in checks), iso(datetime.now(UTC)), checks)


async def _look(pool: Pool, queries: dict[str, str]) -> list[AuditCheck]:
    """One snapshot: every query sees the same moment."""
    async with pool.acquire() as conn, conn.transaction(isolation="repeatable_read", readonly=True):
        return [await _check(conn, name, query) for name, query in queries.items()]


async def _check(conn: Connection, name: str, query: str) -> AuditCheck:
    rows = await conn.fetch(query, timeout=STATEMENT_TIMEOUT_SECONDS)
    offenders = [row for row in rows if row[1] is not False]
    if offenders:
        shown = ", ".join(f"{row[0]}: {_figure(row[1])}" for row in offenders[:5])
        return AuditCheck(name, ok=False, detail=f"{len(offenders)} offenders: {shown}")
    return AuditCheck(name, ok=True, detail=f"{len(rows)} in motion" if rows else "")


def _figure(value: object) -> str:
    if value is True:
        return "differs"
    return plain(value) if isinstance(value, Decimal) else str(value)

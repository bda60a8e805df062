"""Laws 4 and 5, and double entry: what has to be true of the ledger's tables at any moment."""

from storage.db import Connection
from tests.adversary_run.findings import Finding

# Each lists offenders: (what, figure).
_LAWS = {
    ("2", "a journal does not sum to zero"): """
        SELECT reference_type || ' ' || reference_id || ' ' || asset, sum(delta_available) + sum(delta_reserved)
        FROM ledger.ledger_entries GROUP BY reference_type, reference_id, asset
        HAVING sum(delta_available) + sum(delta_reserved) <> 0""",
    ("2", "a balance is not the sum of its entries"): """
        SELECT 'user ' || b.user_id, b.available + b.reserved - e.total FROM ledger.ledger_balances b
        CROSS JOIN LATERAL (
            SELECT coalesce(sum(delta_available), 0) AS available, coalesce(sum(delta_reserved), 0) AS reserved,
                   coalesce(sum(delta_available + delta_reserved), 0) AS total
            FROM ledger.ledger_entries WHERE user_id = b.user_id AND asset = b.asset) e
        WHERE b.available <> e.available OR b.reserved <> e.reserved
        UNION ALL
        SELECT s.account, s.balance - e.total FROM ledger.system_balances s CROSS JOIN LATERAL (
            SELECT coalesce(sum(delta_available), 0) AS total
            FROM ledger.ledger_entries WHERE user_id IS NULL AND account = s.account AND asset = s.asset) e
        WHERE s.balance <> e.total""",
    ("2", "open positions do not sum to zero"): """
        SELECT instrument_id, sum(signed_quantity) FROM positions.positions
        GROUP BY instrument_id HAVING sum(signed_quantity) <> 0""",
    ("4", "a balance is below zero"): """
        SELECT 'user ' || user_id, least(available, reserved) FROM ledger.ledger_balances
        WHERE available < 0 OR reserved < 0""",
    ("4", "what is reserved is not what is held"): """
        SELECT 'user ' || b.user_id, b.reserved - coalesce(sum(h.order_margin + h.position_margin), 0)
        FROM ledger.ledger_balances b LEFT JOIN ledger.margin_holds h USING (user_id, asset)
        GROUP BY b.user_id, b.asset, b.reserved
        HAVING b.reserved <> coalesce(sum(h.order_margin + h.position_margin), 0)""",
    ("5", "the fund is below zero"): """
        SELECT account, balance FROM ledger.system_balances WHERE account = 'exchange:insurance_fund' AND balance < 0
        UNION ALL
        SELECT 'after entry ' || entry_id, balance FROM (
            SELECT entry_id, sum(delta_available) OVER (ORDER BY entry_id) AS balance
            FROM ledger.ledger_entries WHERE account = 'exchange:insurance_fund') f WHERE balance < 0""",
    ("5", "something is in shortfall"): """
        SELECT account, balance FROM ledger.system_balances WHERE account = 'exchange:shortfall' AND balance <> 0""",
    ("1", "the fund paid otherwise than by a draw"): """
        SELECT e.reference_type || ' ' || e.reference_id || ' ' || e.entry_type, e.delta_available
        FROM ledger.ledger_entries e
        WHERE e.account IN ('exchange:insurance_fund', 'exchange:shortfall') AND e.delta_available < 0
          AND (e.reference_type, e.entry_type) NOT IN
              (('INSURANCE_FUND', 'INSURANCE_FUND'), ('INSURANCE_FUND', 'SHORTFALL'))
        UNION ALL
        SELECT 'INSURANCE_FUND ' || coalesce(e.reference_id, d.reference_id), coalesce(e.paid, 0) - coalesce(d.drawn, 0)
        FROM (SELECT reference_id, -sum(delta_available) AS paid FROM ledger.ledger_entries
              WHERE account IN ('exchange:insurance_fund', 'exchange:shortfall')
                AND entry_type IN ('INSURANCE_FUND', 'SHORTFALL') GROUP BY reference_id) e
        FULL JOIN (SELECT reference_id, sum(amount) AS drawn FROM ledger.insurance_draws GROUP BY reference_id) d
        USING (reference_id) WHERE coalesce(e.paid, 0) <> coalesce(d.drawn, 0)""",
}


async def broken_books(conn: Connection) -> list[Finding]:
    """Which of these laws do not hold."""
    found = []
    for (law, kind), query in _LAWS.items():
        found += [Finding(law, kind, f"{row[0]}: {row[1]:f}") for row in await conn.fetch(query)]
    return found

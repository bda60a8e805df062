"""The statements of liquidations that read across services, from their views."""

from domain.money import AMOUNT_STEP

# Positions of one side that a user's place in the queue is told by.
SAMPLED_MAX = 2_000
# A position is looked at when its price is crossed. Prices are kept to 8 decimals: what that hides is decided exactly.
# Left alone are positions with fills that are not booked yet, and those that an operator took back.
CROSSED = f"""
    SELECT p.*, m.mark, coalesce(h.position_margin, 0) AS margin
    FROM unnest($1::text[], $2::numeric[]) AS m (instrument_id, mark) CROSS JOIN LATERAL (
        (SELECT position_id, user_id, instrument_id, signed_quantity, entry_notional FROM positions.v_positions
         WHERE instrument_id = m.instrument_id AND signed_quantity > 0 AND status = 'OPEN'
           AND margin_mode = 'ISOLATED' AND liquidation_price >= m.mark - {AMOUNT_STEP:f}
         ORDER BY liquidation_price DESC LIMIT $3)
        UNION ALL
        (SELECT position_id, user_id, instrument_id, signed_quantity, entry_notional FROM positions.v_positions
         WHERE instrument_id = m.instrument_id AND signed_quantity < 0 AND status = 'OPEN'
           AND margin_mode = 'ISOLATED' AND liquidation_price <= m.mark + {AMOUNT_STEP:f}
         ORDER BY liquidation_price LIMIT $3)) p
    LEFT JOIN ledger.v_margin_holds h ON h.user_id = p.user_id AND h.instrument_id = p.instrument_id
    WHERE NOT EXISTS (SELECT FROM risk.liquidation_queue q
                      WHERE q.position_id = p.position_id AND q.status = 'ABORTED'
                        AND q.updated_at > now() - $4::interval)
      AND NOT EXISTS (SELECT FROM positions.v_fills f JOIN orders.v_cursors c ON c.instrument_id = f.instrument_id
                      WHERE f.instrument_id = p.instrument_id AND f.user_id = p.user_id AND f.seq > c.applied_seq)
    ORDER BY p.user_id
"""
# Equity of everybody with cross positions at $1, $2: what is available or held for them, and unrealised profit. A
# position in an instrument that never had a mark price is valued at what was paid for it. `unsettled`: fills of the
# user are in the positions, and perhaps not in the ledger yet.
CROSS_POSITIONS = """
    WITH fresh AS MATERIALIZED (
        SELECT DISTINCT f.user_id FROM positions.v_cursors c CROSS JOIN LATERAL (
            SELECT user_id FROM positions.v_fills
            WHERE instrument_id = c.instrument_id AND seq > c.confirmed_seq ORDER BY seq OFFSET 0) f),
    valued AS MATERIALIZED (
        SELECT i.instrument_id, i.quote_asset, i.state, coalesce(live.mark, last.mark_price) AS mark
        FROM matching.v_instruments i
        LEFT JOIN unnest($1::text[], $2::numeric[]) AS live (instrument_id, mark) USING (instrument_id)
        LEFT JOIN LATERAL (SELECT mark_price FROM market.v_mark_prices p
            WHERE p.instrument_id = i.instrument_id AND live.mark IS NULL
            ORDER BY calculated_at DESC LIMIT 1) last ON TRUE)
    SELECT p.position_id, p.user_id, p.instrument_id, p.signed_quantity, p.entry_notional, p.status, p.warned, i.mark,
           i.quote_asset, i.state, b.available,
           coalesce(h.order_margin, 0) + coalesce(h.position_margin, 0) AS held,
           coalesce(p.signed_quantity * i.mark - sign(p.signed_quantity) * p.entry_notional, 0) AS pnl,
           n.notional * t.maintenance_margin_rate - t.cumulative AS maintenance,
           coalesce(idle.held, 0) AS idle_held, fresh.user_id IS NOT NULL AS unsettled
    FROM positions.v_positions p
    JOIN valued i USING (instrument_id)
    JOIN ledger.v_balances b ON b.user_id = p.user_id AND b.asset = i.quote_asset
    LEFT JOIN ledger.v_margin_holds h ON h.user_id = p.user_id AND h.instrument_id = p.instrument_id
    CROSS JOIN LATERAL (SELECT coalesce(abs(p.signed_quantity) * i.mark, p.entry_notional) AS notional) n
    LEFT JOIN LATERAL (
        SELECT maintenance_margin_rate, cumulative FROM risk.leverage_tiers
        WHERE instrument_id = p.instrument_id AND notional_from <= n.notional
        ORDER BY notional_from DESC LIMIT 1) t ON TRUE
    LEFT JOIN LATERAL (
        SELECT sum(o.order_margin) AS held FROM ledger.v_margin_holds o
        JOIN risk.exposures e USING (user_id, instrument_id)
        WHERE o.user_id = p.user_id AND o.asset = i.quote_asset AND e.margin_mode = 'CROSS'
          AND e.signed_quantity = 0) idle ON TRUE
    LEFT JOIN fresh ON fresh.user_id = p.user_id
    WHERE p.margin_mode = 'CROSS' AND p.signed_quantity <> 0 AND ($3::bigint IS NULL OR p.user_id = $3)
    ORDER BY p.user_id, p.instrument_id
"""
# Accounts that cannot be judged now: something of theirs is not booked yet, in liquidation, or taken back.
NOT_NOW = """
    SELECT u.user_id FROM unnest($1::bigint[]) AS u (user_id)
    WHERE EXISTS (SELECT FROM risk.liquidation_queue q WHERE q.user_id = u.user_id AND q.margin_mode = 'CROSS'
                  AND q.status IN ('PENDING', 'PROCESSING'))
       OR EXISTS (SELECT FROM risk.liquidation_queue q JOIN positions.v_positions p USING (position_id)
                  WHERE p.user_id = u.user_id AND p.margin_mode = 'CROSS' AND q.status = 'ABORTED'
                    AND q.updated_at > now() - $2::interval)
       OR EXISTS (SELECT FROM positions.v_fills f JOIN orders.v_cursors c USING (instrument_id)
                  WHERE f.user_id = u.user_id AND f.seq > c.applied_seq)
"""
# Longs are warned when mark is at their warning price or below, shorts above; $4: who is warned already.
NEAR = """
    SELECT p.position_id FROM unnest($1::text[], $2::numeric[]) AS m (instrument_id, mark) CROSS JOIN LATERAL (
        (SELECT position_id FROM positions.v_positions
         WHERE instrument_id = m.instrument_id AND signed_quantity > 0 AND status = 'OPEN'
           AND margin_mode = 'ISOLATED' AND NOT warned AND warning_price >= m.mark
         ORDER BY warning_price DESC LIMIT $3)
        UNION ALL
        (SELECT position_id FROM positions.v_positions
         WHERE instrument_id = m.instrument_id AND signed_quantity < 0 AND status = 'OPEN'
           AND margin_mode = 'ISOLATED' AND NOT warned AND warning_price <= m.mark
         ORDER BY warning_price LIMIT $3)) p
"""
RECOVERED = """
    SELECT p.position_id FROM unnest($1::text[], $2::numeric[]) AS m (instrument_id, mark) CROSS JOIN LATERAL (
        (SELECT position_id FROM positions.v_positions
         WHERE instrument_id = m.instrument_id AND signed_quantity > 0 AND status = 'OPEN'
           AND margin_mode = 'ISOLATED' AND warned AND warning_price < m.mark * (1 - $4::numeric)
         ORDER BY warning_price LIMIT $3)
        UNION ALL
        (SELECT position_id FROM positions.v_positions
         WHERE instrument_id = m.instrument_id AND signed_quantity < 0 AND status = 'OPEN'
           AND margin_mode = 'ISOLATED' AND warned AND warning_price > m.mark * (1 + $4::numeric)
         ORDER BY warning_price DESC LIMIT $3)) p
"""
# `unanswered`: the engine has not carried out the last command, or settlement has not finished with what came of it.
SITUATION = """
    SELECT q.user_id, q.instrument_id, q.margin_mode, q.status, q.stopping,
           p.signed_quantity, p.entry_notional, i.state, i.quote_asset,
           coalesce(h.position_margin, 0) AS margin,
           EXISTS (SELECT FROM risk.exposures e WHERE e.user_id = q.user_id AND e.open_orders > 0
                   AND (e.instrument_id = q.instrument_id OR q.margin_mode = 'CROSS' AND e.margin_mode = 'CROSS'))
               AS has_orders,
           EXISTS (SELECT FROM positions.v_fills f JOIN orders.v_cursors c USING (instrument_id)
                   WHERE f.user_id = q.user_id AND f.seq > c.applied_seq
                     AND (f.instrument_id = q.instrument_id OR q.margin_mode = 'CROSS')) AS unbooked,
           q.command_seq > m.command_seq
               OR EXISTS (SELECT FROM matching.v_events e WHERE e.instrument_id = q.instrument_id
                          AND e.seq > o.applied_seq AND e.command_seq <= q.command_seq) AS unanswered
    FROM risk.liquidation_queue q
    JOIN positions.v_positions p USING (position_id)
    JOIN matching.v_instruments i ON i.instrument_id = q.instrument_id
    JOIN matching.v_cursors m ON m.instrument_id = q.instrument_id
    JOIN orders.v_cursors o ON o.instrument_id = q.instrument_id
    LEFT JOIN ledger.v_margin_holds h ON h.user_id = q.user_id AND h.instrument_id = q.instrument_id
    WHERE q.liquidation_id = $1
"""
# `domain.liquidation.deleverage_score` at a mark price, of positions with their unrealised `pnl`.
_SCORE = (
    "CASE WHEN pnl > 0 THEN pnl / entry_notional * (abs(signed_quantity) * {mark} / (margin + pnl))"
    " ELSE pnl / entry_notional / (abs(signed_quantity) * {mark} / (margin + pnl)) END"
)
# Ranked by score; who would be bankrupt at mark ($2) or at the price ($3) is left out. As many as hold
# COUNTERPARTIES_FACTOR times the quantity: the last of them begins below it. Behind a cross position stands what is
# available, too, less what the account's other cross positions have lost.
COUNTERPARTIES = f"""
    WITH held AS (
        SELECT p.user_id, p.signed_quantity, p.entry_notional,
               p.margin + CASE WHEN p.margin_mode = 'CROSS' THEN greatest(0, coalesce(b.available - lost.amount, 0))
                          ELSE 0 END AS margin,
               p.signed_quantity * $2 - sign(p.signed_quantity) * p.entry_notional AS pnl,
               p.signed_quantity * $3 - sign(p.signed_quantity) * p.entry_notional AS pnl_there
        FROM positions.v_positions p JOIN matching.v_instruments i USING (instrument_id)
        LEFT JOIN ledger.v_balances b ON b.user_id = p.user_id AND b.asset = i.quote_asset
            AND p.margin_mode = 'CROSS'
        CROSS JOIN LATERAL (
            SELECT coalesce(sum(greatest(0, sign(o.signed_quantity) * o.entry_notional
                                            - o.signed_quantity * m.mark_price)), 0) AS amount
            FROM positions.v_positions o CROSS JOIN LATERAL (
                SELECT mark_price FROM market.v_mark_prices k WHERE k.instrument_id = o.instrument_id
                ORDER BY calculated_at DESC LIMIT 1) m
            WHERE p.margin_mode = 'CROSS' AND o.user_id = p.user_id AND o.margin_mode = 'CROSS'
              AND o.instrument_id <> p.instrument_id AND o.signed_quantity <> 0) lost
        WHERE p.instrument_id = $1 AND sign(p.signed_quantity) = $4 AND p.status = 'OPEN'),
    scored AS (
        SELECT *, {_SCORE.format(mark="$2")} AS score
        FROM held WHERE margin + pnl > 0 AND margin + pnl_there > 0 AND entry_notional > 0),
    ranked AS (
        SELECT *, sum(abs(signed_quantity)) OVER (ORDER BY score DESC, user_id) - abs(signed_quantity) AS before
        FROM scored)
    SELECT user_id, signed_quantity, entry_notional, margin FROM ranked WHERE before < $5
    ORDER BY score DESC, user_id LIMIT $6
"""
# How many positions on the same side rank before a user's, and how many there are: among some, if there are very many,
# since it is a hint to the user and not the order in which anybody is deleveraged.
QUEUE_POSITION = f"""
    WITH own AS (SELECT * FROM positions.v_positions WHERE user_id = $1 AND instrument_id = $2),
    side AS (
        SELECT *, signed_quantity * $3 - sign(signed_quantity) * entry_notional AS pnl
        FROM (SELECT * FROM own UNION ALL
              (SELECT p.* FROM positions.v_positions p JOIN own ON sign(p.signed_quantity) = sign(own.signed_quantity)
               WHERE p.instrument_id = $2 AND p.user_id <> $1 AND p.status = 'OPEN' LIMIT {SAMPLED_MAX})) found),
    scored AS (
        SELECT user_id, {_SCORE.format(mark="$3")} AS score
        FROM side WHERE margin + pnl > 0 AND entry_notional > 0)
    SELECT count(*) FILTER (WHERE score > (SELECT score FROM scored WHERE user_id = $1)) AS ahead, count(*) AS total
    FROM scored
"""

"""What a service publishes for the others to read. A service's SQL names its own tables and these views only."""

VIEWS: dict[str, str] = {
    "outbox.v_backlog": "SELECT count(*) AS messages, min(created_at) AS oldest FROM outbox.messages",
    "reporting.v_stream_positions": "SELECT topic, entry_id, entries FROM reporting.stream_positions",
    "users.v_users": "SELECT user_id, email, status, roles FROM users.users",
    "users.v_open_registrations": (
        "SELECT user_id, status, created_at FROM users.user_registration_prepare WHERE status <> 'COMPLETED'"
    ),
    # What orders claim of their users' margin, and amendments beside their orders (they are no orders more): notional
    # at the price at which margin is held, and the open loss (quote).
    "orders.v_claims": (
        "SELECT order_id, user_id, instrument_id, side, status, reduce_only, 1 AS orders,"
        " quantity - filled_quantity AS open_quantity,"
        " CASE WHEN reduce_only THEN 0 ELSE quantity - filled_quantity END AS quantity,"
        " CASE WHEN reduce_only THEN 0 ELSE (quantity - filled_quantity) * coalesce(margin_price, bound_price) END"
        "  AS notional,"
        " CASE WHEN reduce_only THEN 0 ELSE (quantity - filled_quantity) * open_loss END AS loss"
        " FROM orders.orders"
        " UNION ALL SELECT amendment_id, user_id, instrument_id, side, status, reduce_only, 0,"
        " open_quantity, claimed_quantity, claimed_notional, claimed_loss FROM orders.amendments"
    ),
    "orders.v_open_sagas": "SELECT workflow_id, kind, order_ids, created_at FROM orders.sagas WHERE NOT done",
    "orders.v_cursors": "SELECT instrument_id, applied_seq FROM orders.cursors",
    "risk.v_exposures": (
        "SELECT user_id, instrument_id, leverage, margin_mode, signed_quantity, entry_notional, bid_quantity,"
        " bid_notional, ask_quantity, ask_notional, bid_loss, ask_loss, order_margin, open_orders, pending_step,"
        " told_cover"
        " FROM risk.exposures"
    ),
    "risk.v_price_bands": "SELECT instrument_id, price_band FROM risk.risk_limits WHERE user_id IS NULL",
    "risk.v_open_liquidations": (
        "SELECT liquidation_id, status, created_at FROM risk.liquidation_queue"
        " WHERE status IN ('PENDING', 'PROCESSING')"
    ),
    "risk.v_steps": "SELECT step_id, result FROM risk.steps",
    "risk.v_cursors": "SELECT instrument_id, applied_seq FROM risk.cursors",
    "risk.v_leverage_tiers": (
        "SELECT instrument_id, tier, notional_from, max_leverage, maintenance_margin_rate, cumulative"
        " FROM risk.leverage_tiers"
    ),
    "risk.v_liquidations": (
        "SELECT liquidation_id, position_id, user_id, instrument_id, margin_mode, reason, status, created_at,"
        " updated_at FROM risk.liquidation_queue"
    ),
    "ledger.v_balances": "SELECT user_id, asset, available, reserved FROM ledger.ledger_balances",
    "ledger.v_journals": "SELECT reference_type, reference_id FROM ledger.journals",
    "ledger.v_margin_holds": (
        "SELECT user_id, instrument_id, asset, order_margin, position_margin, order_short, margin_version"
        " FROM ledger.margin_holds"
    ),
    "ledger.v_funding_runs": (
        "SELECT instrument_id, funding_time, rate, mark_price, status, collected_user_id, updated_at"
        " FROM ledger.funding_runs"
    ),
    "ledger.v_funding_cursors": "SELECT instrument_id, collected_at FROM ledger.funding_cursors",
    # What moved the money of a user because of an instrument; margin only moves between available and reserved.
    "ledger.v_results": (
        "SELECT user_id, instrument_id, asset, entry_type, delta_available + delta_reserved AS amount, created_at"
        " FROM ledger.ledger_entries WHERE user_id IS NOT NULL AND instrument_id IS NOT NULL"
        " AND delta_available + delta_reserved <> 0"
    ),
    "ledger.v_steps": "SELECT step_id, result FROM ledger.steps",
    "ledger.v_cursors": "SELECT instrument_id, applied_seq FROM ledger.cursors",
    "positions.v_positions": (
        "SELECT position_id, user_id, instrument_id, signed_quantity, entry_notional, margin, margin_version,"
        " realized_pnl, leverage, margin_mode, liquidation_price, warning_price, warned, told_price, status"
        " FROM positions.positions"
    ),
    "positions.v_fills": (
        "SELECT event_id, user_id, instrument_id, seq, role, trade_id, order_id, side, price, quantity, fee,"
        " realized_pnl, signed_quantity_after, entry_notional_after, leverage, open_loss, cause,"
        " created_at AS executed_at"
        " FROM positions.position_events WHERE trade_id IS NOT NULL"
    ),
    "positions.v_funding_positions": (
        "SELECT instrument_id, funding_time, user_id, payment FROM positions.funding_positions"
    ),
    "positions.v_funding_payments": (
        "SELECT instrument_id, funding_time, user_id, realized_pnl AS payment FROM positions.position_events"
        " WHERE funding_time IS NOT NULL"
    ),
    "positions.v_cursors": "SELECT instrument_id, applied_seq, confirmed_seq FROM positions.cursors",
    "market.v_mark_prices": "SELECT instrument_id, calculated_at, mark_price FROM market.mark_prices",
    "matching.v_instruments": "SELECT * FROM matching.instruments",
    "matching.v_events": "SELECT instrument_id, seq, command_seq, payload FROM matching.events",
    "matching.v_cursors": "SELECT instrument_id, command_seq, event_seq FROM matching.cursors",
    # How far the engine is behind its log, and settlement behind the engine.
    "matching.v_lags": (
        "SELECT c.instrument_id, s.last_seq - c.command_seq AS commands_behind,"
        " c.event_seq - coalesce(k.acked_seq, 0) AS events_behind, coalesce(k.acked_seq, 0) AS acked_seq,"
        " c.owner IS NOT NULL AND c.lease_until > clock_timestamp() AS owned"
        " FROM matching.cursors c JOIN matching.sequencers s USING (instrument_id)"
        " LEFT JOIN matching.consumers k ON k.instrument_id = c.instrument_id AND k.consumer = 'settlement'"
    ),
    "matching.v_trades": "SELECT * FROM matching.trade_tickers",
    "matching.v_deleveragings": "SELECT * FROM matching.deleveragings",
    "matching.v_pruned": "SELECT instrument_id, event_seq, trades, quantity, fees FROM matching.pruned",
    # Up to which trade the klines have counted.
    "market.v_kline_positions": (
        "SELECT instrument_id, max(last_seq) AS seq FROM market.kline_buckets"
        " WHERE period = '1d' GROUP BY instrument_id"
    ),
    "market.v_checkpoints": (
        "SELECT instrument_id, seq, sha256(payload) = checksum AS undamaged FROM market.checkpoints"
    ),
    "market.v_index_states": "SELECT instrument_id, source, checked_at, frozen_since FROM market.index_states",
    "market.v_funding_schedules": "SELECT instrument_id, interval_seconds, rate_cap FROM market.funding_schedules",
    "market.v_funding_rates": "SELECT instrument_id, effective_at, rate, mark_price FROM market.funding_rates",
}

"""Triggers in the exchange's database that write down what its tables forget: how things stood at each booking.

They also make funding dear: a rate that takes hours of premium to build up is put in the place of what a short interval
comes to, up to the cap that the market has published.
"""

from storage.db import Pool

_SETUP = """
CREATE SCHEMA witness;
CREATE TABLE witness.started AS SELECT now() AS at;
CREATE TABLE witness.ranges (
    tx bigint, instrument_id text, after_seq bigint, to_seq bigint, PRIMARY KEY (tx, instrument_id));
CREATE TABLE witness.holds (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, tx bigint, user_id bigint, instrument_id text,
    margin_mode text, margin_before numeric, margin_after numeric, orders_before numeric, orders_after numeric,
    short_before numeric, short_after numeric, at timestamptz);
CREATE TABLE witness.draws (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, tx bigint, reference_type text, reference_id text,
    user_id bigint, available numeric, holds jsonb, at timestamptz);

CREATE FUNCTION witness.see_range() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    INSERT INTO witness.ranges VALUES (
        pg_current_xact_id()::text::bigint, NEW.instrument_id, OLD.applied_seq, NEW.applied_seq);
    RETURN NULL;
END $$;
CREATE TRIGGER witness AFTER UPDATE ON ledger.cursors FOR EACH ROW EXECUTE FUNCTION witness.see_range();

CREATE FUNCTION witness.see_hold() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    INSERT INTO witness.holds (tx, user_id, instrument_id, margin_mode, margin_before, margin_after,
                               orders_before, orders_after, short_before, short_after, at)
    SELECT pg_current_xact_id()::text::bigint, NEW.user_id, NEW.instrument_id,
           coalesce((SELECT margin_mode FROM risk.exposures e
                     WHERE e.user_id = NEW.user_id AND e.instrument_id = NEW.instrument_id), 'ISOLATED'),
           CASE TG_OP WHEN 'UPDATE' THEN OLD.position_margin ELSE 0 END, NEW.position_margin,
           CASE TG_OP WHEN 'UPDATE' THEN OLD.order_margin ELSE 0 END, NEW.order_margin,
           CASE TG_OP WHEN 'UPDATE' THEN OLD.order_short ELSE 0 END, NEW.order_short, clock_timestamp();
    RETURN NULL;
END $$;
CREATE TRIGGER witness AFTER INSERT OR UPDATE ON ledger.margin_holds
    FOR EACH ROW EXECUTE FUNCTION witness.see_hold();

-- A draw is written down before balances and holds are: what this sees of them is what its user had before.
CREATE FUNCTION witness.see_draw() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    INSERT INTO witness.draws (tx, reference_type, reference_id, user_id, available, holds, at)
    SELECT pg_current_xact_id()::text::bigint, NEW.reference_type, NEW.reference_id, NEW.user_id, b.available,
           (SELECT jsonb_object_agg(e.instrument_id, jsonb_build_object(
                'mode', e.margin_mode, 'orders', coalesce(h.order_margin, 0)::text,
                'position', coalesce(h.position_margin, 0)::text, 'seq', c.applied_seq))
            FROM risk.exposures e JOIN ledger.cursors c USING (instrument_id)
            LEFT JOIN ledger.margin_holds h USING (user_id, instrument_id) WHERE e.user_id = NEW.user_id),
           clock_timestamp()
    FROM ledger.ledger_balances b WHERE b.user_id = NEW.user_id AND b.asset = NEW.asset;
    RETURN NULL;
END $$;
CREATE TRIGGER witness AFTER INSERT ON ledger.insurance_draws FOR EACH ROW EXECUTE FUNCTION witness.see_draw();

CREATE FUNCTION witness.dear_funding() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    NEW.rate := coalesce((SELECT round(rate_cap * (abs(hashtext(NEW.instrument_id || NEW.effective_at::text)) % 5 - 2)
        / 2, 12) FROM market.funding_schedules s WHERE s.instrument_id = NEW.instrument_id), NEW.rate);
    RETURN NEW;
END $$;
CREATE TRIGGER witness BEFORE INSERT ON market.funding_rates FOR EACH ROW EXECUTE FUNCTION witness.dear_funding();
"""


async def install(pool: Pool) -> None:
    """Put the witness into the database of an exchange, once."""
    await pool.execute(_SETUP)

"""What a liquidation sends to the engine: orders, and deleveraging of ranked counterparties."""

from decimal import Decimal

from activities.ledger.book import lock_money
from activities.liquidation.funding import less_funding
from activities.liquidation.rows import CounterpartyRow, RunningRow
from activities.liquidation.sql import COUNTERPARTIES
from activities.matching.instruments import Rules
from activities.matching.steps import append_commands
from activities.orders.acceptance import submit_liquidation_order
from activities.risk.exposures import lock_exposures, take_in_liquidation_order
from domain.clock import to_ms
from domain.instruments import Instrument
from domain.liquidation import Holding, deleverage_price, deleverage_score, worst_price
from domain.liquidation_saga import Plan, Submission
from domain.matching import Deleverage
from domain.money import ZERO
from storage.db import Connection
from storage.rows import column_list, read

# Counterparties are chosen for so many times the quantity, should some of them be gone when the engine comes to it.
COUNTERPARTIES_FACTOR = 2
COUNTERPARTIES_MAX = 500


async def submit_order(conn: Connection, submission: Submission, rules: Rules) -> bool:
    """Insert the order that was planned and append it to the engine's log; False if the liquidation is over."""
    row = await _lock_running(conn, submission.liquidation_id)
    if row is None:
        return False
    instrument = rules.instruments[row.instrument_id]
    holding, mark, closing = await _planned(conn, row, submission.plan)
    price = worst_price(
        holding,
        closing,
        mark,
        Decimal(submission.insurance),
        instrument.taker_fee_rate,
        instrument.tick_size,
        instrument.lot_size,
    )
    side = holding.closing_side
    await take_in_liquidation_order(conn, row.user_id, instrument.instrument_id, side, closing, price)
    seq = await submit_liquidation_order(conn, row.user_id, instrument, side, closing, price)
    await _remember_command(conn, submission.liquidation_id, seq)
    return True


async def submit_deleverage(conn: Connection, submission: Submission, rules: Rules) -> int:
    """Append a Deleverage against the ranked counterparties, if there are any; how many they are."""
    row = await _lock_running(conn, submission.liquidation_id)
    if row is None:
        return 0
    instrument = rules.instruments[row.instrument_id]
    holding, mark, closing = await _planned(conn, row, submission.plan)
    price = deleverage_price(holding, instrument.tick_size)
    counterparties = await _rank(conn, instrument, holding, mark, price, closing)
    if counterparties:
        command = Deleverage(
            at=to_ms(await conn.fetchval("SELECT now()")),
            user_id=row.user_id,
            side=holding.closing_side,
            price=instrument.price_to_ticks(price),
            quantity=instrument.quantity_to_lots(closing),
            counterparties=counterparties,
        )
        seqs = await append_commands(conn, {instrument.instrument_id: [command]})
        await _remember_command(conn, submission.liquidation_id, seqs[instrument.instrument_id])
    return len(counterparties)


async def _rank(
    conn: Connection, instrument: Instrument, holding: Holding, mark: Decimal, price: Decimal, closing: Decimal
) -> list[int]:
    """Who is deleveraged, first one first."""
    records = await conn.fetch(
        COUNTERPARTIES,
        instrument.instrument_id,
        mark,
        price,
        Decimal(-1 if holding.signed_quantity > 0 else 1),
        closing * COUNTERPARTIES_FACTOR,
        COUNTERPARTIES_MAX,
    )
    scores = {row.user_id: deleverage_score(row.holding, mark) for row in read(CounterpartyRow, records)}
    return sorted(scores, key=lambda user_id: (-scores[user_id], user_id))


async def _lock_running(conn: Connection, liquidation_id: int) -> RunningRow | None:
    record = await conn.fetchrow(
        f"SELECT {column_list(RunningRow)} FROM risk.liquidation_queue WHERE liquidation_id = $1"
        " AND status = 'PROCESSING' AND NOT stopping FOR UPDATE",
        liquidation_id,
    )
    return None if record is None else RunningRow(*record)


async def _remember_command(conn: Connection, liquidation_id: int, seq: int) -> None:
    await conn.execute(
        "UPDATE risk.liquidation_queue SET command_seq = $2, updated_at = now() WHERE liquidation_id = $1",
        liquidation_id,
        seq,
    )


async def _planned(conn: Connection, row: RunningRow, plan: Plan) -> tuple[Holding, Decimal, Decimal]:
    """The position, the mark price and how much to close, as planned, but with no more margin than there is now.

    A funding payment may have taken of it since. From here to the end of the transaction none does; then it waits for
    what is submitted here, as far as that counts on the same money (`margin_commands.await_liquidations`).
    """
    # Exposures come before balances wherever both are locked.
    await lock_exposures(conn, [(row.user_id, row.instrument_id)])
    available, orders, position = await lock_money(conn, row.user_id, row.instrument_id, plan.asset)
    is_cross = row.margin_mode == "CROSS"
    held = available + orders + position if is_cross else position
    margin = Decimal(plan.margin)
    if plan.money:
        gone = Decimal(plan.money) - await less_funding(conn, row.user_id, plan.asset, held, is_cross=is_cross)
        margin = max(ZERO, margin - max(ZERO, gone))
    holding = Holding(Decimal(plan.signed_quantity), Decimal(plan.entry_notional), margin)
    return holding, Decimal(plan.mark), Decimal(plan.closing)

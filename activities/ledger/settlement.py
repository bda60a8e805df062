"""Booking the fills of a range of engine events, and what users hold after them."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from decimal import Decimal

import asyncpg

from activities.ledger.accounts import CLEARING, FEES
from activities.ledger.book import (
    Book,
    Hold,
    draw_from,
    holds_of,
    lock_holds,
    open_book,
    set_hold,
    wallet_of,
    write_book,
)
from activities.ledger.insurance import Cause, post_insurance
from activities.ledger.margin import risk_step
from activities.ledger.margin_commands import tell_engine
from activities.risk.collateral import read_collateral
from domain.contracts.results import MarginMoves, settle_step
from domain.contracts.settlement import EventRange
from domain.events import FundsUnfrozen
from domain.funding import Holding, draw_margin_first
from domain.money import ZERO, plain
from domain.wallet import BookedFill, Settled, Wallet, keep_back, leave_to_user, return_margin, settle_fills
from storage.db import Connection

SETTLEMENT = "SETTLEMENT"
# What a loss in one instrument took of the margin that its cross account had in others.
CROSS_MARGIN = "CROSS_MARGIN"


async def settle_events(conn: Connection, events: EventRange) -> None:
    """Book the fills of a range, divide every touched wallet anew, and say who pays for whom."""
    instrument_id = events.instrument_id
    asset = await conn.fetchval(
        "SELECT quote_asset FROM matching.v_instruments WHERE instrument_id = $1", instrument_id
    )
    fills = await conn.fetch(
        "SELECT f.user_id, f.trade_id, f.side, f.price, f.quantity, f.realized_pnl, f.fee, f.signed_quantity_after,"
        " f.leverage, f.open_loss, f.cause, p.margin_mode FROM positions.v_fills f"
        " JOIN positions.v_positions p USING (user_id, instrument_id)"
        " WHERE f.instrument_id = $1 AND f.seq > $2 AND f.seq <= $3 ORDER BY f.seq, f.role",
        instrument_id,
        events.after_seq,
        events.to_seq,
    )
    risk = await risk_step(conn, settle_step(events), MarginMoves)
    assert risk is not None, f"Expected the margin moves of {events}, risk has not applied them"
    order_margins = {move.user_id: move.amount for move in risk.moves}
    users = sorted({row["user_id"] for row in fills} | order_margins.keys())
    book = await open_book(conn, ((user_id, asset) for user_id in users))
    holds = await lock_holds(conn, [(user_id, instrument_id, asset) for user_id in users])

    # Balances before the trades decide what can be held after them; the journals then say how it came about.
    booked: defaultdict[int, list[BookedFill]] = defaultdict(list)
    for row in fills:
        booked[row["user_id"]].append(_booked_fill(row))
    settled = {}
    for user_id in users:
        wallet = wallet_of(book.accounts[user_id, asset], holds[user_id, instrument_id])
        settled[user_id] = settle_fills(wallet, booked[user_id], order_margins.get(user_id, ZERO))
    crossed = {row["user_id"] for row in fills if row["margin_mode"] == "CROSS" and settled[row["user_id"]].insurance}
    draws = await _cross_draws(conn, {user_id: settled[user_id].insurance for user_id in crossed}, asset, instrument_id)
    for user_id, drawn in draws.items():
        wallet = wallet_of(book.accounts[user_id, asset], holds[user_id, instrument_id])
        wallet = replace(wallet, available=wallet.available + sum(draw.total for _, draw in drawn))
        settled[user_id] = settle_fills(wallet, booked[user_id], order_margins.get(user_id, ZERO))
    wallets = {user_id: wallet_of(book.accounts[user_id, asset], holds[user_id, instrument_id]) for user_id in users}
    await _keep_back(conn, asset, settled, wallets)
    await _keep_for_funding(conn, asset, settled)
    _post_trades(book, fills, asset, instrument_id)
    lowered = _post_cross_draws(book, f"{instrument_id}:{events.to_seq}", draws, holds)
    cause = Cause(SETTLEMENT, f"{instrument_id}:{events.to_seq}", instrument_id, asset)
    await post_insurance(conn, book, cause, settled, {r["user_id"] for r in fills if r["cause"] == "LIQUIDATION"})
    book.open_journal(SETTLEMENT, cause.reference_id)
    for user_id in users:
        set_hold(book, (user_id, instrument_id), holds[user_id, instrument_id], settled[user_id].wallet)
    book.events += [FundsUnfrozen(m.order_id, str(m.user_id), m.asset, plain(m.amount)) for m in risk.ended if m.amount]
    await write_book(conn, book, holds)
    for user_id in users:
        # The engine has booked the fills with all the margin that they should have got.
        if short := settled[user_id].margin_short:
            lowered[user_id, instrument_id] = -short
    if lowered:
        await tell_engine(conn, lowered)


async def uncovered_users(conn: Connection, instrument_id: str) -> list[int]:
    """Users whose open orders in an instrument are not covered in full, because a loss took the money."""
    rows = await conn.fetch(
        "SELECT user_id FROM ledger.margin_holds WHERE instrument_id = $1 AND order_short > 0 ORDER BY user_id",
        instrument_id,
    )
    return [row["user_id"] for row in rows]


async def _cross_draws(
    conn: Connection, short: Mapping[int, Decimal], asset: str, instrument_id: str
) -> dict[int, list[tuple[Hold, Holding]]]:
    """What cross accounts that are `short` (quote) in one instrument have in their others, as far as it is needed:
    margin of cross positions first, then what cross orders hold, which are cancelled for it."""
    if not short:
        return {}
    crossed = {
        (row["user_id"], row["instrument_id"])
        for row in await conn.fetch(
            "SELECT user_id, instrument_id FROM risk.v_exposures"
            " WHERE user_id = ANY($1) AND instrument_id <> $2 AND margin_mode = 'CROSS'",
            list(short),
            instrument_id,
        )
    }
    draws: dict[int, list[tuple[Hold, Holding]]] = {}
    for user_id, held in (await holds_of(conn, list(short), asset)).items():
        others = {name: hold for name, hold in held.items() if (user_id, name) in crossed}
        holdings = [Holding(name, hold.order_margin, hold.position_margin) for name, hold in others.items()]
        draws[user_id] = [(others[draw.instrument_id], draw) for draw in draw_margin_first(short[user_id], holdings)]
    return draws


def _post_cross_draws(
    book: Book,
    reference_id: str,
    draws: Mapping[int, Sequence[tuple[Hold, Holding]]],
    holds: dict[tuple[int, str], Hold],
) -> dict[tuple[int, str], Decimal]:
    """A journal of `draws`, which go to `holds`; by how much the margin of positions has changed (below 0)."""
    book.open_journal(CROSS_MARGIN, reference_id)
    lowered: dict[tuple[int, str], Decimal] = {}
    for user_id, drawn in sorted(draws.items()):
        for hold, draw in drawn:
            key = (user_id, draw.instrument_id)
            draw_from(book, key, hold, draw)
            holds[key] = hold
            if draw.position_margin:
                lowered[key] = -draw.position_margin
    return lowered


async def _keep_back(conn: Connection, asset: str, settled: dict[int, Settled], before: Mapping[int, Wallet]) -> None:
    """Let no fill move what a loss or funding stands on behind orders or a position.

    Closing a position makes orders that would only have reduced it need margin, and a sale far above its limit opens
    with more margin than was held for it: nobody has checked that either may.
    """
    taking = [user_id for user_id, s in settled.items() if _takes(s.wallet, before[user_id])]
    stands = await read_collateral(conn, taking)
    for user_id in taking:
        collateral = stands[user_id, asset]
        amount = collateral.available - collateral.free
        wallet = keep_back(settled[user_id].wallet, before[user_id].order_margin, amount)
        settled[user_id] = replace(settled[user_id], wallet=return_margin(wallet, before[user_id], amount))


def _takes(wallet: Wallet, before: Wallet) -> bool:
    """Whether more is held for orders than before, or for the position out of what was available."""
    grows = wallet.position_margin > before.position_margin and wallet.available < before.available
    return grows or wallet.order_margin > before.order_margin


async def _keep_for_funding(conn: Connection, asset: str, settled: dict[int, Settled]) -> None:
    """Let what a liquidation leaves to the insurance fund pay first for funding that its user owes and else lacks."""
    leaving = [user_id for user_id, s in settled.items() if s.surplus or s.liquidation_fee]
    stands = await read_collateral(conn, leaving)
    for user_id in leaving:
        before = settled[user_id]
        lacking = stands[user_id, asset].funding_owed - before.wallet.available - before.wallet.position_margin
        settled[user_id] = leave_to_user(before, max(ZERO, lacking))


def _post_trades(book: Book, fills: Sequence[asyncpg.Record], asset: str, instrument_id: str) -> None:
    forced = {row["trade_id"] for row in fills if row["cause"] == "LIQUIDATION"}
    trade_id = None
    for row in fills:
        if row["trade_id"] != trade_id:
            trade_id = row["trade_id"]
            book.open_journal("LIQUIDATION" if trade_id in forced else "TRADE", str(trade_id))
        user_id, pnl, fee = row["user_id"], row["realized_pnl"], row["fee"]
        if pnl:
            book.post_user(user_id, asset, "REALIZED_PNL", pnl, instrument_id=instrument_id)
            book.post_system(CLEARING, asset, "REALIZED_PNL", -pnl)
        if fee:
            book.post_user(user_id, asset, "FEE", -fee, instrument_id=instrument_id)
            book.post_system(FEES, asset, "FEE", fee)


def _booked_fill(row: asyncpg.Record) -> BookedFill:
    after: Decimal = row["signed_quantity_after"]
    return BookedFill(
        before=after - (row["quantity"] if row["side"] == "BUY" else -row["quantity"]),
        after=after,
        price=row["price"],
        leverage=row["leverage"],
        open_loss=row["open_loss"],
        realized_pnl=row["realized_pnl"],
        fee=row["fee"],
        is_liquidation=row["cause"] == "LIQUIDATION",
        is_cross=row["margin_mode"] == "CROSS",
    )

"""What is next in a liquidation."""

from dataclasses import replace
from decimal import Decimal

from activities.liquidation.accounts import Account, Marks, read_accounts
from activities.liquidation.funding import less_funding
from activities.liquidation.rows import SituationRow
from activities.liquidation.sql import SITUATION
from activities.matching.instruments import Rules
from domain.liquidation import insurance_needed, justifying_price, must_liquidate, quantity_to_close
from domain.liquidation_saga import Plan, PlanRequest
from domain.money import ZERO, plain
from storage.db import Connection


async def plan_next(conn: Connection, request: PlanRequest, marks: Marks, rules: Rules) -> Plan:
    """Weigh a liquidation by one snapshot: wait, close some of the position by an order or by deleveraging, or end."""
    record = await conn.fetchrow(SITUATION, request.liquidation_id)
    assert record is not None, f"Expected a liquidation {request.liquidation_id}, was none"
    row = SituationRow(**record)
    unfinished = _why_not_now(row)
    if unfinished is not None:
        return unfinished
    account = None
    if row.margin_mode == "CROSS":
        account = (await read_accounts(conn, marks, row.user_id))[row.user_id, row.quote_asset]
    standing = _why_it_stands(row, marks)
    if standing is not None:
        return _while_it_stands(account, standing)
    name = row.instrument_id
    mark, tiers = marks[name], rules.tiers[name]
    holding = row.holding if account is None else account.holding(name)
    held = row.margin if account is None else account.money(name)
    money = await less_funding(conn, row.user_id, row.quote_asset, held, is_cross=account is not None)
    is_due = must_liquidate(holding, mark, tiers) if account is None else account.is_due
    if not is_due:
        return Plan("DONE", "the position has recovered")
    instrument = rules.instruments[name]
    closing = quantity_to_close(holding, mark, tiers, instrument.lot_size)
    # Whether it is due goes by what is held; what may be lost goes by what funding leaves of that.
    holding = replace(holding, margin=max(ZERO, holding.margin - held + money))
    needed = insurance_needed(holding, closing, mark)
    if account is not None:
        # No more than the whole account is short of.
        needed = min(needed, max(ZERO, held - money - account.equity))
    fell_short = bool(request.after) and abs(holding.signed_quantity) > Decimal(request.target)
    return Plan(
        action="DELEVERAGE" if fell_short and request.after == "ORDER" else "ORDER",
        why=f"{plain(closing)} of {plain(abs(holding.signed_quantity))} at mark {plain(mark)}{_valued(account)}",
        signed_quantity=plain(holding.signed_quantity),
        entry_notional=plain(holding.entry_notional),
        margin=plain(holding.margin),
        mark=plain(mark),
        closing=plain(closing),
        asset=instrument.quote_asset,
        insurance=plain(needed),
        target=plain(abs(holding.signed_quantity) - closing),
        fell_short=fell_short,
        bankruptcy_price=plain(justifying_price(holding, closing, mark, needed)),
        money=plain(money),
    )


def _why_not_now(row: SituationRow) -> Plan | None:
    """The plan when there is nothing to weigh: something has to be waited for, or it is over."""
    reasons = [
        (row.unanswered or row.unbooked, "WAIT", "the engine and settlement have not answered yet"),
        (row.has_orders, "WAIT", "open orders of the user have not ended yet"),
        (row.status != "PROCESSING" or row.stopping, "DONE", "stopped"),
        (not row.signed_quantity, "DONE", "the position is closed"),
    ]
    return next((Plan(action, why) for applies, action, why in reasons if applies), None)


def _why_it_stands(row: SituationRow, marks: Marks) -> str | None:
    """Why nothing can be closed in the position's instrument now; None if something can."""
    if row.state != "TRADING":
        return f"{row.instrument_id} is {row.state}"
    return None if row.instrument_id in marks else "there is no live mark price"


def _while_it_stands(account: Account | None, why: str) -> Plan:
    """The plan when nothing can be closed in the position's instrument: it is kept only as long as that is of use."""
    if account is not None and not account.is_due:
        return Plan("DONE", f"the account has recovered: {why}")
    if account is not None and account.next_to_close() is not None:
        # The next look at the marks takes up what can be closed.
        return Plan("DONE", f"another position of the account is closed first: {why}")
    return Plan("PAUSE", why)


def _valued(account: Account | None) -> str:
    """What is not valued at a live mark, for people."""
    if account is None:
        return ""
    stale = [row for row in account.rows if row.instrument_id not in account.live]
    said = [f"{row.instrument_id} at {'entry' if row.mark is None else 'its last mark'}" for row in stale]
    return f", with {', '.join(said)}" if said else ""

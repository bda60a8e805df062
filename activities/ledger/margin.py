"""What is held for orders and positions at the word of risk: freezing, unfreezing, and moving margin."""

from decimal import Decimal
from typing import TypeVar

import msgspec

from activities.ledger.book import Hold, lock_holds, open_book, set_hold, wallet_of, write_book
from activities.ledger.margin_commands import await_engine, tell_engine
from activities.risk.collateral import free_collateral
from domain.events import FundsFrozen, FundsFrozenFailed, FundsUnfrozen
from domain.margin_changes import MarginChange, MarginMoved
from domain.money import ZERO, plain
from domain.sagas import Outcome, Refusal, StepRequest
from domain.steps import CheckResult, MarginMoves, MarginPlan
from domain.wallet import freeze, settle, settle_within
from storage.db import Connection

T = TypeVar("T")


async def freeze_funds(conn: Connection, request: StepRequest) -> Outcome:
    """Hold what the check of a step asked for, per user and instrument all or nothing."""
    check = await risk_step(conn, f"check:{request.step_id}", CheckResult)
    assert check is not None, f"Expected the check of {request.step_id}, was none"
    margins = check.passed
    needs: dict[tuple[int, str, str], Decimal] = {}
    for m in margins:
        key = (m.user_id, m.instrument_id, m.asset)
        needs[key] = needs.get(key, ZERO) + m.amount
    book = await open_book(conn, ((user_id, asset) for user_id, _, asset in needs))
    holds = await lock_holds(conn, list(needs))
    # Under the locks: since the check, another saga may have taken what a loss, or funding that is due, stands on.
    free = await free_collateral(conn, {user_id for (user_id, _, _), needed in needs.items() if needed > ZERO})
    book.open_journal("ORDERS", request.step_id)
    refused_keys = set()
    for (user_id, instrument_id, asset), needed in needs.items():
        hold, purse = holds[user_id, instrument_id], (user_id, asset)
        wallet = wallet_of(book.accounts[purse], hold)
        frozen = freeze(wallet, needed)
        leaves = ZERO if frozen is None else wallet.available - frozen.available
        if frozen is None or leaves > max(ZERO, free.get(purse, ZERO)):
            refused_keys.add((user_id, instrument_id))
        else:
            set_hold(book, (user_id, instrument_id), hold, frozen, "ORDER_MARGIN")
            free[purse] = free.get(purse, ZERO) - leaves
    passed = [m for m in margins if (m.user_id, m.instrument_id) not in refused_keys]
    failed = [m for m in margins if (m.user_id, m.instrument_id) in refused_keys]
    book.events += [FundsFrozen(m.order_id, str(m.user_id), m.asset, plain(m.amount)) for m in passed]
    book.events += [FundsFrozenFailed(m.order_id, str(m.user_id), m.asset, "INSUFFICIENT_FUNDS") for m in failed]
    await write_book(conn, book, holds)
    return Outcome([m.order_id for m in passed], [Refusal(m.order_id, "INSUFFICIENT_FUNDS") for m in failed])


async def unfreeze_funds(conn: Connection, request: StepRequest) -> None:
    """Bring holds in line with what risk released, and with what was never held."""
    check = await risk_step(conn, f"check:{request.step_id}", CheckResult)
    release = await risk_step(conn, f"release:{request.release_id}", MarginMoves)
    frozen = msgspec.json.decode(
        await conn.fetchval("SELECT result FROM ledger.steps WHERE step_id = $1", f"freeze:{request.step_id}"),
        type=Outcome,
    )
    assert check is not None
    assert release is not None
    never_held = {refusal.order_id for refusal in frozen.refused}.intersection(request.order_ids)
    changes: dict[tuple[int, str, str], Decimal] = {}
    for move in release.moves:
        key = (move.user_id, move.instrument_id, move.asset)
        changes[key] = changes.get(key, ZERO) + move.amount
    for margin in check.passed:
        if margin.order_id in never_held:
            key = (margin.user_id, margin.instrument_id, margin.asset)
            changes[key] = changes.get(key, ZERO) + margin.amount
    book = await open_book(conn, ((user_id, asset) for user_id, _, asset in changes))
    holds = await lock_holds(conn, sorted(changes))
    book.open_journal("ORDERS_RELEASED", request.release_id)
    for (user_id, instrument_id, asset), change in sorted(changes.items()):
        hold = holds[user_id, instrument_id]
        settled = settle(wallet_of(book.accounts[user_id, asset], hold), ZERO, hold.position_margin, change)
        set_hold(book, (user_id, instrument_id), hold, settled.wallet)
    book.events += [
        FundsUnfrozen(m.order_id, str(m.user_id), m.asset, plain(m.amount))
        for m in release.ended
        if m.order_id not in never_held
    ]
    await write_book(conn, book, holds)


async def move_margin(conn: Connection, change: MarginChange) -> MarginMoved:
    """Carry out what risk planned, as far as it still stands under the locks."""
    plan = await risk_step(conn, f"adjust:{change.change_id}", MarginPlan)
    assert plan is not None, f"Expected the plan of {change}, was none"
    key = (change.user_id, change.instrument_id)
    await await_engine(conn, change.instrument_id, plan.command_seq)
    book = await open_book(conn, [(change.user_id, plan.asset)])
    holds = await lock_holds(conn, [(*key, plan.asset)])
    wallet = wallet_of(book.accounts[change.user_id, plan.asset], holds[key])
    # Under the lock: what stands for a loss, or for funding that is due, does not move, whatever risk saw.
    free = max(ZERO, (await free_collateral(conn, [change.user_id]))[change.user_id, plan.asset])
    outdated = await _why_outdated(conn, key, plan, holds[key])
    if change.kind == "MARGIN":
        if outdated:
            return MarginMoved([outdated])
        if plan.position_delta > free:
            return MarginMoved(["INSUFFICIENT_FUNDS"])
    # A leverage is in force for what is opened later, whatever has become of the position it was planned for.
    margin = wallet.position_margin + (ZERO if outdated else plan.position_delta)
    moved = settle_within(wallet, free, margin, plan.order_delta)
    book.open_journal("MARGIN_CHANGE", change.change_id)
    added = moved.position_margin - wallet.position_margin
    set_hold(book, key, holds[key], moved)
    await write_book(conn, book, holds)
    if added > ZERO:
        await tell_engine(conn, {key: added})
    return MarginMoved(is_uncovered=moved.order_short > 0)


async def _why_outdated(conn: Connection, key: tuple[int, str], plan: MarginPlan, hold: Hold) -> str | None:
    """Why the position's margin is not to be moved as planned any more, or None."""
    if await _in_liquidation(conn, key):
        return "POSITION_IN_LIQUIDATION"
    # Something was traded, or taken by a loss, since. More margin does no harm to what is still open; less might, since
    # what can be done without was worked out for another position.
    is_changed = hold.margin_version != plan.margin_version
    return "POSITION_CHANGED" if is_changed and (plan.position_delta < ZERO or not hold.position_margin) else None


async def _in_liquidation(conn: Connection, key: tuple[int, str]) -> bool:
    """Whether a liquidation has taken the position over since the change was planned."""
    return bool(
        await conn.fetchval(
            "SELECT EXISTS (SELECT FROM risk.v_liquidations WHERE user_id = $1 AND instrument_id = $2"
            " AND status IN ('PENDING', 'PROCESSING'))",
            *key,
        )
    )


async def risk_step(conn: Connection, step_id: str, kind: type[T]) -> T | None:
    """What a step of risk has decided, None if it was not taken."""
    stored = await conn.fetchval("SELECT result FROM risk.v_steps WHERE step_id = $1", step_id)
    return None if stored is None else msgspec.json.decode(stored, type=kind)

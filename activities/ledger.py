"""The ledger service: double-entry bookkeeping of every movement of money.

A journal is named by (reference_type, reference_id), which can exist once. Its rows sum to zero per asset: a user's
row carries two postings (available and reserved), a system account's row one. Balances are updated in the same
transaction, from the same rows.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import TypeVar

import asyncpg
import msgspec
from temporalio import activity

from activities.collateral import free_collateral, read_collateral
from activities.cover import tell_covers_again
from activities.margin_commands import announce, await_engine, await_liquidations, read_announced, tell_engine
from domain.events import (
    BusinessEvent,
    FundsFrozen,
    FundsFrozenFailed,
    FundsUnfrozen,
    InsuranceFundRequired,
    LedgerEntryCreated,
)
from domain.funding import (
    CLOSE_FUNDING,
    FUNDING_PAGE,
    FUNDING_UNCOVERED,
    OPEN_FUNDING,
    SETTLE_FUNDING,
    Charge,
    FundingPage,
    FundingRun,
    FundingTotals,
    Holding,
    charge,
    draw_margin_first,
)
from domain.margin_changes import MOVE_MARGIN, MarginChange, MarginMoved
from domain.money import ZERO, plain, round_down
from domain.problems import Problem
from domain.sagas import FREEZE_FUNDS, SETTLE, UNFREEZE_FUNDS, EventRange, Outcome, Refusal, StepRequest, Uncovered
from domain.steps import CheckResult, MarginMoves, MarginPlan, settle_step
from domain.wallet import (
    BookedFill,
    Settled,
    Wallet,
    freeze,
    keep_back,
    leave_to_user,
    return_margin,
    settle,
    settle_fills,
    settle_within,
)
from storage import outbox
from storage.db import Connection, Pool, columns
from storage.once import NotYetError, advance_cursor, first_result, store_result
from storage.outbox import UserPush
from telemetry.alerts import INSURANCE_SHORTFALL, alert

T = TypeVar("T")

FEES = "exchange:fees"
INSURANCE_FUND = "exchange:insurance_fund"
CLEARING = "exchange:clearing"
DEPOSITS = "external:deposits"
FUNDING = "exchange:funding"
ROUNDING = "exchange:rounding"
# What the insurance fund could not pay: below zero as long as nobody has made it good.
SHORTFALL = "exchange:shortfall"
FUNDING_FEE = "FUNDING_FEE"
# No user id is greater.
ALL_USERS = 2**63 - 1
SETTLEMENT = "SETTLEMENT"
# What a loss in one instrument took of the margin that its cross account had in others.
CROSS_MARGIN = "CROSS_MARGIN"
INSURANCE = "INSURANCE_FUND"

ENTRY_COLUMNS = [
    "reference_type",
    "reference_id",
    "entry_type",
    "account",
    "user_id",
    "asset",
    "instrument_id",
    "delta_available",
    "delta_reserved",
    "balance_after",
]


@dataclass(slots=True)
class Account:
    """A user's balance in one asset while a batch is worked on."""

    available: Decimal = ZERO
    reserved: Decimal = ZERO


@dataclass(slots=True)
class Hold:
    """What is held for one instrument while a batch is worked on (see `domain.wallet.Wallet`)."""

    asset: str
    order_margin: Decimal = ZERO
    position_margin: Decimal = ZERO
    order_short: Decimal = ZERO
    # Counts the changes of `position_margin`: whoever copied it knows by this which one.
    margin_version: int = 0


@dataclass(slots=True)
class Book:
    """Journals being written, over balances that are locked: rows and balances cannot come apart."""

    accounts: dict[tuple[int, str], Account] = field(default_factory=dict)
    system: dict[tuple[str, str], Decimal] = field(default_factory=dict)
    journals: list[tuple[str, str]] = field(default_factory=list)
    entries: list[tuple[object, ...]] = field(default_factory=list)
    events: list[BusinessEvent] = field(default_factory=list)
    _reference: tuple[str, str] = ("", "")
    _sums: dict[str, Decimal] = field(default_factory=dict)

    def open_journal(self, reference_type: str, reference_id: str) -> None:
        """Start a journal; the rows that follow belong to it."""
        self.close_journal()
        self._reference = (reference_type, reference_id)
        self.journals.append(self._reference)

    def close_journal(self) -> None:
        """Raises AssertionError when the open journal does not sum to zero in every asset."""
        assert not any(self._sums.values()), f"Expected journal {self._reference} to sum to 0, was {self._sums}"
        self._sums.clear()

    def post_user(
        self,
        user_id: int,
        asset: str,
        entry_type: str,
        available: Decimal,
        reserved: Decimal = ZERO,
        instrument_id: str | None = None,
    ) -> None:
        """One row of a user: what `available` and `reserved` change by."""
        account = self.accounts[user_id, asset]
        account.available += available
        account.reserved += reserved
        self._sums[asset] = self._sums.get(asset, ZERO) + available + reserved
        self.entries.append(
            (
                *self._reference,
                entry_type,
                f"user:{user_id}",
                user_id,
                asset,
                instrument_id,
                available,
                reserved,
                account.available,
            )
        )
        self.events.append(
            LedgerEntryCreated(
                str(user_id),
                instrument_id,
                asset,
                plain(available),
                plain(reserved),
                plain(account.available),
                entry_type,
                *self._reference,
            )
        )

    def post_system(self, account: str, asset: str, entry_type: str, amount: Decimal) -> None:
        """One row of a system account; no running balance, since all instruments book on these at the same time."""
        self.system[account, asset] = self.system.get((account, asset), ZERO) + amount
        self._sums[asset] = self._sums.get(asset, ZERO) + amount
        self.entries.append((*self._reference, entry_type, account, None, asset, None, amount, ZERO, None))


@dataclass(frozen=True, slots=True)
class Cause:
    """What makes users need the insurance fund, or pay to it: SETTLEMENT or FUNDING_FEE, and in what."""

    reference_type: str
    reference_id: str
    instrument_id: str
    asset: str


@dataclass(frozen=True, slots=True)
class Untold:
    """Nothing was paid: the engine had to be told first."""


class LedgerActivities:
    """Activities on the ledger service's own tables."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    @activity.defn(name=FREEZE_FUNDS)
    async def freeze_funds(self, request: StepRequest) -> Outcome:
        """Hold the margin that the check of the same step asked for: per user and instrument, all or nothing."""
        step_id = f"freeze:{request.step_id}"
        async with self._pool.acquire() as conn, conn.transaction():
            done = await first_result(conn, "ledger", step_id, Outcome)
            if done is None:
                done = await _freeze(conn, request)
                await store_result(conn, "ledger", step_id, done)
        return done

    @activity.defn(name=UNFREEZE_FUNDS)
    async def unfreeze_funds(self, request: StepRequest) -> None:
        """Compensation of `freeze_funds`, after `risk.release_orders` of the same step: bring holds in line."""
        step_id = f"unfreeze:{request.release_id}"
        async with self._pool.acquire() as conn, conn.transaction():
            if await first_result(conn, "ledger", step_id, Outcome) is None:
                await _unfreeze(conn, request)
                await store_result(conn, "ledger", step_id, Outcome(request.order_ids))

    @activity.defn(name=MOVE_MARGIN)
    async def move_margin(self, change: MarginChange) -> MarginMoved:
        """Carry out what risk planned for a change of margin or leverage; more margin than is available is refused."""
        # Named as a freeze: later checks of the user wait for it as for one.
        step_id = f"freeze:{change.change_id}"
        async with self._pool.acquire() as conn, conn.transaction():
            done = await first_result(conn, "ledger", step_id, MarginMoved)
            if done is None:
                done = await _move_margin(conn, change)
                await store_result(conn, "ledger", step_id, done)
        return done

    @activity.defn(name=SETTLE)
    async def settle(self, events: EventRange) -> list[int]:
        """Book the fills of a range of engine events and divide every touched wallet anew.

        Answers the users whose open orders are no longer covered in full, because a loss took the money.
        """
        async with self._pool.acquire() as conn, conn.transaction():
            if await advance_cursor(conn, "ledger", events):
                await _settle(conn, events)
            rows = await conn.fetch(
                "SELECT user_id FROM ledger.margin_holds WHERE instrument_id = $1 AND order_short > 0 ORDER BY user_id",
                events.instrument_id,
            )
        return [row["user_id"] for row in rows]

    @activity.defn(name=OPEN_FUNDING)
    async def open_funding(self, run: FundingRun) -> bool:
        """Fix the rate and the price of a funding settlement; False when it was done before.

        Raises NotYetError while the market has published none for that time (it does not while its index is frozen).
        """
        async with self._pool.acquire() as conn, conn.transaction():
            return await _open_funding(conn, run)

    @activity.defn(name=SETTLE_FUNDING)
    async def settle_funding(self, page: FundingPage) -> int | None:
        """Book a page of payments, once; where the next page starts, None when there is none.

        Raises NotYetError while the engine has not carried out, or settlement not finished with, what the payments wait
        for: what they take of margins, which it is told here, and orders of liquidations that count on the same money.
        """
        async with self._pool.acquire() as conn, conn.transaction():
            settled = await _settle_funding(conn, page)
        if isinstance(settled, Untold):
            # What was told stays told: this comes after the transaction.
            raise NotYetError(f"The engine is told what the page after {page.after_user_id} takes of margins")
        return settled

    @activity.defn(name=FUNDING_UNCOVERED)
    async def funding_uncovered(self, page: FundingPage) -> list[Uncovered]:
        """Whose open orders, by instrument, are no longer covered in full after a page: their money paid for it."""
        async with self._pool.acquire() as conn:
            return await _funding_uncovered(conn, page)

    @activity.defn(name=CLOSE_FUNDING)
    async def close_funding(self, run: FundingRun) -> FundingTotals:
        """After the last page: what rounding left over goes to its account."""
        async with self._pool.acquire() as conn, conn.transaction():
            return await _close_funding(conn, run)


async def _freeze(conn: Connection, request: StepRequest) -> Outcome:
    check = await _risk_step(conn, f"check:{request.step_id}", CheckResult)
    assert check is not None, f"Expected the check of {request.step_id}, was none"
    margins = check.passed
    needs: dict[tuple[int, str, str], Decimal] = {}
    for m in margins:
        key = (m.user_id, m.instrument_id, m.asset)
        needs[key] = needs.get(key, ZERO) + m.amount
    book = await _open_book(conn, ((user_id, asset) for user_id, _, asset in needs))
    holds = await _lock_holds(conn, list(needs))
    # Under the locks: since the check, another saga may have taken what a loss, or funding that is due, stands on.
    free = await free_collateral(conn, {user_id for (user_id, _, _), needed in needs.items() if needed > ZERO})
    book.open_journal("ORDERS", request.step_id)
    refused_keys = set()
    for (user_id, instrument_id, asset), needed in needs.items():
        hold, purse = holds[user_id, instrument_id], (user_id, asset)
        wallet = _wallet(book.accounts[purse], hold)
        frozen = freeze(wallet, needed)
        leaves = ZERO if frozen is None else wallet.available - frozen.available
        if frozen is None or leaves > max(ZERO, free.get(purse, ZERO)):
            refused_keys.add((user_id, instrument_id))
        else:
            _move(book, (user_id, instrument_id), hold, frozen, "ORDER_MARGIN")
            free[purse] = free.get(purse, ZERO) - leaves
    passed = [m for m in margins if (m.user_id, m.instrument_id) not in refused_keys]
    failed = [m for m in margins if (m.user_id, m.instrument_id) in refused_keys]
    book.events += [FundsFrozen(m.order_id, str(m.user_id), m.asset, plain(m.amount)) for m in passed]
    book.events += [FundsFrozenFailed(m.order_id, str(m.user_id), m.asset, "INSUFFICIENT_FUNDS") for m in failed]
    await write_book(conn, book, holds)
    return Outcome([m.order_id for m in passed], [Refusal(m.order_id, "INSUFFICIENT_FUNDS") for m in failed])


async def _unfreeze(conn: Connection, request: StepRequest) -> None:
    check = await _risk_step(conn, f"check:{request.step_id}", CheckResult)
    release = await _risk_step(conn, f"release:{request.release_id}", MarginMoves)
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
    book = await _open_book(conn, ((user_id, asset) for user_id, _, asset in changes))
    holds = await _lock_holds(conn, sorted(changes))
    book.open_journal("ORDERS_RELEASED", request.release_id)
    for (user_id, instrument_id, asset), change in sorted(changes.items()):
        hold = holds[user_id, instrument_id]
        settled = settle(_wallet(book.accounts[user_id, asset], hold), ZERO, hold.position_margin, change)
        _move(book, (user_id, instrument_id), hold, settled.wallet)
    book.events += [
        FundsUnfrozen(m.order_id, str(m.user_id), m.asset, plain(m.amount))
        for m in release.ended
        if m.order_id not in never_held
    ]
    await write_book(conn, book, holds)


async def _move_margin(conn: Connection, change: MarginChange) -> MarginMoved:
    plan = await _risk_step(conn, f"adjust:{change.change_id}", MarginPlan)
    assert plan is not None, f"Expected the plan of {change}, was none"
    key = (change.user_id, change.instrument_id)
    await await_engine(conn, change.instrument_id, plan.command_seq)
    book = await _open_book(conn, [(change.user_id, plan.asset)])
    holds = await _lock_holds(conn, [(*key, plan.asset)])
    wallet = _wallet(book.accounts[change.user_id, plan.asset], holds[key])
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
    _move(book, key, holds[key], moved)
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


async def _settle(conn: Connection, events: EventRange) -> None:
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
    risk = await _risk_step(conn, settle_step(events), MarginMoves)
    assert risk is not None, f"Expected the margin moves of {events}, risk has not applied them"
    order_margins = {move.user_id: move.amount for move in risk.moves}
    users = sorted({row["user_id"] for row in fills} | order_margins.keys())
    book = await _open_book(conn, ((user_id, asset) for user_id in users))
    holds = await _lock_holds(conn, [(user_id, instrument_id, asset) for user_id in users])

    # Balances before the trades decide what can be held after them; the journals then say how it came about.
    booked: defaultdict[int, list[BookedFill]] = defaultdict(list)
    for row in fills:
        booked[row["user_id"]].append(_booked_fill(row))
    settled = {}
    for user_id in users:
        wallet = _wallet(book.accounts[user_id, asset], holds[user_id, instrument_id])
        settled[user_id] = settle_fills(wallet, booked[user_id], order_margins.get(user_id, ZERO))
    crossed = {row["user_id"] for row in fills if row["margin_mode"] == "CROSS" and settled[row["user_id"]].insurance}
    draws = await _cross_draws(conn, {user_id: settled[user_id].insurance for user_id in crossed}, asset, instrument_id)
    for user_id, drawn in draws.items():
        wallet = _wallet(book.accounts[user_id, asset], holds[user_id, instrument_id])
        wallet = replace(wallet, available=wallet.available + sum(draw.total for _, draw in drawn))
        settled[user_id] = settle_fills(wallet, booked[user_id], order_margins.get(user_id, ZERO))
    wallets = {user_id: _wallet(book.accounts[user_id, asset], holds[user_id, instrument_id]) for user_id in users}
    await _keep_back(conn, asset, settled, wallets)
    await _keep_for_funding(conn, asset, settled)
    _post_trades(book, fills, asset, instrument_id)
    lowered = _post_cross_draws(book, f"{instrument_id}:{events.to_seq}", draws, holds)
    cause = Cause(SETTLEMENT, f"{instrument_id}:{events.to_seq}", instrument_id, asset)
    await _post_insurance(conn, book, cause, settled, {r["user_id"] for r in fills if r["cause"] == "LIQUIDATION"})
    book.open_journal(SETTLEMENT, cause.reference_id)
    for user_id in users:
        _move(book, (user_id, instrument_id), holds[user_id, instrument_id], settled[user_id].wallet)
    book.events += [FundsUnfrozen(m.order_id, str(m.user_id), m.asset, plain(m.amount)) for m in risk.ended if m.amount]
    await write_book(conn, book, holds)
    for user_id in users:
        # The engine has booked the fills with all the margin that they should have got.
        if short := settled[user_id].margin_short:
            lowered[user_id, instrument_id] = -short
    if lowered:
        await tell_engine(conn, lowered)


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
    for user_id, held in (await _holds_of(conn, list(short), asset)).items():
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
            _draw(book, key, hold, draw)
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


async def _open_funding(conn: Connection, run: FundingRun) -> bool:
    await conn.execute(
        "INSERT INTO ledger.funding_runs (instrument_id, funding_time, asset, rate, mark_price)"
        " SELECT r.instrument_id, r.effective_at, i.quote_asset, r.rate, r.mark_price FROM market.v_funding_rates r"
        " JOIN matching.v_instruments i USING (instrument_id) WHERE instrument_id = $1 AND r.effective_at = $2"
        " ON CONFLICT DO NOTHING",
        run.instrument_id,
        run.time,
    )
    status = await conn.fetchval(
        "SELECT status FROM ledger.funding_runs WHERE instrument_id = $1 AND funding_time = $2",
        run.instrument_id,
        run.time,
    )
    if status is None:
        raise NotYetError(f"The market has no funding rate of {run.instrument_id} at {run.funding_time} yet")
    return bool(status == "OPEN")


async def _settle_funding(conn: Connection, page: FundingPage) -> int | Untold | None:
    run = page.run
    asset = await conn.fetchval(
        "SELECT asset FROM ledger.funding_runs WHERE instrument_id = $1 AND funding_time = $2",
        run.instrument_id,
        run.time,
    )
    rows = await conn.fetch(
        "SELECT user_id, payment FROM positions.v_funding_positions"
        " WHERE instrument_id = $1 AND funding_time = $2 AND user_id > $3 ORDER BY user_id LIMIT $4",
        run.instrument_id,
        run.time,
        page.after_user_id,
        FUNDING_PAGE,
    )
    payments = [(row[0], row[1]) for row in rows if row[1]]
    if payments and not await _book_funding(conn, page, asset, payments):
        return Untold()
    next_user_id: int | None = rows[-1][0] if len(rows) == FUNDING_PAGE else None
    # In the transaction that books the page: no payment counts as owed and as paid, or as neither.
    await conn.execute(
        "UPDATE ledger.funding_runs SET collected_user_id = greatest(collected_user_id, $3)"
        " WHERE instrument_id = $1 AND funding_time = $2",
        run.instrument_id,
        run.time,
        ALL_USERS if next_user_id is None else next_user_id,
    )
    return next_user_id


async def _book_funding(
    conn: Connection, page: FundingPage, asset: str, payments: Sequence[tuple[int, Decimal]]
) -> bool:
    """Book the payments of a page, once; False when nothing is paid yet, as the engine had to be told of it first."""
    run, reference_id = page.run, f"{page.run.reference}:{page.after_user_id}"
    book = await _open_book(conn, ((user_id, asset) for user_id, _ in payments))
    # Asked for under the locks: a repeat that runs at the same time waits for them and then sees the journal.
    if await conn.fetchval(
        "SELECT EXISTS (SELECT FROM ledger.journals WHERE reference_type = $1 AND reference_id = $2)",
        FUNDING_FEE,
        reference_id,
    ):
        return True
    payers = {user_id: -payment for user_id, payment in payments if payment < ZERO}
    # All that is held for whom what is available does not do: it is locked with the balances.
    short = [user_id for user_id, owed in payers.items() if owed > book.accounts[user_id, asset].available]
    holds = await _holds_of(conn, short, asset)
    sources = {
        user_id: _source(owed, book.accounts[user_id, asset].available, run.instrument_id, holds.get(user_id, {}))
        for user_id, owed in payers.items()
    }
    lowered = {
        (user_id, draw.instrument_id): draw.position_margin
        for user_id, source in sources.items()
        for draw in source.draws
        if draw.position_margin
    }
    announced = await read_announced(conn, reference_id)
    if untold := announced.beyond(lowered):
        await announce(conn, reference_id, announced.times, untold)
        return False
    for instrument_id, command_seq in sorted(announced.command_seqs.items()):
        await await_engine(conn, instrument_id, command_seq)
    await await_liquidations(conn, payers, lowered)
    touched: dict[tuple[int, str], Hold] = {}
    book.open_journal(FUNDING_FEE, reference_id)
    for user_id, payment in payments:
        for draw in sources[user_id].draws if payment < ZERO else ():
            touched[user_id, draw.instrument_id] = hold = holds[user_id][draw.instrument_id]
            _draw(book, (user_id, draw.instrument_id), hold, draw)
        book.post_user(user_id, asset, "FUNDING", payment, instrument_id=run.instrument_id)
    paid = sum(payers.values(), ZERO)
    received = sum((payment for _, payment in payments if payment > ZERO), ZERO)
    if paid != received:
        book.post_system(FUNDING, asset, "FUNDING", paid - received)
    drawn = {user_id: Settled(Wallet(), source.insurance) for user_id, source in sources.items()}
    await _post_insurance(conn, book, Cause(FUNDING_FEE, reference_id, run.instrument_id, asset), drawn)
    await conn.execute(
        "UPDATE ledger.funding_runs SET paid = paid + $3, received = received + $4, insurance = insurance + $5,"
        " updated_at = now() WHERE instrument_id = $1 AND funding_time = $2",
        run.instrument_id,
        run.time,
        paid,
        received,
        sum((source.insurance for source in sources.values()), ZERO),
    )
    await write_book(conn, book, touched)
    # What was announced and is not needed, as other money has come in since, backs the position again.
    if spared := announced.spared(lowered):
        await tell_engine(conn, spared)
    return True


def _source(owed: Decimal, available: Decimal, instrument_id: str, held: Mapping[str, Hold]) -> Charge:
    holdings = [Holding(name, hold.order_margin, hold.position_margin) for name, hold in held.items()]
    return charge(owed, available, instrument_id, holdings)


async def _funding_uncovered(conn: Connection, page: FundingPage) -> list[Uncovered]:
    rows = await conn.fetch(
        "SELECT h.instrument_id, h.user_id FROM ledger.margin_holds h JOIN (SELECT user_id, payment"
        "   FROM positions.v_funding_positions WHERE instrument_id = $1 AND funding_time = $2 AND user_id > $3"
        "   ORDER BY user_id LIMIT $4) paid USING (user_id)"
        " WHERE h.order_short > 0 AND paid.payment < 0 ORDER BY 1, 2",
        page.run.instrument_id,
        page.run.time,
        page.after_user_id,
        FUNDING_PAGE,
    )
    users: defaultdict[str, list[int]] = defaultdict(list)
    for row in rows:
        users[row["instrument_id"]].append(row["user_id"])
    return [Uncovered(instrument_id, user_ids) for instrument_id, user_ids in users.items()]


def _draw(book: Book, key: tuple[int, str], hold: Hold, draw: Holding) -> None:
    """Release what a payment takes of a hold. What orders require stays: they are uncovered, and cancelled for it."""
    hold.order_margin -= draw.order_margin
    hold.order_short += draw.order_margin
    hold.position_margin -= draw.position_margin
    hold.margin_version += draw.position_margin > ZERO
    taken = draw.total
    book.post_user(key[0], hold.asset, "MARGIN", taken, -taken, key[1])


async def _holds_of(conn: Connection, user_ids: Sequence[int], asset: str) -> dict[int, dict[str, Hold]]:
    """All holds of users in one asset, by instrument; their balances are locked already, which locks these too."""
    holds: defaultdict[int, dict[str, Hold]] = defaultdict(dict)
    if user_ids:
        for row in await conn.fetch(
            "SELECT * FROM ledger.margin_holds WHERE user_id = ANY($1) AND asset = $2", user_ids, asset
        ):
            holds[row["user_id"]][row["instrument_id"]] = _hold(row)
    return holds


async def _close_funding(conn: Connection, run: FundingRun) -> FundingTotals:
    row = await conn.fetchrow(
        "SELECT asset, status, paid, received FROM ledger.funding_runs"
        " WHERE instrument_id = $1 AND funding_time = $2 FOR UPDATE",
        run.instrument_id,
        run.time,
    )
    assert row is not None, f"Expected {run} to be open"
    if row["status"] == "OPEN":
        dust = row["paid"] - row["received"]
        if dust:
            book = Book()
            book.open_journal(FUNDING_FEE, f"{run.reference}:rounding")
            book.post_system(FUNDING, row["asset"], "ROUNDING", -dust)
            book.post_system(ROUNDING, row["asset"], "ROUNDING", dust)
            await write_book(conn, book, {})
        await conn.execute(
            "UPDATE ledger.funding_runs r SET status = 'DONE', updated_at = now(), positions = (SELECT count(*)"
            "  FROM positions.v_funding_positions p WHERE (p.instrument_id, p.funding_time) = ($1, $2))"
            " WHERE r.instrument_id = $1 AND r.funding_time = $2",
            run.instrument_id,
            run.time,
        )
        await _advance_funding(conn, run.instrument_id)
    totals = await conn.fetchrow(
        "SELECT positions, paid, received, insurance FROM ledger.funding_runs"
        " WHERE instrument_id = $1 AND funding_time = $2",
        run.instrument_id,
        run.time,
    )
    assert totals is not None
    return FundingTotals(totals["positions"], *(plain(totals[name]) for name in ("paid", "received", "insurance")))


async def _advance_funding(conn: Connection, instrument_id: str) -> None:
    """Move on to the last settled funding time before which no published rate is unsettled."""
    await conn.execute(
        "INSERT INTO ledger.funding_cursors AS c (instrument_id, collected_at)"
        " SELECT $1, settled.at FROM (SELECT max(funding_time) AS at FROM ledger.funding_runs"
        "   WHERE instrument_id = $1 AND status = 'DONE' AND funding_time < coalesce("
        "     (SELECT min(r.effective_at) FROM market.v_funding_rates r"
        "      LEFT JOIN ledger.funding_runs u ON u.instrument_id = r.instrument_id AND u.funding_time = r.effective_at"
        "      WHERE r.instrument_id = $1 AND u.status IS DISTINCT FROM 'DONE' AND r.effective_at > coalesce("
        "        (SELECT collected_at FROM ledger.funding_cursors WHERE instrument_id = $1), '-infinity')),"
        "     'infinity')) settled WHERE settled.at IS NOT NULL"
        " ON CONFLICT (instrument_id) DO UPDATE SET collected_at = greatest(c.collected_at, excluded.collected_at)",
        instrument_id,
    )


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


async def _post_insurance(
    conn: Connection, book: Book, cause: Cause, settled: Mapping[int, Settled], liquidated: Collection[int] = ()
) -> None:
    """A journal of what the insurance fund gave to users and got from them.

    The fund gives no more than it has; what is missing the account SHORTFALL gives, and an operator is called. Each
    draw is written down with the liquidation that justifies it, which only those who are `liquidated` have.
    """
    asset, instrument_id = cause.asset, cause.instrument_id
    book.open_journal(INSURANCE, cause.reference_id)
    for user_id, of_user in settled.items():
        for entry_type, amount in (
            ("LIQUIDATION_FEE", of_user.liquidation_fee),
            ("LIQUIDATION_SURPLUS", of_user.surplus),
        ):
            _between(book, user_id, INSURANCE_FUND, cause, entry_type, -amount)
    draws = {user_id: of_user.insurance for user_id, of_user in settled.items() if of_user.insurance}
    if not draws:
        return
    left = await _lock_fund(conn, asset) + book.system.get((INSURANCE_FUND, asset), ZERO)
    for user_id, amount in draws.items():
        given = min(amount, max(ZERO, left))
        left -= given
        _between(book, user_id, INSURANCE_FUND, cause, "INSURANCE_FUND", given)
        _between(book, user_id, SHORTFALL, cause, "SHORTFALL", amount - given)
        book.events.append(InsuranceFundRequired(str(user_id), instrument_id, asset, plain(amount)))
        if given < amount:
            alert(INSURANCE_SHORTFALL, "insurance fund lacks %s %s for user %d", plain(amount - given), asset, user_id)
    await _write_draws(conn, cause, draws, liquidated)


def _between(book: Book, user_id: int, account: str, cause: Cause, entry_type: str, amount: Decimal) -> None:
    """Give `amount` from a system account to a user; below zero the other way."""
    if amount:
        book.post_user(user_id, cause.asset, entry_type, amount, instrument_id=cause.instrument_id)
        book.post_system(account, cause.asset, entry_type, -amount)


async def _lock_fund(conn: Connection, asset: str) -> Decimal:
    """What the insurance fund has, locked; so are the accounts that `write_book` locks before it."""
    rows = await conn.fetch(
        "SELECT account, balance FROM ledger.system_balances WHERE account <= $1 AND asset = $2"
        " ORDER BY account FOR UPDATE",
        INSURANCE_FUND,
        asset,
    )
    return sum((row["balance"] for row in rows if row["account"] == INSURANCE_FUND), ZERO)


async def _write_draws(
    conn: Connection, cause: Cause, draws: Mapping[int, Decimal], liquidated: Collection[int]
) -> None:
    await conn.execute(
        "INSERT INTO ledger.insurance_draws (reference_type, reference_id, user_id, instrument_id, asset, amount,"
        " liquidation_id, round, mark_price, bankruptcy_price)"
        " SELECT $1, $2, d.user_id, $3, $4, d.amount, q.liquidation_id, k.round, k.mark_price, k.bankruptcy_price"
        " FROM unnest($5::bigint[], $6::numeric[]) AS d (user_id, amount)"
        " LEFT JOIN risk.v_liquidations q ON q.user_id = d.user_id AND q.instrument_id = $3"
        "   AND q.status = 'PROCESSING' AND q.user_id = ANY($7::bigint[])"
        " LEFT JOIN LATERAL (SELECT round, mark_price, bankruptcy_price FROM ledger.insurance_claims c"
        "   WHERE c.liquidation_id = q.liquidation_id ORDER BY round DESC LIMIT 1) k ON TRUE",
        cause.reference_type,
        cause.reference_id,
        cause.instrument_id,
        cause.asset,
        list(draws),
        list(draws.values()),
        list(liquidated),
    )


def _move(book: Book, key: tuple[int, str], hold: Hold, wallet: Wallet, entry_type: str = "MARGIN") -> None:
    """Post what `wallet` holds more or less than `hold`, and make the hold equal to it."""
    change = wallet.reserved - hold.order_margin - hold.position_margin
    if change:
        book.post_user(key[0], hold.asset, entry_type, -change, change, key[1])
    hold.margin_version += wallet.position_margin != hold.position_margin
    hold.order_margin, hold.position_margin = wallet.order_margin, wallet.position_margin
    hold.order_short = wallet.order_short


def _wallet(account: Account, hold: Hold) -> Wallet:
    return Wallet(account.available, hold.order_margin, hold.position_margin, hold.order_short)


async def _risk_step(conn: Connection, step_id: str, kind: type[T]) -> T | None:
    stored = await conn.fetchval("SELECT result FROM risk.v_steps WHERE step_id = $1", step_id)
    return None if stored is None else msgspec.json.decode(stored, type=kind)


async def _open_book(conn: Connection, owners: Iterable[tuple[int, str]]) -> Book:
    """A book over the balances of `owners`, created when missing and locked in (user, asset) order."""
    rows = sorted(set(owners))
    await conn.execute(
        "INSERT INTO ledger.ledger_balances (user_id, asset) SELECT * FROM unnest($1::bigint[], $2::text[])"
        " ON CONFLICT DO NOTHING",
        *columns(rows, 2),
    )
    balances = await conn.fetch(
        "SELECT b.user_id, b.asset, b.available, b.reserved FROM ledger.ledger_balances b"
        " JOIN unnest($1::bigint[], $2::text[]) AS k (user_id, asset) USING (user_id, asset)"
        " ORDER BY b.user_id, b.asset FOR UPDATE OF b",
        *columns(rows, 2),
    )
    return Book({(row[0], row[1]): Account(row[2], row[3]) for row in balances})


async def lock_money(
    conn: Connection, user_id: int, instrument_id: str, asset: str
) -> tuple[Decimal, Decimal, Decimal]:
    """What of a user's money is available, and held for orders and for the position in an instrument (quote), locked
    until the caller's transaction ends: a liquidation counts on it (see `margin_commands.await_liquidations`)."""
    book = await _open_book(conn, [(user_id, asset)])
    hold = (await _lock_holds(conn, [(user_id, instrument_id, asset)]))[user_id, instrument_id]
    return book.accounts[user_id, asset].available, hold.order_margin, hold.position_margin


async def _lock_holds(conn: Connection, keys: Sequence[tuple[int, str, str]]) -> dict[tuple[int, str], Hold]:
    """Holds of (user, instrument, asset); their users' balances are locked already, which locks these too."""
    rows = await conn.fetch(
        "SELECT h.* FROM ledger.margin_holds h JOIN unnest($1::bigint[], $2::text[]) AS k (user_id, instrument_id)"
        " USING (user_id, instrument_id)",
        *columns([key[:2] for key in keys], 2),
    )
    holds = {(user_id, instrument_id): Hold(asset) for user_id, instrument_id, asset in keys}
    for row in rows:
        holds[row["user_id"], row["instrument_id"]] = _hold(row)
    return holds


def _hold(row: asyncpg.Record) -> Hold:
    return Hold(row["asset"], row["order_margin"], row["position_margin"], row["order_short"], row["margin_version"])


async def write_book(conn: Connection, book: Book, holds: dict[tuple[int, str], Hold]) -> None:
    """Write journals, entries, balances, holds and events of a finished book."""
    book.close_journal()
    used = {(entry[0], entry[1]) for entry in book.entries}
    await conn.copy_records_to_table(
        "journals",
        schema_name="ledger",
        columns=["reference_type", "reference_id"],
        records=[journal for journal in book.journals if journal in used],
    )
    await conn.copy_records_to_table(
        "ledger_entries", schema_name="ledger", columns=ENTRY_COLUMNS, records=book.entries
    )
    await conn.execute(
        "UPDATE ledger.ledger_balances b SET available = n.available, reserved = n.reserved, updated_at = now()"
        " FROM unnest($1::bigint[], $2::text[], $3::numeric[], $4::numeric[])"
        " AS n (user_id, asset, available, reserved)"
        " WHERE b.user_id = n.user_id AND b.asset = n.asset",
        *columns([(*key, a.available, a.reserved) for key, a in book.accounts.items()], 4),
    )
    await conn.execute(
        "INSERT INTO ledger.margin_holds"
        " (user_id, instrument_id, asset, order_margin, position_margin, order_short, margin_version)"
        " SELECT * FROM unnest($1::bigint[], $2::text[], $3::text[], $4::numeric[], $5::numeric[], $6::numeric[],"
        " $7::bigint[]) ON CONFLICT (user_id, instrument_id) DO UPDATE SET order_margin = excluded.order_margin,"
        " position_margin = excluded.position_margin, order_short = excluded.order_short,"
        " margin_version = excluded.margin_version",
        *columns(
            [
                (*k, h.asset, h.order_margin, h.position_margin, h.order_short, h.margin_version)
                for k, h in holds.items()
            ],
            7,
        ),
    )
    # Last, because everybody's fees end here: the row lock is held for as short as can be. Sorted against deadlocks.
    if book.system:
        await conn.execute(
            "INSERT INTO ledger.system_balances AS s (account, asset, balance)"
            " SELECT * FROM unnest($1::text[], $2::text[], $3::numeric[])"
            " ON CONFLICT (account, asset) DO UPDATE SET balance = s.balance + excluded.balance, updated_at = now()",
            *columns([(*key, amount) for key, amount in sorted(book.system.items())], 3),
        )
    pushes = [
        UserPush(user_id, "balance", {"asset": asset, **balance_view(account.available, account.reserved)})
        for (user_id, asset), account in book.accounts.items()
    ]
    await outbox.emit(conn, book.events, pushes)


def balance_view(available: Decimal, reserved: Decimal) -> dict[str, str]:
    """A balance as clients see it."""
    return {"available": plain(available), "reserved": plain(reserved), "total": plain(available + reserved)}


async def transfer_external(
    conn: Connection,
    reference_type: str,
    reference: str,
    user_id: int,
    asset: str,
    amount: Decimal,
) -> bool:
    """Deposit (`amount` > 0) or withdraw (< 0) once per (reference_type, reference); False when it was done before.

    Raises Problem INSUFFICIENT_FUNDS when a withdrawal exceeds the free collateral, VALIDATION_FAILED when `amount` is
    0 or has more than 8 decimals, or the reference was used for something else.
    """
    if not amount or amount != round_down(amount):
        raise Problem("VALIDATION_FAILED", f"Expected an amount other than 0 with at most 8 decimals, was {amount}")
    # The lock on the balance comes first: a repeat that runs at the same time waits for it and then sees the result.
    book = await _open_book(conn, [(user_id, asset)])
    step_id = f"{reference_type}:{reference}"
    earlier = await first_result(conn, "ledger", step_id, tuple[int, str, Decimal])
    if earlier is not None:
        if earlier != (user_id, asset, amount):
            raise Problem("VALIDATION_FAILED", f"Reference {reference} was used for another transfer")
        return False
    if amount < 0 and not (await read_collateral(conn, [user_id]))[user_id, asset].covers(-amount):
        raise Problem("INSUFFICIENT_FUNDS", f"Available {asset} does not cover {plain(-amount)}")
    book.open_journal(reference_type, reference)
    book.post_user(user_id, asset, reference_type, amount)
    book.post_system(DEPOSITS, asset, reference_type, -amount)
    await write_book(conn, book, {})
    if amount < 0:
        await tell_covers_again(conn, [user_id])
    await store_result(conn, "ledger", step_id, (user_id, asset, amount))
    return True

"""The check of orders: those that limits and money allow are added to the exposures."""

from collections import defaultdict
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from decimal import Decimal

from activities.market.prices import LatestMark, latest_marks
from activities.matching.instruments import Rules, read_instruments, read_tiers
from activities.risk.collateral import free_collateral
from activities.risk.exposures import (
    create_missing,
    lock_exposures,
    positions_in_liquidation,
    read_claims,
    read_exposure,
    read_unfrozen,
    save_exposures,
)
from activities.risk.limits import Limits, read_limits, refusal_reason
from activities.risk.rows import ClaimRow, Key
from activities.risk.terms import tell_covers_of, tell_terms
from activities.risk.unfinished import Unfinished, read_unfinished
from domain.contracts.orders import Backing, Refusal, StepRequest
from domain.contracts.results import CheckResult, OrderMargin
from domain.contracts.settlement import EventRange
from domain.events import BusinessEvent, MarginPreCheckFailed, MarginPreCheckPassed
from domain.exposure import Exposure
from domain.money import ZERO, plain
from domain.order_entry import NewOrder
from storage import outbox
from storage.db import Connection
from storage.once import first_result


async def pre_check(conn: Connection, order: NewOrder) -> tuple[Decimal, str | None]:
    """The margin that `order` would need (quote) and why it would be refused, or None; as `check_orders` decides."""
    request = order.request
    key = (order.user_id, request.instrument_id)
    instrument = (await read_instruments(conn))[request.instrument_id]
    state = await read_exposure(conn, order.user_id, instrument)
    price = order.margin_price or order.bound_price
    after = state.with_order(
        request.side, request.quantity, price, loss=order.open_loss, reduce_only=request.reduce_only
    )
    added = after.order_margin(instrument.taker_fee_rate) - state.order_margin(instrument.taker_fee_rate)
    loss = after.open_loss(request.side) - state.open_loss(request.side)
    limits = (await read_limits(conn, [key]))[key]
    tiers = (await read_tiers(conn))[request.instrument_id]
    budget = (await free_collateral(conn, {order.user_id})).get((order.user_id, instrument.quote_asset), ZERO)
    reduces = request.side if request.reduce_only else None
    if await positions_in_liquidation(conn, [key]):
        return added, "POSITION_IN_LIQUIDATION"
    mark = (await latest_marks(conn, [request.instrument_id])).get(request.instrument_id)
    if reduces is None and after.opens(request.side) and not (mark and mark.is_live):
        return added, "MARK_PRICE_UNAVAILABLE"
    return added, refusal_reason(after, reduces, request.quantity, added, loss, budget, limits, tiers)


@dataclass(slots=True)
class _Bench:
    """Orders that are judged one after the other, by what those before them leave of exposures and money."""

    rules: Rules
    limits: Mapping[Key, Limits]
    marks: Mapping[str, LatestMark]
    taken_over: Set[Key]
    # Keys whose later orders are busy, too.
    waiting: set[Key]
    states: dict[Key, Exposure]
    margins: dict[Key, Decimal]
    # Free collateral by user and asset.
    budgets: dict[tuple[int, str], Decimal]
    # What the admitted orders hold more: all told, and for open loss.
    spent: defaultdict[Key, Decimal]
    losses: defaultdict[Key, Decimal]
    done: CheckResult

    async def judge(self, conn: Connection, order: ClaimRow, unfinished: Unfinished) -> None:
        """Admit an order and add it to its exposure, or refuse it, or let it wait."""
        key, side = order.key, order.side
        if key in self.taken_over:
            self.done.refused.append(Refusal(order.order_id, "POSITION_IN_LIQUIDATION"))
            return
        if key in self.waiting:
            self.done.busy.append(order.order_id)
            return
        instrument, before = self.rules.instruments[key[1]], self.states[key]
        purse = (key[0], instrument.quote_asset)
        after = before.with_claim(side, order.quantity, order.notional, order.orders, order.loss)
        margin = after.order_margin(instrument.taker_fee_rate)
        added = margin - self.margins[key]
        budget = self.budgets.get(purse, ZERO)
        reason = self._why_refused(order, before, after, added, budget)
        if reason:
            await self._refuse(conn, order, reason, unfinished)
            return
        opening = after.opening(side) - before.opening(side)
        if opening < order.quantity:
            self.done.backed.append(Backing(order.order_id, instrument.quantity_to_lots(opening) if opening else 0))
        self.states[key], self.margins[key], self.budgets[purse] = after, margin, budget - added
        self.spent[key] += added
        self.losses[key] += after.open_loss(side) - before.open_loss(side)
        self.done.passed.append(OrderMargin(order.order_id, *key, instrument.quote_asset, added))

    def _why_refused(
        self, order: ClaimRow, before: Exposure, after: Exposure, added: Decimal, budget: Decimal
    ) -> str | None:
        key, side = order.key, order.side
        reduces = side if order.reduce_only else None
        if reduces is None and after.opens(side) and not (key[1] in self.marks and self.marks[key[1]].is_live):
            return "MARK_PRICE_UNAVAILABLE"
        loss = after.open_loss(side) - before.open_loss(side)
        tiers = self.rules.tiers[key[1]]
        return refusal_reason(after, reduces, order.open_quantity, added, loss, budget, self.limits[key], tiers)

    async def _refuse(self, conn: Connection, order: ClaimRow, reason: str, unfinished: Unfinished) -> None:
        if await unfinished.has(conn, order.user_id):
            # What it is judged by may lack what its user was told. Their later orders wait behind it.
            self.done.busy.append(order.order_id)
            self.waiting.update(key for key in self.states if key[0] == order.user_id)
        else:
            self.done.refused.append(Refusal(order.order_id, reason))


async def check_orders(conn: Connection, request: StepRequest, rules: Rules, unfinished: Unfinished) -> CheckResult:
    """Judge orders one after the other, each by what those before it leave; see `RiskActivities.check_orders`."""
    orders = await read_claims(conn, request.order_ids)
    keys = sorted({order.key for order in orders})
    unfinished.user_ids = frozenset(key[0] for key in keys)
    await create_missing(conn, keys, rules.instruments)
    exposures = await lock_exposures(conn, keys)
    # After the locks: a liquidation that came first is seen, one that comes later sees these orders.
    taken_over = await positions_in_liquidation(conn, keys)
    waiting = await read_unfrozen(conn, exposures)
    limits = await read_limits(conn, keys)
    bench = _Bench(
        rules=rules,
        limits=limits,
        marks=await latest_marks(conn, sorted({key[1] for key in keys})),
        taken_over=taken_over,
        waiting=waiting,
        states={key: row.state for key, row in exposures.items()},
        margins={key: row.order_margin for key, row in exposures.items()},
        budgets=await free_collateral(conn, {key[0] for key in keys}),
        spent=defaultdict(Decimal),
        losses=defaultdict(Decimal),
        done=CheckResult([], [], [], unfinished.ranges, []),
    )
    for order in orders:
        await bench.judge(conn, order, unfinished)
    done, states = bench.done, bench.states
    touched = {(margin.user_id, margin.instrument_id) for margin in done.passed}
    await tell_terms(conn, {key: states[key] for key in touched}, exposures, rules)
    await tell_covers_of(conn, {key for key in touched if states[key].cross}, bench.spent, bench.losses)
    saved = {key: (states[key], bench.margins[key]) for key in touched}
    await save_exposures(conn, saved, pending_step=request.step_id)
    await outbox.emit(conn, _verdicts(done.passed, done.refused))
    return done


def _verdicts(passed: Sequence[OrderMargin], refused: Sequence[Refusal]) -> list[BusinessEvent]:
    taken = [MarginPreCheckPassed(m.order_id, plain(m.amount)) for m in passed]
    return [*taken, *(MarginPreCheckFailed(r.order_id, r.reason) for r in refused)]


async def read_unfinished_of(conn: Connection, request: StepRequest, earlier: list[EventRange] | None) -> Unfinished:
    """What users may have been told before they sent these orders: nothing after the first look of the first round."""
    if earlier is None and request.round > 1:
        first = StepRequest(request.saga_id, 1, [])
        checked = await first_result(conn, "risk", f"check:{first.step_id}", CheckResult)
        earlier = checked.unfinished if checked else None
    return await read_unfinished(conn, [], earlier)

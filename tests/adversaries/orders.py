"""What traders send: orders and amendments, alone or in batches, margin moves, leverage, margin modes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from decimal import Decimal

from msgspec import structs

from domain.margin import margin_to_keep, releveraged_margin, tier_of
from domain.matching import Amend, AnyCommand, Cancel, MoveMargin, New, Side, margin_units
from domain.money import ZERO
from domain.order_entry import OrderRequest, Reference, amendment, new_order
from domain.problems import Problem
from domain.wallet import freeze, settle_within
from tests.adversaries.accounts import TIERS, UNITS, Account
from tests.adversaries.exchange import Exchange


@dataclass(frozen=True)
class AmendRequest:
    """Another price, or another quantity of the whole order; None: as it is."""

    instrument_id: str
    order_id: int
    price: Decimal | None = None
    quantity: Decimal | None = None


@dataclass(frozen=True)
class Judged:
    """What an order or amendment adds to the exposure, and the command that it becomes."""

    name: str
    side: Side
    quantity: Decimal
    notional: Decimal
    loss: Decimal
    orders: int
    reduces: bool
    command: AnyCommand


class Desk(Exchange):
    """The doors of the exchange. Answers are problem codes, "" if all is well."""

    def place(self, user_id: int, request: OrderRequest) -> str:
        """One order from its door to its end."""
        return self.submit(user_id, [request])[0]

    def submit(self, user_id: int, requests: Sequence[OrderRequest | AmendRequest]) -> list[str]:
        """A batch: all are judged, and their money is held, before the engine has any."""
        answers: list[str] = []
        taken: list[Judged] = []
        before, newest = self.accounts[user_id].available, self.order_id
        for request in requests:
            try:
                judged = self._read(user_id, request, newest)
            except Problem as problem:
                answers.append(problem.code)
                continue
            stake = self.accounts[user_id].stakes[judged.name]
            opening = stake.exposure.opening(judged.side)
            answers.append(self._take_in(user_id, judged))
            if not answers[-1]:
                taken.append(self._backed(judged, stake.exposure.opening(judged.side) - opening))
        for name in sorted({judged.name for judged in taken}):
            self.tell_terms(user_id, name)
        if self.accounts[user_id].available < before:
            self.tell_cover(user_id)
        for judged in taken:
            self.apply(judged.name, judged.command)
        self.follow_up()
        return answers

    def _read(self, user_id: int, request: OrderRequest | AmendRequest, newest: int) -> Judged:
        name = request.instrument_id
        venue, reference = self.venues[name], Reference(self.venues[name].mark)
        if venue.state != "TRADING":
            raise Problem("INSTRUMENT_NOT_TRADING", venue.state)
        self.order_id += 1
        if isinstance(request, OrderRequest):
            order = new_order(user_id, request, venue.instrument, reference)
            price = order.margin_price or order.bound_price
            quantity = ZERO if request.reduce_only else request.quantity
            command: AnyCommand = venue.new_command(order, self.order_id, self.time)
            return Judged(
                name,
                request.side,
                quantity,
                quantity * price,
                quantity * order.open_loss,
                1,
                request.reduce_only,
                command,
            )
        known = venue.orders.get(request.order_id)
        if known is None or known.user_id != user_id or known.order_id > newest:
            raise Problem("ORDER_NOT_FOUND", "no such order")
        if any(claim.order.order_id == known.order_id for claim in self.amendments.values()):
            raise Problem("ORDER_NOT_AMENDABLE", "an amendment is under way")
        change = amendment(known, request.price, request.quantity, venue.instrument, reference)
        self.amendments[self.order_id] = change
        return Judged(
            name,
            known.request.side,
            change.claimed_quantity,
            change.claimed_notional,
            change.claimed_loss,
            0,
            known.request.reduce_only,
            venue.amend_command(change, self.order_id, self.time),
        )

    def _take_in(self, user_id: int, judged: Judged) -> str:
        """Judge an order and hold its money; forget it if it is refused."""
        refusal = self._judge(user_id, judged)
        if refusal:
            self.amendments.pop(self.order_id, None)
            self.venues[judged.name].orders.pop(self.order_id, None)
        return refusal

    def _backed(self, judged: Judged, opening: Decimal) -> Judged:
        """As `activities.risk.check`: the engine hears for how much of an order there is initial margin, if not for
        all."""
        if opening >= judged.quantity:
            return judged
        lots = self.venues[judged.name].instrument.quantity_to_lots(opening) if opening else 0
        assert isinstance(judged.command, New | Amend)
        return replace(judged, command=structs.replace(judged.command, backed=lots))

    def _judge(self, user_id: int, judged: Judged) -> str:
        """As `activities.risk.limits.refusal_reason`, and the ledger's freeze."""
        account = self.accounts[user_id]
        stake, venue = account.stakes[judged.name], self.venues[judged.name]
        before, rate = stake.exposure, venue.instrument.taker_fee_rate
        after = before.with_claim(judged.side, judged.quantity, judged.notional, judged.orders, judged.loss)
        if stake.is_liquidated:
            return "POSITION_IN_LIQUIDATION"
        if judged.reduces and not after.can_reduce(judged.side):
            return "REDUCE_ONLY_REJECTED"
        added = after.order_margin(rate) - before.order_margin(rate)
        if added > 0 and after.leverage > tier_of(after.worst_notional, TIERS).max_leverage:
            return "RISK_LIMIT_EXCEEDED"
        if not judged.reduces and after.opens(judged.side) and not venue.is_live(self.time):
            return "MARK_PRICE_UNAVAILABLE"
        frozen = freeze(account.wallet(judged.name), added) if self.may_leave(account, added) else None
        if frozen is None:
            return "INSUFFICIENT_MARGIN"
        leaves = frozen.available < account.available
        account.keep(judged.name, frozen)
        if leaves:
            self.note_left(user_id)
        stake.exposure = after
        return ""

    def may_leave(self, account: Account, amount: Decimal) -> bool:
        """Whether so much may leave what is available."""
        return account.collateral(self.marks).covers(amount)

    def cancel(self, user_id: int, name: str, order_id: int) -> None:
        """Take an order back."""
        self.apply(name, Cancel(at=self.time, order_id=order_id, user_id=user_id))
        self.follow_up()

    def move_margin(self, user_id: int, name: str, amount: Decimal) -> str:
        """Put money behind an isolated position, or take some away (below 0)."""
        account, stake = self.accounts[user_id], self.accounts[user_id].stakes[name]
        if not stake.quantity:
            return "POSITION_NOT_FOUND"
        mark, leverage = self.venues[name].mark, stake.exposure.leverage
        kept = margin_to_keep(stake.quantity, stake.position.entry_notional, mark, leverage)
        reasons = {
            "POSITION_IN_LIQUIDATION": stake.is_liquidated,
            "POSITION_IS_CROSS": stake.exposure.cross,
            "MARK_PRICE_UNAVAILABLE": not self.venues[name].is_live(self.time),
            "INSUFFICIENT_MARGIN": amount < 0 and stake.position_margin + amount < kept,
            "INSUFFICIENT_FUNDS": not self.may_leave(account, amount),
        }
        refusal = next((reason for reason, applies in reasons.items() if applies), "")
        if not refusal:
            self._move(user_id, name, amount, ZERO)
        return refusal

    def lever(self, user_id: int, name: str, leverage: int) -> str:
        """Change the leverage of what is open and of what will be."""
        account, venue = self.accounts[user_id], self.venues[name]
        stake, rate = account.stakes[name], venue.instrument.taker_fee_rate
        before, held = stake.exposure, stake.position_margin
        after = structs.replace(before, leverage=leverage)
        if stake.is_liquidated:
            return "POSITION_IN_LIQUIDATION"
        if not venue.is_live(self.time) and stake.quantity:
            return "MARK_PRICE_UNAVAILABLE"
        if leverage > tier_of(after.worst_notional, TIERS).max_leverage:
            return "RISK_LIMIT_EXCEEDED"
        margin = held
        if stake.quantity:
            margin = releveraged_margin(
                stake.quantity, stake.position.entry_notional, held, venue.mark, before.leverage, leverage
            )
        order_delta = after.order_margin(rate) - before.order_margin(rate)
        if not self.may_leave(account, margin - held + order_delta):
            return "INSUFFICIENT_MARGIN"
        stake.exposure = after
        if stake.told is not None:
            self.tell_terms(user_id, name)
        self._move(user_id, name, margin - held, order_delta)
        return ""

    def set_mode(self, user_id: int, name: str, *, cross: bool) -> str:
        """Isolated or cross from here on."""
        stake = self.accounts[user_id].stakes[name]
        if stake.quantity or stake.exposure.open_orders:
            return "MARGIN_MODE_NOT_CHANGEABLE"
        stake.exposure = structs.replace(stake.exposure, cross=cross)
        return ""

    def _move(self, user_id: int, name: str, amount: Decimal, order_delta: Decimal) -> None:
        """As `activities.ledger.margin`: nothing is touched that stands for a loss or for funding."""
        account, venue = self.accounts[user_id], self.venues[name]
        stake, wallet = account.stakes[name], account.wallet(name)
        free = max(ZERO, account.collateral(self.marks).free)
        moved = settle_within(wallet, free, wallet.position_margin + amount, order_delta)
        account.keep(name, moved)
        if moved.available < wallet.available:
            self.note_left(user_id)
        units = margin_units(moved.position_margin - wallet.position_margin, UNITS[name])
        if units and stake.told is not None:
            at, seq = self.time, venue.matcher.event_seq
            self.apply(name, MoveMargin(at=at, user_id=user_id, amount=units, after_seq=seq))
        self.tell_cover(user_id)
        self.follow_up()

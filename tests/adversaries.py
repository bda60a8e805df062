"""An exchange in memory: the real rules of order entry, margin and wallets, the real matcher, and a ledger beside them.

It carries an order all the way at once, so that a test can try what any set of traders can do to it. Everybody is
isolated, and nobody is liquidated: what is left of a position is its user's, who may be up to anything.
"""

from collections import defaultdict
from dataclasses import dataclass, field
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal

from msgspec.structs import replace

from domain.exposure import Exposure
from domain.instruments import SHIPPED
from domain.margin import (
    Tier,
    initial_margin,
    maintenance_margin,
    margin_to_keep,
    releveraged_margin,
    tier_of,
    unrealized_pnl,
)
from domain.matching import (
    AnyCommand,
    AnyEvent,
    Cancel,
    Cancelled,
    Expired,
    Filled,
    MarkPrice,
    MoveMargin,
    New,
    Rejected,
    SetTerms,
    Side,
    Trade,
    margin_units,
)
from domain.money import ZERO
from domain.order_entry import OrderRequest, Reference, new_order, protection
from domain.positions import Position, apply_fill
from domain.problems import Problem
from domain.wallet import BookedFill, Wallet, freeze, settle, settle_fills
from engine.guards import ONE
from engine.matcher import Matcher

BTC = SHIPPED[0]
UNIT = BTC.tick_size * BTC.lot_size
TIERS = [
    Tier(Decimal(0), Decimal("0.005"), Decimal(0), 100),
    Tier(Decimal(250_000), Decimal("0.01"), Decimal(1_250), 50),
    Tier(Decimal(1_000_000), Decimal("0.025"), Decimal(16_250), 20),
    Tier(Decimal(5_000_000), Decimal("0.05"), Decimal(141_250), 10),
    Tier(Decimal(20_000_000), Decimal("0.1"), Decimal(1_141_250), 5),
    Tier(Decimal(50_000_000), Decimal("0.25"), Decimal(8_641_250), 2),
]
FEE_STEP = Decimal("1e-8")
OPPOSITE: dict[Side, Side] = {"BUY": "SELL", "SELL": "BUY"}


@dataclass
class Account:
    """What the services know of a user."""

    exposure: Exposure = field(default_factory=lambda: Exposure(10))
    wallet: Wallet = field(default_factory=Wallet)
    position: Position = field(default_factory=Position)
    told: tuple[int, int] = (0, 0)

    def equity(self, mark: Decimal) -> Decimal:
        """Of the position: its margin, and what it has won or lost at `mark`."""
        pnl = unrealized_pnl(self.position.signed_quantity, self.position.entry_notional, mark)
        return self.wallet.position_margin + pnl

    def maintenance(self, mark: Decimal) -> Decimal:
        """Maintenance margin of the position at `mark`."""
        return maintenance_margin(abs(self.position.signed_quantity) * mark, TIERS)


@dataclass(frozen=True)
class Opened:
    """A fill that opened: the margin it brought, its notional, and the position's equity and maintenance after it."""

    user_id: int
    margin: Decimal
    initial: Decimal
    equity: Decimal
    maintenance: Decimal


class Exchange:
    """`fund` is what the insurance fund paid, below 0; `opened` are the fills of the last step that opened."""

    def __init__(self) -> None:
        self.matcher = Matcher(BTC)
        self.accounts: defaultdict[int, Account] = defaultdict(Account)
        self.mark = Decimal(60_000)
        self.time = 0
        self.order_id = 0
        self.fund = ZERO
        self.fees = ZERO
        self.opened: list[Opened] = []
        self.say_mark(self.mark)

    def deposit(self, user_id: int, amount: Decimal) -> None:
        """Money comes in."""
        account = self.accounts[user_id]
        account.wallet = _with_available(account.wallet, amount)

    def say_mark(self, mark: Decimal) -> None:
        """The mark moves."""
        self.mark = mark
        ticks = mark / BTC.tick_size
        floor, ceiling = (int(ticks.to_integral_value(rounding)) for rounding in (ROUND_FLOOR, ROUND_CEILING))
        self._apply(MarkPrice(at=self.time, price=floor, ceiling=ceiling))

    def place(self, user_id: int, request: OrderRequest) -> str:
        """An order from its door to its end; why it was refused, if so."""
        account = self.accounts[user_id]
        try:
            order = new_order(user_id, request, BTC, Reference(self.mark))
        except Problem as problem:
            return problem.code
        margin_price = order.margin_price or order.bound_price
        before = account.exposure
        after = before.with_order(
            request.side, request.quantity, margin_price, loss=order.open_loss, reduce_only=request.reduce_only
        )
        if request.reduce_only and not after.can_reduce(request.side):
            return "REDUCE_ONLY_REJECTED"
        added = after.order_margin(BTC.taker_fee_rate) - before.order_margin(BTC.taker_fee_rate)
        if added > 0 and after.leverage > tier_of(after.worst_notional, TIERS).max_leverage:
            return "RISK_LIMIT_EXCEEDED"
        frozen = freeze(account.wallet, added)
        if frozen is None:
            return "INSUFFICIENT_MARGIN"
        account.exposure, account.wallet = after, frozen
        self._tell_terms(user_id)
        self.order_id += 1
        price, basis = BTC.price_to_ticks(order.bound_price), BTC.price_to_ticks(margin_price)
        waits_for_market = request.type in ("STOP_MARKET", "TAKE_PROFIT_MARKET")
        self._apply(
            New(
                at=self.time,
                order_id=self.order_id,
                user_id=user_id,
                side=request.side,
                type=request.type,
                time_in_force=request.time_in_force if request.has_limit else "IOC",
                price=price,
                quantity=BTC.quantity_to_lots(request.quantity),
                stp_mode=request.stp_mode,
                reduce_only=request.reduce_only,
                stop_price=BTC.price_to_ticks(request.stop_price) if request.stop_price else 0,
                basis=0 if basis == price else basis,
                loss=BTC.price_to_ticks(order.open_loss),
                protection=int(protection(BTC) * ONE) if waits_for_market else 0,
            )
        )
        return ""

    def cancel(self, user_id: int, order_id: int) -> None:
        """Take an order back."""
        self._apply(Cancel(at=self.time, order_id=order_id, user_id=user_id))

    def move_margin(self, user_id: int, amount: Decimal) -> str:
        """Put money behind a position, or take some away (below 0)."""
        account = self.accounts[user_id]
        position, wallet = account.position, account.wallet
        if not position.signed_quantity:
            return "POSITION_NOT_FOUND"
        kept = margin_to_keep(position.signed_quantity, position.entry_notional, self.mark, account.exposure.leverage)
        if amount > wallet.available or (amount < 0 and wallet.position_margin + amount < kept):
            return "INSUFFICIENT_MARGIN"
        self._move(user_id, amount, ZERO)
        return ""

    def lever(self, user_id: int, leverage: int) -> str:
        """Change the leverage of what is open and of what will be."""
        account = self.accounts[user_id]
        before, position, held = account.exposure, account.position, account.wallet.position_margin
        after = replace(before, leverage=leverage)
        if leverage > tier_of(after.worst_notional, TIERS).max_leverage:
            return "RISK_LIMIT_EXCEEDED"
        margin = held
        if position.signed_quantity:
            margin = releveraged_margin(
                position.signed_quantity, position.entry_notional, held, self.mark, before.leverage, leverage
            )
        order_delta = after.order_margin(BTC.taker_fee_rate) - before.order_margin(BTC.taker_fee_rate)
        if margin - held + order_delta > account.wallet.available:
            return "INSUFFICIENT_MARGIN"
        account.exposure = after
        self._tell_terms(user_id)
        self._move(user_id, margin - held, order_delta)
        return ""

    def _move(self, user_id: int, amount: Decimal, order_delta: Decimal) -> None:
        account = self.accounts[user_id]
        wallet = account.wallet
        account.wallet = settle(wallet, ZERO, wallet.position_margin + amount, order_delta).wallet
        units = margin_units(account.wallet.position_margin - wallet.position_margin, UNIT)
        if units:
            self._apply(MoveMargin(at=self.time, user_id=user_id, amount=units, after_seq=self.matcher.event_seq))

    def _tell_terms(self, user_id: int) -> None:
        account = self.accounts[user_id]
        rate = tier_of(account.exposure.worst_notional, TIERS).maintenance_margin_rate
        terms = account.exposure.leverage, int(rate * ONE)
        if terms != account.told:
            account.told = terms
            self._apply(SetTerms(at=self.time, user_id=user_id, leverage=terms[0], maintenance=terms[1]))

    def _apply(self, command: AnyCommand) -> None:
        for event in self.matcher.apply(command):
            self._settle(event)

    def _settle(self, event: AnyEvent) -> None:
        price, quantity = BTC.ticks_to_price, BTC.lots_to_quantity
        match event:
            case Trade():
                self._fill(event, "MAKER")
                self._fill(event, "TAKER")
            case Filled():
                account = self.accounts[event.user_id]
                account.exposure = account.exposure.with_order_closed()
                self._divide(account, account.exposure, [])
            case Cancelled() | Expired() | Rejected():
                account = self.accounts[event.user_id]
                without = account.exposure.without_order(
                    event.side,
                    quantity(event.quantity),
                    price(event.basis or event.price),
                    loss=price(event.loss),
                    reduce_only=event.reduce_only,
                )
                self._divide(account, without, [])
            case _:
                pass

    def _fill(self, trade: Trade, role: str) -> None:
        price, quantity = BTC.ticks_to_price(trade.price), BTC.lots_to_quantity(trade.quantity)
        if role == "MAKER":
            user_id, side, leverage = trade.maker_user_id, OPPOSITE[trade.taker_side], trade.maker_leverage
            basis, loss, reduces = trade.maker_basis or trade.price, trade.maker_loss, trade.maker_reduce_only
            open_loss, fee = trade.maker_open_loss, trade.maker_fee * FEE_STEP
        else:
            user_id, side, leverage = trade.taker_user_id, trade.taker_side, trade.taker_leverage
            basis, loss, reduces = trade.taker_basis or trade.taker_price, trade.taker_loss, trade.taker_reduce_only
            open_loss, fee = trade.taker_open_loss, trade.taker_fee * FEE_STEP
        account = self.accounts[user_id]
        before = account.position
        fill = apply_fill(before, quantity if side == "BUY" else -quantity, price)
        exposure = account.exposure
        if not reduces:
            exposure = exposure.with_fill(side, quantity, BTC.ticks_to_price(basis), BTC.ticks_to_price(loss))
        account.position = fill.position
        exposure = exposure.with_position(fill.position.signed_quantity, fill.position.entry_notional)
        booked = BookedFill(
            before=before.signed_quantity,
            after=fill.position.signed_quantity,
            price=price,
            leverage=leverage,
            realized_pnl=fill.realized_pnl,
            fee=fee,
            open_loss=BTC.ticks_to_price(open_loss),
        )
        margin = account.wallet.position_margin
        self.fees += fee
        self._divide(account, exposure, [booked])
        if fill.kind in ("OPEN", "ADD"):
            added = account.wallet.position_margin - margin
            initial = initial_margin(min(price, BTC.ticks_to_price(basis)) * quantity, leverage)
            equity, maintenance = account.equity(self.mark), account.maintenance(self.mark)
            self.opened.append(Opened(user_id, added, initial, equity, maintenance))

    def _divide(self, account: Account, exposure: Exposure, fills: list[BookedFill]) -> None:
        delta = exposure.order_margin(BTC.taker_fee_rate) - account.exposure.order_margin(BTC.taker_fee_rate)
        account.exposure = exposure
        settled = settle_fills(account.wallet, fills, delta)
        self.fund -= settled.insurance
        account.wallet = settled.wallet


def _with_available(wallet: Wallet, amount: Decimal) -> Wallet:
    return Wallet(wallet.available + amount, wallet.order_margin, wallet.position_margin, wallet.order_short)

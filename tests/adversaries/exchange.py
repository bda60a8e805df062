"""An exchange in memory: the real rules of order entry, margin, wallets, funding and liquidation, the real matchers, a
ledger beside them.

It carries an order all the way at once, so that a test can try what any set of traders can do to it: `orders.py` has
what they send, `liquidations.py` what is done to them, this what comes of it.
"""

from collections import defaultdict
from dataclasses import dataclass
from decimal import Decimal

from activities.positions.trades import TradeSide, sides_of
from domain.exposure import Exposure
from domain.funding import Holding as Held
from domain.funding import draw_margin_first
from domain.margin import initial_margin, tier_of
from domain.matching import (
    Amended,
    AmendRejected,
    AnyCommand,
    AnyEvent,
    Cancel,
    Cancelled,
    Deleveraged,
    Expired,
    Filled,
    MoveMargin,
    Rejected,
    SetCover,
    SetTerms,
    Side,
    Trade,
    margin_units,
)
from domain.money import ZERO, round_up
from domain.order_entry import Amendment
from domain.positions import Position, apply_fill
from domain.wallet import BookedFill, keep_back, return_margin, settle_fills
from engine.guards import ONE
from tests.adversaries.accounts import BTC, ETH, TIERS, UNITS, Account, Stake
from tests.adversaries.venues import Venue

SEED = Decimal(1_000_000)


@dataclass(frozen=True)
class Opened:
    """A fill that opened: the margin it brought, its initial margin, and the position's equity and maintenance after
    it. `is_taker_live`: not a taker's, or there was a live mark."""

    user_id: int
    margin: Decimal
    initial: Decimal
    equity: Decimal
    maintenance: Decimal
    is_taker_live: bool


@dataclass(frozen=True)
class FundingTime:
    """A funding time that nobody has collected yet: what each user gets (quote; below 0: pays)."""

    name: str
    payments: dict[int, Decimal]


@dataclass(frozen=True)
class Draw:
    """What the fund was asked for, and how much of that was justified (quote)."""

    user_id: int
    cause: str
    amount: Decimal
    justified: Decimal


class Exchange:
    """`fund` is the insurance fund, `shortfall` what it could not pay. `poorer`: from whose available money a fill took
    more than was held for it. `opened` and `draws` are those of the last step;
    `left`: what was free of those whose money left, after that; `due`: funding times to be collected;
    `claims`: what a running liquidation may cost the fund, by user and instrument. All quote."""

    def __init__(self, seed: Decimal = SEED) -> None:
        self.due: list[FundingTime] = []
        self.accounts: defaultdict[int, Account] = defaultdict(Account)
        self.venues = {i.instrument_id: Venue(i, mark) for i, mark in ((BTC, Decimal(60_000)), (ETH, Decimal(3_000)))}
        # Unix milliseconds.
        self.time = 1_000_000
        self.order_id = 0
        self.amendments: dict[int, Amendment] = {}
        self.fund = self.paid_in = seed
        self.fees = self.shortfall = self.dust = ZERO
        self.poorer: set[int] = set()
        self.left: list[Decimal] = []
        self.opened: list[Opened] = []
        self.draws: list[Draw] = []
        self.claims: dict[tuple[int, str], Decimal] = {}
        for name, venue in self.venues.items():
            self.say_mark(name, venue.mark)

    @property
    def marks(self) -> dict[str, Decimal]:
        """The last mark of each instrument."""
        return {name: venue.mark for name, venue in self.venues.items()}

    def deposit(self, user_id: int, amount: Decimal) -> None:
        """Money comes in."""
        self.accounts[user_id].available += amount
        self.paid_in += amount

    def withdraw(self, user_id: int, amount: Decimal) -> str:
        """Money goes out; why not, if so."""
        account = self.accounts[user_id]
        if not account.collateral(self.marks).covers(amount):
            return "INSUFFICIENT_FUNDS"
        account.available -= amount
        self.note_left(user_id)
        self.paid_in -= amount
        self.tell_cover(user_id)
        return ""

    def note_left(self, user_id: int) -> None:
        """Money of a user has just left what is available, by their own wish: write down what else stands on it."""
        account = self.accounts[user_id]
        lost = -sum((stake.pnl(self.venues[name].mark) for name, stake in account.crossed()), ZERO)
        self.left.append(account.available - max(ZERO, lost) - self.due_of(user_id))

    def due_of(self, user_id: int) -> Decimal:
        """Funding of a user that is due and not collected."""
        return sum((max(ZERO, -time.payments.get(user_id, ZERO)) for time in self.due), ZERO)

    def say_mark(self, name: str, mark: Decimal, *, frozen: bool = False) -> None:
        """The mark moves, or is told again."""
        venue = self.venues[name]
        self.apply(name, venue.mark_command(mark, self.time, frozen=frozen))
        for user_id in self.accounts:
            self.tell_cover(user_id)

    # The engine

    def tell_cover(self, user_id: int) -> None:
        """Tell the engine what backs the user's cross positions now, and those that their orders may lead to."""
        for name, stake in list(self.accounts[user_id].stakes.items()):
            if stake.exposure.cross and stake.told is not None:
                self.tell_terms(user_id, name)

    def tell_terms(self, user_id: int, name: str) -> None:
        """Tell the engine on which terms it has to guard the user's fills, where it knows others."""
        account, venue = self.accounts[user_id], self.venues[name]
        stake = account.stakes[name]
        rate = tier_of(stake.exposure.worst_notional, TIERS).maintenance_margin_rate
        cross = stake.exposure.cross
        terms = SetTerms(
            at=0,
            user_id=user_id,
            leverage=stake.exposure.leverage,
            maintenance=-int(-rate * ONE // 1),
            cross=cross,
        )
        if terms != stake.told:
            stake.told = terms
            self.apply(name, terms)
        if cross:
            units = margin_units(account.cover(name, self.marks), UNITS[name])
            self.apply(name, SetCover(at=self.time, user_id=user_id, cover=units, after_seq=venue.matcher.event_seq))

    def apply(self, name: str, command: AnyCommand) -> list[AnyEvent]:
        """Let the engine carry out a command, and book what comes of it."""
        events = self.venues[name].matcher.apply(command)
        for event in events:
            self._settle(name, event)
            self.venues[name].remember(event)
        return events

    def follow_up(self) -> None:
        """Cancel the orders of those whose money for them a loss took, and tell the engine of what fills took."""
        for user_id in sorted(self.poorer):
            self.tell_cover(user_id)
        self.poorer.clear()
        for user_id, account in self.accounts.items():
            for name, stake in account.stakes.items():
                if stake.order_short > 0:
                    self.cancel_all(user_id, name, "INSUFFICIENT_MARGIN")

    def cancel_all(self, user_id: int, name: str, reason: str) -> None:
        """Take out all orders of a user in an instrument."""
        matcher = self.venues[name].matcher
        orders = [*matcher.book.orders.values(), *matcher.stops.orders.values()]
        for order_id in [order.new.order_id for order in orders if order.new.user_id == user_id]:
            self.apply(name, Cancel(at=self.time, order_id=order_id, user_id=user_id, reason=reason))

    # The ledger

    def draw(self, user_id: int, cause: str, amount: Decimal, justified: Decimal) -> None:
        """The fund pays, as far as it goes."""
        if amount:
            given = min(amount, self.fund)
            self.fund -= given
            self.shortfall += amount - given
            self.draws.append(Draw(user_id, cause, amount, justified))

    def _settle(self, name: str, event: AnyEvent) -> None:
        instrument = self.venues[name].instrument
        price, quantity = instrument.ticks_to_price, instrument.lots_to_quantity
        match event:
            case Trade() | Deleveraged():
                for half in sides_of(event):
                    self._fill(name, event, half)
            case Filled():
                self._divide(event.user_id, name, self._stake(event.user_id, name).exposure.with_order_closed(), [])
            case Cancelled() | Expired() | Rejected():
                without = self._stake(event.user_id, name).exposure.without_order(
                    event.side,
                    quantity(event.quantity),
                    price(event.basis or event.price),
                    loss=price(event.loss),
                    reduce_only=event.reduce_only,
                )
                self._divide(event.user_id, name, without, [])
            case Amended() | AmendRejected():
                self._amended(name, event)
            case _:
                pass

    def _stake(self, user_id: int, name: str) -> Stake:
        return self.accounts[user_id].stakes[name]

    def _amended(self, name: str, event: Amended | AmendRejected) -> None:
        """As `activities.risk`: the order is another one now, and its claim ends."""
        instrument = self.venues[name].instrument
        price, quantity = instrument.ticks_to_price, instrument.lots_to_quantity
        exposure = self._stake(event.user_id, name).exposure
        if isinstance(event, Amended) and not event.reduce_only:
            exposure = exposure.without_order(
                event.side,
                quantity(event.old_quantity),
                price(event.old_basis or event.old_price),
                loss=price(event.old_loss),
            ).with_order(
                event.side, quantity(event.quantity), price(event.basis or event.price), loss=price(event.loss)
            )
        if event.amendment_id:
            claim = self.amendments.pop(event.amendment_id)
            side = claim.order.request.side
            exposure = exposure.with_claim(
                side, -claim.claimed_quantity, -claim.claimed_notional, 0, -claim.claimed_loss
            )
        self._divide(event.user_id, name, exposure, [])

    def _fill(self, name: str, event: Trade | Deleveraged, half: TradeSide) -> None:
        venue, user_id = self.venues[name], half.user_id
        ticks, quantity = venue.instrument.ticks_to_price, venue.instrument.lots_to_quantity(event.quantity)
        stake, price = self._stake(user_id, name), ticks(event.price)
        basis, exposure = price, stake.exposure
        if isinstance(event, Trade):
            basis_ticks, loss, reduces = _terms_of(event, half.role)
            basis = ticks(basis_ticks)
            if not reduces:
                exposure = exposure.with_fill(half.side, quantity, basis, ticks(loss))
        before = stake.position
        fill = apply_fill(before, quantity if half.side == "BUY" else -quantity, price)
        exposure = exposure.with_position(fill.position.signed_quantity, fill.position.entry_notional)
        booked = BookedFill(
            before=before.signed_quantity,
            after=fill.position.signed_quantity,
            price=price,
            leverage=half.leverage or exposure.leverage,
            realized_pnl=fill.realized_pnl,
            fee=half.fee,
            is_liquidation=half.cause == "LIQUIDATION",
            is_cross=exposure.cross,
            open_loss=ticks(half.open_loss),
        )
        margin = stake.position_margin
        self.fees += half.fee
        self._divide(user_id, name, exposure, [booked], fill.position)
        if fill.kind in ("OPEN", "ADD", "FLIP"):
            if fill.kind == "FLIP":
                margin, quantity = ZERO, abs(fill.position.signed_quantity)
            self.opened.append(
                Opened(
                    user_id,
                    stake.position_margin - margin,
                    # What is sold above the price at which its margin and its fee are held pays more of a fee.
                    initial_margin(min(price, basis) * quantity, booked.leverage)
                    - round_up(max(ZERO, price - basis) * quantity * venue.instrument.taker_fee_rate),
                    *self._soundness(user_id, name),
                    half.role != "TAKER" or self.time <= venue.live_until,
                )
            )

    def _soundness(self, user_id: int, name: str) -> tuple[Decimal, Decimal]:
        """Equity and maintenance margin: of an isolated position, or of all cross positions."""
        account, stake, mark = self.accounts[user_id], self._stake(user_id, name), self.venues[name].mark
        if stake.exposure.cross:
            return account.cross_equity(self.marks), account.cross_maintenance(self.marks)
        return stake.equity(mark), stake.maintenance(mark)

    def _divide(
        self, user_id: int, name: str, exposure: Exposure, fills: list[BookedFill], position: Position | None = None
    ) -> None:
        """Book fills and what orders need more or less, as `activities.ledger.settlement`."""
        account = self.accounts[user_id]
        stake, rate = account.stakes[name], self.venues[name].instrument.taker_fee_rate
        delta = exposure.order_margin(rate) - stake.exposure.order_margin(rate)
        stake.exposure = exposure
        stake.position = position or stake.position
        settled = settle_fills(account.wallet(name), fills, delta)
        if settled.insurance and exposure.cross:
            self._draw_margins(user_id, name, settled.insurance)
            settled = settle_fills(account.wallet(name), fills, delta)
        wallet, before = settled.wallet, account.wallet(name)
        if wallet.order_margin > before.order_margin or wallet.available < before.available:
            unbooked = sum((fill.realized_pnl for fill in fills if fill.is_cross), ZERO)
            collateral = account.collateral(self.marks, unbooked)
            stands = collateral.available - collateral.free
            wallet = return_margin(keep_back(wallet, before.order_margin, stands), before, stands)
        if wallet.available < account.available:
            self.poorer.add(user_id)
        account.keep(name, wallet)
        if settled.margin_short:
            self._tell_less_margin(user_id, name, settled.margin_short)
        if wallet.available < before.available and wallet.position_margin > before.position_margin:
            self.note_left(user_id)
        self.fund += settled.liquidation_fee + settled.surplus
        if settled.insurance:
            claim = self.claims.get((user_id, name), ZERO)
            self.claims[user_id, name] = claim - settled.insurance
            self.draw(
                user_id, "LIQUIDATION" if fills and fills[-1].is_liquidation else "ORDER", settled.insurance, claim
            )

    def _draw_margins(self, user_id: int, name: str, missing: Decimal) -> None:
        """A loss of a cross account takes of what its other cross instruments hold, before the fund pays."""
        account = self.accounts[user_id]
        others = {each: stake for each, stake in account.stakes.items() if each != name and stake.exposure.cross}
        holdings = [Held(each, stake.order_margin, stake.position_margin) for each, stake in others.items()]
        for draw in draw_margin_first(missing, holdings):
            account.available += draw.total
            self.take(user_id, draw)

    def take(self, user_id: int, draw: Held) -> None:
        """Release what a loss or a payment takes of an instrument's hold, and tell the engine."""
        name, stake = draw.instrument_id, self.accounts[user_id].stakes[draw.instrument_id]
        stake.order_margin -= draw.order_margin
        stake.order_short += draw.order_margin
        stake.position_margin -= draw.position_margin
        self._tell_less_margin(user_id, name, draw.position_margin)

    def _tell_less_margin(self, user_id: int, name: str, less: Decimal) -> None:
        units = margin_units(-less, UNITS[name])
        if units and self._stake(user_id, name).told is not None:
            seq = self.venues[name].matcher.event_seq
            self.apply(name, MoveMargin(at=self.time, user_id=user_id, amount=units, after_seq=seq))


def _terms_of(trade: Trade, role: str) -> tuple[int, int, bool]:
    """Basis and loss (ticks) of the order of one side of a trade, and whether it only reduces."""
    if role == "MAKER":
        return trade.maker_basis or trade.price, trade.maker_loss, trade.maker_reduce_only
    return trade.taker_basis or trade.taker_price, trade.taker_loss, trade.taker_reduce_only


def opposite(side: Side) -> Side:
    """The other side."""
    return "SELL" if side == "BUY" else "BUY"

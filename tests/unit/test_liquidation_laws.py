"""Whole liquidations without servers: the real matcher, the ledger's rules; random positions, books, funds, marks."""

from dataclasses import dataclass, field
from decimal import Decimal

from hypothesis import example, given, settings
from hypothesis import strategies as st

from activities.positions.trades import sides_of
from domain.instruments import SHIPPED
from domain.liquidation import (
    Holding,
    deleverage_price,
    deleverage_score,
    insurance_needed,
    must_liquidate,
    quantity_to_close,
    worst_price,
)
from domain.margin import Tier, bankruptcy_price, maintenance_margin, margin_ratio
from domain.matching import Deleverage, Deleveraged, New, Side, Trade
from domain.money import ZERO, round_down, round_up
from domain.positions import Position, apply_fill
from domain.wallet import BookedFill, Wallet, settle_fills
from engine.matcher import Matcher

D = Decimal
BTC = SHIPPED[0]
# Narrow tiers, so that the positions below reach all of them.
TIERS = [
    Tier(ZERO, D("0.005"), ZERO, 100),
    Tier(D(50_000), D("0.01"), D(250), 50),
    Tier(D(500_000), D("0.025"), D(7_750), 20),
]
FEE_STEP = D("1e-8")
DEPOSIT = D(10_000_000)
MAKER = 7
USERS = st.integers(1, 6)
ROUNDS_MAX = 20


@dataclass
class Venue:
    """An instrument with its users' positions and money; the fund and the fees are the exchange's."""

    mark: Decimal
    fund: Decimal
    leverage: dict[int, int]
    matcher: Matcher = field(default_factory=lambda: Matcher(BTC))
    positions: dict[int, Position] = field(default_factory=lambda: dict.fromkeys(range(1, MAKER + 1), Position()))
    wallets: dict[int, Wallet] = field(default_factory=lambda: dict.fromkeys(range(1, MAKER + 1), Wallet(DEPOSIT)))
    fees: Decimal = ZERO
    orders: int = 0

    def place(self, user_id: int, side: Side, lots: int, price: Decimal, *, forced: bool = False) -> list[Trade]:
        """A limit order, or the order of a liquidation; its trades are booked."""
        self.orders += 1
        new = New(
            at=0,
            order_id=self.orders,
            user_id=user_id,
            side=side,
            type="MARKET" if forced else "LIMIT",
            time_in_force="IOC" if forced else "GTC",
            price=BTC.price_to_ticks(price),
            quantity=lots,
            liquidation=forced,
            reduce_only=forced,
        )
        trades = [event for event in self.matcher.apply(new) if isinstance(event, Trade)]
        for trade in trades:
            self._book(trade)
        return trades

    def deleverage(self, user_id: int, closing: Decimal, price: Decimal, ranked: list[int]) -> list[Deleveraged]:
        """Against those in `ranked`."""
        command = Deleverage(
            at=0,
            user_id=user_id,
            side=self.holding(user_id).closing_side,
            price=BTC.price_to_ticks(price),
            quantity=BTC.quantity_to_lots(closing),
            counterparties=ranked,
        )
        done = [event for event in self.matcher.apply(command) if isinstance(event, Deleveraged)]
        for event in done:
            self._book(event)
        return done

    def _book(self, event: Trade | Deleveraged) -> None:
        price, quantity = BTC.ticks_to_price(event.price), BTC.lots_to_quantity(event.quantity)
        for half in sides_of(event):
            before = self.positions[half.user_id]
            fill = apply_fill(before, quantity if half.side == "BUY" else -quantity, price)
            self.positions[half.user_id] = fill.position
            booked = BookedFill(
                before.signed_quantity,
                fill.position.signed_quantity,
                price,
                self.leverage.get(half.user_id, 10),
                fill.realized_pnl,
                half.fee,
                half.cause == "LIQUIDATION",
            )
            settled = settle_fills(self.wallets[half.user_id], [booked], ZERO)
            self.wallets[half.user_id] = settled.wallet
            self.fees += half.fee
            self.fund += settled.liquidation_fee + settled.surplus - settled.insurance

    def holding(self, user_id: int) -> Holding:
        """An isolated position with its margin."""
        position = self.positions[user_id]
        return Holding(position.signed_quantity, position.entry_notional, self.wallets[user_id].position_margin)

    def equity(self) -> Decimal:
        """All there is: what users have at mark, fees and fund."""
        users = sum(w.available + w.order_margin + w.position_margin for w in self.wallets.values())
        profit = sum(self.holding(user).equity(self.mark) - self.holding(user).margin for user in self.positions)
        return users + profit + self.fees + self.fund

    def rank(self, bankrupt: int, price: Decimal) -> list[int]:
        """Who is deleveraged, first one first: opposite positions that are good at mark and at the price."""
        quantity = self.holding(bankrupt).signed_quantity
        held = {user: self.holding(user) for user in self.positions}
        good = {
            user: deleverage_score(other, self.mark)
            for user, other in held.items()
            if other.signed_quantity * quantity < 0 and other.equity(self.mark) > 0 and other.equity(price) > 0
        }
        return sorted(good, key=lambda user: (-good[user], user))

    def liquidate(self, user_id: int) -> None:
        """Rounds as LiquidationWorkflow does them: an order, and if that falls short a deleveraging."""
        available = self.wallets[user_id].available
        for _ in range(ROUNDS_MAX):
            holding = self.holding(user_id)
            if not must_liquidate(holding, self.mark, TIERS):
                break
            closing = quantity_to_close(holding, self.mark, TIERS, BTC.lot_size)
            target = abs(holding.signed_quantity) - closing
            self._order(user_id, holding, closing)
            left = self.holding(user_id)
            assert abs(left.signed_quantity) >= target
            if abs(left.signed_quantity) == target or not must_liquidate(left, self.mark, TIERS):
                continue
            if not self._deleverage(user_id, left):
                break
        assert self.wallets[user_id].available == available

    def _order(self, user_id: int, holding: Holding, closing: Decimal) -> None:
        worth = holding.equity(self.mark) * closing / abs(holding.signed_quantity)
        needed = insurance_needed(holding, closing, self.mark)
        granted, fund = round_down(max(ZERO, min(needed, self.fund))), self.fund
        price = worst_price(holding, closing, self.mark, granted, BTC.taker_fee_rate, BTC.tick_size, BTC.lot_size)
        lots = BTC.quantity_to_lots(closing)
        self.place(user_id, holding.closing_side, lots, price, forced=True)
        # No tolerance: the rounding of many fills is not the fund's either.
        assert fund - self.fund <= min(granted, max(ZERO, -worth))

    def _deleverage(self, user_id: int, holding: Holding) -> bool:
        closing = quantity_to_close(holding, self.mark, TIERS, BTC.lot_size)
        price = deleverage_price(holding, BTC.tick_size)
        ranked, before, fund = self.rank(user_id, price), dict(self.positions), self.fund
        done = self.deleverage(user_id, closing, price, ranked)
        # Never more than needed, nor less than those who are ranked can give.
        sizes = [abs(before[user].signed_quantity) for user in ranked]
        taken = [BTC.lots_to_quantity(event.quantity) for event in done]
        assert sum(taken) == min(closing, sum(sizes))
        # The ranked ones first, each to the end before the next.
        assert [event.counterparty_user_id for event in done] == ranked[: len(done)]
        assert taken[:-1] == sizes[: len(done)][:-1]
        # No better than the bankruptcy price for them, and less than a tick worse; the fund has no part in it.
        exact = bankruptcy_price(holding.signed_quantity, holding.entry_notional, holding.margin) or ZERO
        side = 1 if holding.signed_quantity > 0 else -1
        assert 0 <= side * (price - exact) < BTC.tick_size or price == BTC.tick_size
        assert self.fund >= fund
        for user in ranked:
            after = self.positions[user].signed_quantity
            assert after * before[user].signed_quantity >= 0
            assert abs(after) <= abs(before[user].signed_quantity)
        others = set(before) - set(ranked) - {user_id}
        assert all(self.positions[user] == before[user] for user in others)
        return bool(done)


@st.composite
def venues(draw: st.DrawFn) -> Venue:
    """Positions of six users at random leverage and prices, a thin book, a fund, and a mark that has moved."""
    leverage = {user: draw(st.sampled_from([5, 10, 20, 50, 100])) for user in range(1, 7)}
    mark = D(draw(st.integers(480_000, 720_000))) / 10
    venue = Venue(mark, D(draw(st.sampled_from([0, 100, 5_000, 1_000_000]))), leverage)
    trade = st.tuples(USERS, USERS, st.integers(1, 12_000), st.integers(590_000, 610_000))
    for seller, buyer, lots, ticks in draw(st.lists(trade, min_size=1, max_size=8)):
        if seller != buyer:
            venue.place(seller, "SELL", lots, D(ticks) / 10)
            venue.place(buyer, "BUY", lots, D(ticks) / 10)
    quote = st.tuples(st.integers(1, 8_000), st.integers(0, 700))
    for lots, gap in draw(st.lists(quote, max_size=4)):
        for side, sign in (("BUY", -1), ("SELL", 1)):
            price = (mark * (10_000 + sign * gap) / 10_000).quantize(BTC.tick_size)
            venue.place(MAKER, "BUY" if side == "BUY" else "SELL", lots, price)
    return venue


@settings(max_examples=200, deadline=None)
@given(venues())
def test_a_liquidation_conserves_equity_and_takes_from_others_only_what_it_must(venue: Venue) -> None:
    before = venue.equity()
    for user in range(1, 7):
        venue.liquidate(user)
        assert venue.equity() == before
    for user in range(1, 7):
        left = venue.holding(user)
        if must_liquidate(left, venue.mark, TIERS):
            # Nobody is left to take it.
            assert venue.rank(user, deleverage_price(left, BTC.tick_size)) == []


@given(venues())
def test_a_position_is_due_exactly_when_its_margin_ratio_is_down_to_the_maintenance_rate(venue: Venue) -> None:
    for user in range(1, 7):
        holding = venue.holding(user)
        ratio = margin_ratio(holding.signed_quantity, holding.entry_notional, holding.margin, venue.mark)
        if ratio is None:
            assert not must_liquidate(holding, venue.mark, TIERS)
            continue
        notional = abs(holding.signed_quantity) * venue.mark
        rate = maintenance_margin(notional, TIERS) / notional
        assert must_liquidate(holding, venue.mark, TIERS) == (ratio <= rate)
        # At the very edge, and the smallest amount beyond it.
        edge = maintenance_margin(notional, TIERS) - (holding.equity(venue.mark) - holding.margin)
        assert must_liquidate(Holding(holding.signed_quantity, holding.entry_notional, edge), venue.mark, TIERS)
        safe = Holding(holding.signed_quantity, holding.entry_notional, edge + FEE_STEP)
        assert not must_liquidate(safe, venue.mark, TIERS)


@settings(max_examples=300, deadline=None)
# The fee of the first fill took what the second one needed.
@example(1, 2, 400_000, 2_040, 0, [(1, 0)], True, 2)  # noqa: FBT003
@given(
    st.sampled_from([1, -1]),
    st.integers(1, 6_000),
    st.integers(400_000, 800_000),
    st.integers(1, 10**12),
    st.integers(-600, 600),
    st.lists(st.tuples(st.integers(1, 3_000), st.integers(0, 30)), max_size=12),
    st.booleans(),
    st.integers(1, 6_000),
)
def test_whatever_the_book_the_fund_pays_no_more_than_the_position_is_worth_below_zero(
    side: int,
    lots: int,
    entry_ticks: int,
    margin_steps: int,
    moved: int,
    book: list[tuple[int, int]],
    is_cross: bool,
    closing_lots: int,
) -> None:
    """Every fill of the order, for all or a part, is at its worst price, or some ticks better; with equity at the mark
    the fund is untouched. Of a cross position, what is available stands behind it, too."""
    quantity, entry = lots * BTC.lot_size, D(entry_ticks) / 10
    notional = quantity * entry
    margin = min(margin_steps * FEE_STEP, notional)
    holding = Holding(side * quantity, notional, margin)
    mark = (entry * (10_000 + moved) / 10_000).quantize(BTC.tick_size)
    closing = min(closing_lots, lots) * BTC.lot_size
    below_zero = max(ZERO, -holding.equity(mark) * closing / quantity)
    granted = round_down(insurance_needed(holding, closing, mark))
    worst = worst_price(holding, closing, mark, granted, BTC.taker_fee_rate, BTC.tick_size, BTC.lot_size)
    position, drawn = Position(side * quantity, notional), ZERO
    free = round_down(margin / 3) if is_cross else ZERO
    wallet = Wallet(free, position_margin=margin - free)
    for taken, better in [*book, (lots, 0)]:
        filled = min(closing, taken * BTC.lot_size)
        closing -= filled
        if not filled:
            break
        price = worst + side * better * BTC.tick_size
        fill = apply_fill(position, -side * filled, price)
        fee = round_up(filled * price * BTC.taker_fee_rate)
        before, after = position.signed_quantity, fill.position.signed_quantity
        booked = BookedFill(before, after, price, 10, fill.realized_pnl, fee, is_liquidation=True, is_cross=is_cross)
        settled = settle_fills(wallet, [booked], ZERO)
        position, wallet, drawn = fill.position, settled.wallet, drawn + settled.insurance
    assert drawn <= below_zero

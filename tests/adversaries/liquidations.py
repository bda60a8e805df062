"""What is done to traders: liquidation, deleveraging, funding, halts."""

from decimal import Decimal

from domain.funding import Holding as Held
from domain.funding import charge, funding_payment
from domain.liquidation import (
    Holding,
    deleverage_price,
    deleverage_score,
    must_liquidate,
    quantity_to_close,
    worst_price,
)
from domain.matching import Deleverage, New, SetState, TradingState
from domain.money import ZERO, round_down
from tests.adversaries.accounts import TIERS
from tests.adversaries.exchange import FundingTime
from tests.adversaries.orders import Desk

ROUNDS_MAX = 20


class House(Desk):
    """The exchange with all its services."""

    # Halts

    def set_state(self, name: str, state: TradingState) -> None:
        """Halt or resume an instrument."""
        self.venues[name].state = state
        self.apply(name, SetState(at=self.time, state=state))
        self.follow_up()

    # Liquidation

    def can_close(self, name: str) -> bool:
        """Whether positions in this instrument can be closed now."""
        return self.venues[name].state == "TRADING" and self.venues[name].is_live(self.time)

    def watch(self) -> None:
        """Liquidate everybody who is due (as `activities.liquidation.triggering`)."""
        for user_id, account in list(self.accounts.items()):
            for name, stake in list(account.stakes.items()):
                if not stake.exposure.cross and self.can_close(name) and self._is_due(user_id, name):
                    self._liquidate(user_id, name, [name])
            for _ in range(ROUNDS_MAX):
                chosen = self._next_to_close(user_id)
                if chosen is None:
                    break
                before = account.stakes[chosen].quantity
                self._liquidate(user_id, chosen, [name for name, s in account.stakes.items() if s.exposure.cross])
                if account.stakes[chosen].quantity == before:
                    break
        for user_id in self.accounts:
            self.tell_cover(user_id)
        self.follow_up()

    def _is_due(self, user_id: int, name: str) -> bool:
        account = self.accounts[user_id]
        if account.stakes[name].exposure.cross:
            return account.cross_equity(self.marks) <= account.cross_maintenance(self.marks)
        return must_liquidate(account.stakes[name].holding, self.marks[name], TIERS)

    def _next_to_close(self, user_id: int) -> str | None:
        """The cross position that goes first (as `activities.liquidation.accounts`); None if none has to,
        or can."""
        account, marks = self.accounts[user_id], self.marks
        crossed = dict(account.crossed())
        if not crossed or not self._is_due(user_id, next(iter(crossed))):
            return None
        order = {
            name: (
                account.cross_holding(name, marks).margin + stake.pnl(marks[name]) >= 0,
                stake.maintenance(marks[name]),
            )
            for name, stake in crossed.items()
            if self.can_close(name)
        }
        return max(order, key=lambda name: order[name]) if order else None

    def _liquidate(self, user_id: int, name: str, taken: list[str]) -> None:
        """The position is taken over: orders go, then rounds of an order, and a deleveraging if that falls short."""
        account = self.accounts[user_id]
        stake = account.stakes[name]
        for each in taken:
            account.stakes[each].is_liquidated = True
            self.cancel_all(user_id, each, "LIQUIDATION")
        for _ in range(ROUNDS_MAX):
            if not stake.quantity or not self._is_due(user_id, name):
                break
            left = abs(stake.quantity) - self._closing(user_id, name)
            self._order(user_id, name)
            if abs(stake.quantity) <= left or not self._is_due(user_id, name):
                continue
            if not self._deleverage(user_id, name):
                break
            if stake.exposure.cross and self._next_to_close(user_id) != name:
                break
        self.claims.clear()
        for each in taken:
            account.stakes[each].is_liquidated = False

    def _closing(self, user_id: int, name: str) -> Decimal:
        holding = self.accounts[user_id].backing(name, self.marks)
        return quantity_to_close(holding, self.marks[name], TIERS, self.venues[name].instrument.lot_size)

    def _worth(self, user_id: int, name: str, closing: Decimal) -> Decimal:
        """What the closed part is worth at the mark: law 1, by figures of its own."""
        account, stake = self.accounts[user_id], self.accounts[user_id].stakes[name]
        if stake.exposure.cross:
            return account.cross_equity(self.marks)
        return stake.equity(self.marks[name]) * closing / abs(stake.quantity)

    def _order(self, user_id: int, name: str) -> None:
        account, venue = self.accounts[user_id], self.venues[name]
        holding, closing, instrument = account.backing(name, self.marks), self._closing(user_id, name), venue.instrument
        granted = round_down(max(ZERO, min(account.insurance(name, closing, self.marks), self.fund)))
        price = worst_price(
            holding,
            closing,
            venue.mark,
            granted,
            instrument.taker_fee_rate,
            instrument.tick_size,
            instrument.lot_size,
        )
        self.claims[user_id, name] = max(ZERO, -self._worth(user_id, name, closing))
        self.order_id += 1
        stake = account.stakes[name]
        stake.exposure = stake.exposure.with_order(holding.closing_side, closing, price, reduce_only=True)
        self.apply(
            name,
            New(
                at=self.time,
                order_id=self.order_id,
                user_id=user_id,
                side=holding.closing_side,
                type="MARKET",
                time_in_force="IOC",
                price=instrument.price_to_ticks(price),
                quantity=instrument.quantity_to_lots(closing),
                stp_mode="EXPIRE_MAKER",
                reduce_only=True,
                liquidation=True,
            ),
        )

    def _deleverage(self, user_id: int, name: str) -> bool:
        """Against the ranked opposite positions; whether anything was closed."""
        account, venue = self.accounts[user_id], self.venues[name]
        holding, closing = account.backing(name, self.marks), self._closing(user_id, name)
        price = deleverage_price(holding, venue.instrument.tick_size)
        self.claims[user_id, name] = max(ZERO, -self._worth(user_id, name, closing))
        before = account.stakes[name].quantity
        self.apply(
            name,
            Deleverage(
                at=self.time,
                user_id=user_id,
                side=holding.closing_side,
                price=venue.instrument.price_to_ticks(price),
                quantity=venue.instrument.quantity_to_lots(closing),
                counterparties=self._rank(name, holding, price),
            ),
        )
        return account.stakes[name].quantity != before

    def _rank(self, name: str, loser: Holding, price: Decimal) -> list[int]:
        mark = self.marks[name]
        stakes = {user_id: account.stakes[name] for user_id, account in self.accounts.items()}
        good = {
            user_id: deleverage_score(stake.holding, mark)
            for user_id, stake in stakes.items()
            if not stake.is_liquidated
            and stake.quantity * loser.signed_quantity < 0
            and stake.equity(mark) > 0
            and stake.equity(price) > 0
        }
        return sorted(good, key=lambda user_id: (-good[user_id], user_id))

    # Funding

    def funding_time(self, name: str, rate: Decimal) -> None:
        """Positions are fixed, and what they pay is owed from here on."""
        quantities = {user_id: account.stakes[name].quantity for user_id, account in self.accounts.items()}
        payments = {u: funding_payment(quantity, self.marks[name], rate) for u, quantity in quantities.items()}
        self.due.append(FundingTime(name, payments))
        for user_id, payment in payments.items():
            self.accounts[user_id].owed += max(ZERO, -payment)
            self.tell_cover(user_id)

    def collect(self) -> None:
        """Collect the oldest funding time (as `activities.ledger.funding`)."""
        if not self.due:
            return
        time = self.due.pop(0)
        for user_id, payment in time.payments.items():
            if payment > 0:
                self.accounts[user_id].available += payment
            elif payment < 0:
                self._charge(user_id, time.name, -payment)
        self.dust -= sum(time.payments.values(), ZERO)
        for user_id in time.payments:
            self.tell_cover(user_id)
        self.follow_up()

    def _charge(self, user_id: int, name: str, owed: Decimal) -> None:
        account = self.accounts[user_id]
        holdings = [Held(each, s.order_margin, s.position_margin) for each, s in account.stakes.items()]
        source = charge(owed, account.available, name, holdings)
        account.owed -= owed
        account.available -= source.available
        for draw in source.draws:
            self.take(user_id, draw)
        money = account.available + sum((s.order_margin + s.position_margin for s in account.stakes.values()), ZERO)
        self.draw(user_id, "FUNDING", source.insurance, ZERO if money else source.insurance)

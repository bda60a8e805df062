"""What any set of traders may do to the exchange of `tests/adversaries.py`: the laws of docs/solvency.md hold."""

from decimal import Decimal
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from domain.exposure import Exposure
from domain.matching import Side
from domain.money import ZERO
from domain.order_entry import OrderRequest
from engine import guards, matcher
from engine.guards import NO_SALE, ONE, Guards
from tests.adversaries import BTC, OPPOSITE, UNIT, Exchange

USERS = st.integers(1, 4)
SIDES = st.sampled_from(["BUY", "SELL"])
# In thousandths of the mark: near it more often than far from it.
OFFSETS = st.one_of(st.integers(-8, 8), st.integers(-55, 55))
QUANTITIES = st.sampled_from(["0.001", "0.1", "1", "3"])


class Adversaries(RuleBasedStateMachine):
    """Four accounts, perhaps of one person, with little money and any leverage."""

    def __init__(self) -> None:
        super().__init__()
        self.exchange = Exchange()
        self.paid_in = ZERO

    @initialize(amounts=st.lists(st.sampled_from([500, 2_000, 40_000]), min_size=4, max_size=4))
    def deposit(self, amounts: list[int]) -> None:
        for user_id, amount in enumerate(amounts, 1):
            self.exchange.deposit(user_id, Decimal(amount))
            self.paid_in += amount

    @rule(offset=st.integers(-80, 80), hundredths=st.integers(0, 9))
    def move_mark(self, offset: int, hundredths: int) -> None:
        mark = self.exchange.mark * (1000 + offset) / 1000
        self.exchange.say_mark(
            max(Decimal(5_000), min(Decimal(200_000), mark)).quantize(Decimal(1)) + hundredths * Decimal("0.01")
        )

    @rule(
        user=USERS,
        side=SIDES,
        kind=st.sampled_from(["LIMIT", "LIMIT", "LIMIT", "MARKET", "STOP_LIMIT", "STOP_MARKET", "TAKE_PROFIT_MARKET"]),
        quantity=QUANTITIES,
        offset=OFFSETS,
        stop_offset=OFFSETS,
        terms=st.sampled_from(["GTC", "IOC", "FOK"]),
        reduce_only=st.sampled_from([False, False, True]),
    )
    def place(
        self,
        user: int,
        side: Any,
        kind: Any,
        quantity: str,
        offset: int,
        stop_offset: int,
        terms: Any,
        reduce_only: bool,
    ) -> None:
        stop = self._at(self.exchange.mark, stop_offset) if kind not in ("LIMIT", "MARKET") else None
        price = self._at(stop or self.exchange.mark, offset) if kind.endswith("LIMIT") else None
        request = OrderRequest(
            BTC.instrument_id,
            side,
            kind,
            Decimal(quantity),
            price,
            time_in_force=terms,
            stp_mode="EXPIRE_MAKER",
            reduce_only=reduce_only,
            stop_price=stop,
        )
        self.exchange.place(user, request)

    @rule(user=USERS, back=st.integers(0, 10))
    def cancel(self, user: int, back: int) -> None:
        self.exchange.cancel(user, self.exchange.order_id - back)

    @rule(user=USERS, amount=st.sampled_from([-5_000, -300, -10, 10, 300, 5_000]))
    def move_margin(self, user: int, amount: int) -> None:
        self.exchange.move_margin(user, Decimal(amount))

    @rule(user=USERS, leverage=st.sampled_from([1, 3, 10, 50, 100]))
    def lever(self, user: int, leverage: int) -> None:
        self.exchange.lever(user, leverage)

    def _at(self, reference: Decimal, offset: int) -> Decimal:
        return (reference * (1000 + offset) / 1000).quantize(BTC.tick_size)

    @invariant()
    def the_fund_pays_for_nobody_s_orders(self) -> None:
        assert self.exchange.fund == 0

    @invariant()
    def money_comes_from_nothing(self) -> None:
        exchange = self.exchange
        held = sum((a.wallet.available + a.wallet.order_margin for a in exchange.accounts.values()), ZERO)
        equity = sum((a.equity(exchange.mark) for a in exchange.accounts.values()), ZERO)
        assert held + equity + exchange.fees + exchange.fund == self.paid_in

    @invariant()
    def every_fill_that_opened_is_covered(self) -> None:
        for opened in self.exchange.opened:
            assert opened.margin >= opened.initial, opened
            assert opened.equity >= opened.maintenance or not opened.was_sound, opened
        self.exchange.opened.clear()

    @invariant()
    def nobody_is_below_zero(self) -> None:
        for account in self.exchange.accounts.values():
            wallet = account.wallet
            assert min(wallet.available, wallet.order_margin, wallet.position_margin) >= 0
            assert wallet.order_short <= 0

    @invariant()
    def the_engine_never_believes_in_more_margin_than_there_is(self) -> None:
        for user_id, account in self.exchange.accounts.items():
            quantity = account.position.signed_quantity
            known = self.exchange.matcher.book.accounts[user_id]
            assert known.position * BTC.lot_size == quantity
            margin, entry = account.wallet.position_margin, account.position.entry_notional
            backing = known.backing * UNIT / ONE
            if quantity > 0:
                assert backing >= entry - margin
            elif quantity < 0:
                assert backing <= entry + margin


TestAdversaries = Adversaries.TestCase
TestAdversaries.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def _without_bounds(what: str) -> Any:
    """`Guards.worst_price`, but that nothing is too bad for what opens, or for what closes."""
    real = Guards.worst_price

    def worst_price(self: Guards, account: Any, new: Any, *, closes: bool) -> int:
        if closes == (what == "closing"):
            return NO_SALE if new.side == "BUY" else 0
        return real(self, account, new, closes=closes)

    return worst_price


def _the_first_terms_for_ever(account: Any, terms: Any) -> None:
    if not account.leverage:
        guards.set_terms(account, terms)


# Each guard, and what is there instead of it.
MUTATIONS: dict[str, tuple[Any, str, Any]] = {
    "what opens may be as far from the mark as it likes": (Guards, "worst_price", _without_bounds("opening")),
    "what closes may be worse than the bankruptcy price": (Guards, "worst_price", _without_bounds("closing")),
    "open loss is not put behind the position": (Guards, "open_loss", lambda *_: 0),
    "open loss is not held with the order": (Exposure, "open_loss", lambda *_: ZERO),
    "the engine is not told of margin that moves": (matcher, "move_margin", lambda *_: None),
    "the engine does not hear of other terms": (matcher, "set_terms", _the_first_terms_for_ever),
    "what backs a position is not counted": (matcher, "book_fill", lambda *_: None),
    "initial margin is believed to be twice what it is": (guards, "ONE", 2 * ONE),
}


class KnownAttacks(Adversaries):
    """What was tried before comes first: two accounts of one person, one of them with hardly any money."""

    @initialize()
    def trade_far_from_the_mark(self) -> None:
        for near, far in ((0, 48), (0, -48)):
            self._begin("1000", "1000000", leverage=100)
            side: Side = "BUY" if far > 0 else "SELL"
            opposite = OPPOSITE[side]
            self._trade(side, opposite, far)
            self._check()
            self._begin("1000", "1000000", leverage=100)
            self._trade(side, opposite, near)
            self._trade(opposite, side, -far)
            self._check()
            self._begin("40000", "1000000", leverage=100)
            self._trade(side, opposite, far)
            self._check()
            # First a position with all its margin, then a leverage that takes nearly all of it away.
            self._begin("100000", "1000000", leverage=1)
            self._trade(side, opposite, near)
            self.exchange.lever(1, 100)
            self.exchange.place(2, OrderRequest(BTC.instrument_id, opposite, "LIMIT", Decimal(1), self._price(far)))
            self.exchange.place(1, OrderRequest(BTC.instrument_id, side, "MARKET", Decimal(1), time_in_force="IOC"))
            self._check()

    def _price(self, offset: int) -> Decimal:
        return self._at(self.exchange.mark, offset)

    def _begin(self, poor: str, rich: str, leverage: int) -> None:
        self.exchange = Exchange()
        self.exchange.deposit(1, Decimal(poor))
        self.exchange.deposit(2, Decimal(rich))
        self.paid_in = Decimal(poor) + Decimal(rich)
        self.exchange.lever(1, leverage)

    def _trade(self, side: Any, opposite: Any, offset: int) -> None:
        price = self._price(offset)
        for user, its in ((2, opposite), (1, side)):
            self.exchange.place(user, OrderRequest(BTC.instrument_id, its, "LIMIT", Decimal(1), price))

    def _check(self) -> None:
        self.the_fund_pays_for_nobody_s_orders()
        self.every_fill_that_opened_is_covered()
        self.nobody_is_below_zero()
        self.the_engine_never_believes_in_more_margin_than_there_is()


TestKnownAttacks = KnownAttacks.TestCase
TestKnownAttacks.settings = settings(max_examples=3, stateful_step_count=3, deadline=None)


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_without_any_one_of_the_guards_a_law_breaks(mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*MUTATIONS[mutation])
    budget = settings(
        max_examples=300,
        stateful_step_count=40,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    with pytest.raises((AssertionError, BaseExceptionGroup)):
        run_state_machine_as_test(KnownAttacks, settings=budget)

"""What any set of traders may do to the exchange of `tests/adversaries`: the laws of docs/solvency.md hold, and do not
without any one of the guards."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from msgspec.structs import replace as but

from domain.collateral import Collateral
from domain.exposure import Exposure
from domain.funding import Charge
from domain.money import ZERO, round_up
from domain.order_entry import Amendment, amendment
from domain.wallet import Wallet, freeze
from engine import guards, matcher
from engine.guards import NO_SALE, ONE, Guards
from tests.adversaries import exchange, liquidations, orders
from tests.adversaries.attacks import ATTACKS, SCENES, Scene
from tests.adversaries.machine import Adversaries

TestAdversaries = Adversaries.TestCase
TestAdversaries.settings = settings(max_examples=200, stateful_step_count=40, deadline=None, derandomize=True)

Patch = tuple[Any, str, Any]


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


def _never_less_cover(account: Any, told: Any) -> None:
    guards.set_cover(account, but(told, cover=max(told.cover, account.cover)))


def _endless_cover(account: Any, told: Any) -> None:
    account.cover = 1 << 80


def _claiming_nothing(*terms: Any) -> Amendment:
    return replace(amendment(*terms), claimed_quantity=ZERO, claimed_notional=ZERO, claimed_loss=ZERO)


def _what_there_is(wallet: Wallet, amount: Decimal) -> Wallet | None:
    return freeze(wallet, min(amount, wallet.available))


def _netted(self: Exposure, taker_fee_rate: Decimal) -> Decimal:
    bids = self.bid_notional if self.opens("BUY") else ZERO
    asks = self.ask_notional if self.opens("SELL") else ZERO
    held, losses = self.signed_notional, self.open_loss("BUY") + self.open_loss("SELL")
    worst = max(abs(held), abs(held + bids), abs(held - asks))
    return round_up((worst - abs(held)) / self.leverage + (bids + asks) * taker_fee_rate + losses)


def _anywhere(holding: Any, closing: Decimal, mark: Decimal, *_: Any) -> Decimal:
    band = Decimal("0.95") if holding.signed_quantity > 0 else Decimal("1.05")
    return (mark * band).quantize(Decimal(1))


def _far_away(holding: Any, tick_size: Decimal) -> Decimal:
    return Decimal(57_000) if holding.signed_quantity > 0 else Decimal(63_000)


def _free(*, loss: bool, funding: bool) -> Any:
    def free(self: Collateral) -> Decimal:
        return self.available - max(ZERO, self.cross_loss) * loss - self.funding_owed * funding

    return property(free)


# Each guard, and what is there instead of it.
MUTATIONS: dict[str, Sequence[Patch]] = {
    "what opens may be as far from the mark as it likes": [(Guards, "worst_price", _without_bounds("opening"))],
    "what closes may be worse than the bankruptcy price": [(Guards, "worst_price", _without_bounds("closing"))],
    "what is due may grow": [(Guards, "_is_due", lambda *_, **__: False)],
    "the margin of an old position backs what turns it round": [(Exposure, "order_margin", _netted)],
    "an order that was to reduce only may open": [(guards, "backed", lambda *_: 1 << 40)],
    "open loss is not put behind the position": [(Guards, "open_loss", lambda *_: 0)],
    "open loss is not held with the order": [(Exposure, "open_loss", lambda *_: ZERO)],
    "a sale is backed where it trades, whatever is held": [(Guards, "_backed_from", lambda *_: 0)],
    "the engine is not told of margin that moves": [(matcher, "move_margin", lambda *_: None)],
    "the engine does not hear of other terms": [(matcher, "set_terms", _the_first_terms_for_ever)],
    "what backs a position is not counted": [(matcher, "book_fill", lambda *_: None)],
    "initial margin is believed to be twice what it is": [(guards, "ONE", 2 * ONE)],
    "whatever covers a cross position, it may be closed": [(Guards, "_cross_spare", lambda *_: 1 << 40)],
    "the cover of a cross position has no end": [(matcher, "set_cover", _endless_cover)],
    "the engine does not hear of less cover": [(matcher, "set_cover", _never_less_cover)],
    "an amendment claims nothing": [(orders, "amendment", _claiming_nothing)],
    "a batch is judged by the same money": [
        (orders.Desk, "may_leave", lambda *_: True),
        (orders, "freeze", _what_there_is),
    ],
    "what a cross loss stands on may leave": [(Collateral, "free", _free(loss=False, funding=True))],
    "a fill takes what a cross loss stands on": [(exchange, "return_margin", lambda wallet, *_: wallet)],
    "what funding is owed from may leave": [(Collateral, "free", _free(loss=True, funding=False))],
    "what opens needs no live mark": [(matcher.Matcher, "_entry_refusal", lambda *_, **__: "")],
    "a liquidation sells at any price": [(liquidations, "worst_price", _anywhere)],
    "deleveraging is at a price of its own": [(liquidations, "deleverage_price", _far_away)],
    "a cross loss takes of no other margin": [(exchange, "draw_margin_first", lambda *_: [])],
    "funding is paid by the fund first": [(liquidations, "charge", lambda owed, *_: Charge(ZERO, (), owed))],
}


def _caught(tries: Callable[[], None]) -> bool:
    try:
        tries()
    except (AssertionError, BaseExceptionGroup):
        return True
    return False


def _known_attacks() -> None:
    for attack in ATTACKS:
        for side, cross in SCENES:
            attack(Scene(side, cross))


def _random_attacks() -> None:
    budget = settings(
        max_examples=150,
        stateful_step_count=40,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(Adversaries, settings=budget)


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_without_any_one_of_the_guards_a_law_breaks(mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for patch in MUTATIONS[mutation]:
        monkeypatch.setattr(*patch)
    assert _caught(_known_attacks) or _caught(_random_attacks)
